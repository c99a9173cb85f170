"""What is at a site: the residual stream, what is added to it, or something on the way to that.

Names do not tell. What GPT-2's MLP returns is added to the residual stream; Gemma 2's is normed first,
Granite's is multiplied by a number, and BLOOM's holds the whole stream. So a few tokens are run through each
block, and the sums among its tensors are found:

    whole = stream + c · term (+ c' · term')        up to the rounding of the model's dtype

A stream is what enters the block, a sum that was found before, or the norm of one (in BERT and its kin). A
term is what a module in the block returned before. Then a tensor's part in these sums is its role.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from saemill.common.models.model import LanguageModel
from saemill.common.models.sites import watch
from saemill.common.models.structure import reader_of
from saemill.common.stores.site_names import INPUT, is_input, module_of
from saemill.common.stores.site_roles import Role

N_TOKENS = 16
"""Tokens of a row that are looked at: what holds for each of their values holds everywhere."""
NO_WORSE = 2.0
"""Ratio of squared errors up to which terms as they are fit as well as terms times the best factors."""
N_TRIED = 3
"""Number of combinations of terms, those that fit best, whose fit is looked at value by value."""


def roles_of(model: LanguageModel, sites: Iterable[str], ids_RS: Tensor) -> dict[str, Role | None]:
    """Find what is at some sites.

    Args:
        model: the model.
        sites: their names.
        ids_RS: token ids, int64; the first of them are run.

    Returns: by site; None where it is not in a block, or no sum that it has a part in was found.
    """
    lists = block_lists(model.base)
    wanted = {site: _block_of(module_of(site), lists) for site in sites}
    blocks = {block for block in wanted.values() if block is not None}
    seen = _seen(model, blocks, ids_RS[:1, :N_TOKENS])
    found = {block: _Sums(block, model, seen[block]) for block in blocks}
    return {site: found[block].role(site) if block in found else None for site, block in wanted.items()}


def block_lists(base: nn.Module) -> list[str]:
    """List the paths of the outermost lists of modules in what is run on tokens."""
    reader = reader_of(base)
    paths = {id(module): path for path, module in base.named_modules()}
    lists = [
        paths[id(module)] for module in reader.modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    return [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]


def _block_of(path: str, lists: list[str]) -> str | None:
    """Find the block that a module is, or is in; None if it is in none."""
    for above in lists:
        if path.startswith(f"{above}."):
            return f"{above}.{path.removeprefix(f'{above}.').split('.')[0]}"
    return None


Tensors = dict[str, Tensor]
"""What was at the sites of a block, float64 [T, width], in the order in which the model came to them."""


def _seen(model: LanguageModel, blocks: Iterable[str], ids_RS: Tensor) -> dict[str, Tensors]:
    """Run a few tokens. Return what was at each block's sites, as far as it is one vector per token."""
    n_tokens = ids_RS.numel()
    seen: dict[str, Tensors] = {block: {} for block in blocks}
    twice: set[str] = set()

    def see(block: str, site: str, x: Any) -> None:
        if site in seen[block]:
            twice.add(site)
        elif isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1:
            if x.numel() == n_tokens * x.shape[-1]:  # also where rows are flattened, as for OPT's MLP
                seen[block][site] = x.detach().double().cpu().reshape(n_tokens, -1).clone()

    handles = [
        watch(model.modules, site, partial(see, block, site))
        for block in seen
        for name in model.modules
        if name == block or name.startswith(f"{block}.")
        for site in (name + INPUT, name)
    ]
    try:
        model.run(ids_RS)
    finally:
        for handle in handles:
            handle.remove()
    return {
        block: {site: x for site, x in tensors.items() if site not in twice}
        for block, tensors in seen.items()
    }


@dataclass(eq=False, slots=True)
class _Value:
    """A tensor of a block, wherever it is."""

    x_TD: Tensor
    sites: list[str] = field(default_factory=list)
    """Where it is, in the order in which the model came there."""

    @property
    def givers(self) -> list[str]:
        """List the modules that return it, the outermost first."""
        return sorted((site for site in self.sites if not is_input(site)), key=lambda name: name.count("."))


@dataclass(frozen=True, eq=False, slots=True)
class _Sum:
    """whole = stream + Σ factor · term."""

    whole: _Value
    stream: _Value | None
    terms: tuple[tuple[_Value, float], ...]

    def beside(self, term: _Value) -> tuple[str, ...]:
        """List the modules that return the other terms."""
        return tuple(other.givers[0] for other, _ in self.terms if other is not term)


class _Sums:
    """The sums among the tensors of one block.

    Args:
        block: its path.
        model: the model.
        tensors: what was at the block's sites.
    """

    def __init__(self, block: str, model: LanguageModel, tensors: Tensors) -> None:
        self.block, self.modules = block, model.modules
        self.eps = torch.finfo(model.model.dtype).eps
        self.values: list[_Value] = []
        self.at: dict[str, _Value] = {}
        """What is at each site."""
        for site, x_TD in tensors.items():
            same = next((value for value in self.values if torch.equal(value.x_TD, x_TD)), None)
            if same is None:
                self.values.append(same := _Value(x_TD))
            same.sites.append(site)
            self.at[site] = same
        self.sums: list[_Sum] = []
        self.streams: list[_Value] = []
        self.norms: dict[_Value, _Value] = {}
        """Streams by their norms."""
        if block + INPUT in self.at and block in self.at:
            self._find()
        terms = {term: term.givers[0] for found in self.sums for term, _ in found.terms}
        self.after_norm = {value: norm for term in terms for norm, value in self._normed(term)}
        """What is normed before it is added, and the module that norms it."""
        self.adders = [*terms.values(), *(value.givers[0] for value in self.after_norm if value.givers)]
        self.parts = [found for term, giver in terms.items() if (found := self._parts(term, giver))]

    def _find(self) -> None:
        """Find the sums, in the order of the forward pass."""
        before, terms = self.at[self.block + INPUT], list[_Value]()
        self._add_stream(before)
        for value in self.values:
            if value.x_TD.shape != before.x_TD.shape or value is before or value in self.norms:
                continue
            if found := self._as_sum(value, [*self.streams, *self.norms], terms, (0, 1, 2)):
                self.sums.append(found)
                self._add_stream(value)
                if found.stream is not None:
                    self._add_stream(found.stream)
            elif value.givers:
                terms.append(value)
        if self.at[self.block] in self.norms:
            self._add_stream(self.at[self.block])

    def _add_stream(self, value: _Value) -> None:
        """Note a stream, and its norms."""
        if value in self.streams:
            return
        self.streams.append(value)
        for site in value.sites:
            normed = self.at.get(module_of(site)) if is_input(site) else None
            if normed is not None and normed is not value and _is_norm(self.modules[module_of(site)]):
                self.norms.setdefault(normed, value)

    def _as_sum(
        self, whole: _Value, streams: Sequence[_Value | None], terms: list[_Value], n_terms: Iterable[int]
    ) -> _Sum | None:
        """Find a stream and the fewest terms that sum up to a value; None if no such sum is it."""
        for n in n_terms:
            for stream in streams:
                if found := self._fit(whole, stream, terms, n):
                    return found
        return None

    def _fit(self, whole: _Value, stream: _Value | None, terms: list[_Value], n: int) -> _Sum | None:
        """Find n terms that a value and a stream differ by. Each value counts by the rounding that it may
        have, so that huge ones do not outweigh the others."""
        y_TD = whole.x_TD
        base_TD = torch.zeros_like(y_TD) if stream is None else stream.x_TD
        if n == 0:
            return _Sum(whole, stream, ()) if self._is_sum(y_TD, base_TD, [], []) else None
        weight_TD = 1 / (y_TD.abs() + base_TD.abs()).clamp(min=1e-30)
        wanted = ((y_TD - base_TD) * weight_TD).flatten()
        each = (
            torch.stack([(term.x_TD * weight_TD).flatten() for term in terms]) if terms else wanted[None, :0]
        )
        chosen = torch.tensor(list(combinations(range(len(terms)), n)), dtype=torch.int64).view(-1, n)
        gram, along = each @ each.T if terms else each, each @ wanted if terms else wanted
        some, right = gram[chosen[:, :, None], chosen[:, None, :]], along[chosen]
        factors = (torch.linalg.pinv(some, hermitian=True) @ right[..., None])[..., 0]
        for best in (-(factors * right).sum(1)).argsort()[:N_TRIED].tolist():
            of, fitted, plain = chosen[best], factors[best], torch.ones_like(factors[best])
            squares = [(wanted - guess @ each[of]).square().sum() for guess in (plain, fitted)]
            guess = (plain if squares[0] <= NO_WORSE * squares[1] else fitted).tolist()
            if self._is_sum(y_TD, base_TD, values := [terms[i] for i in of], guess):
                return _Sum(whole, stream, tuple(zip(values, guess, strict=True)))
        return None

    def _is_sum(
        self, y_TD: Tensor, base_TD: Tensor, terms: Sequence[_Value], factors: Sequence[float]
    ) -> bool:
        """Tell whether a value is a sum up to rounding, number by number: each product and each sum on the
        way is off by half of eps of itself at most."""
        off_TD, size_TD = y_TD - base_TD, y_TD.abs()
        for term, factor in zip(terms, factors, strict=True):
            off_TD = off_TD - factor * term.x_TD
            size_TD = size_TD + base_TD.abs() / len(terms) + abs(factor) * term.x_TD.abs()
        return bool((off_TD.abs() <= self.eps * size_TD).all())

    def _normed(self, term: _Value) -> list[tuple[str, _Value]]:
        """List the norms that return a term, each with what it takes."""
        norms = [name for name in term.givers if _is_norm(self.modules[name])]
        found = [(name, self.at[name + INPUT]) for name in norms if name + INPUT in self.at]
        return [(name, value) for name, value in found if value is not term]

    def _parts(self, term: _Value, giver: str) -> _Sum | None:
        """Find two outputs within a module that its own output is the sum of."""
        inside = [
            value
            for value in self.values
            if value is not term
            and value.x_TD.shape == term.x_TD.shape
            and any(name.startswith(f"{giver}.") for name in value.givers)
        ]
        return self._as_sum(term, [None], inside, (2,))

    def role(self, site: str) -> Role | None:
        """Tell what is at a site of the block."""
        value = self.at.get(site)
        if value is None or not self.streams:
            return None
        if value in self.streams:
            adder = None if is_input(site) or site == self.block else self._adder(value, site)
            return Role(kind="holds_residual", module=adder) if adder else Role(kind="residual")
        if value in self.norms:
            return Role(kind="norm_of_residual")
        return self._in_sum(value) or self._within(site)

    def _adder(self, stream: _Value, site: str) -> str | None:
        """Find the module with weights within another one whose output was added last to a stream."""
        whole = self.norms.get(stream, stream)
        last = [term for found in self.sums if found.whole is whole for term, _ in found.terms][-1:]
        inside = [name for term in last for name in term.givers if name.startswith(f"{site}.")]
        return next((name for name in inside if any(True for _ in self.modules[name].parameters())), None)

    def _in_sum(self, value: _Value) -> Role | None:
        """Tell what part a tensor has in the sums that are the stream, or in what is added to it."""
        for found in self.sums:
            for term, factor in found.terms:
                factor = float(f"{factor:.4g}")
                if term is value:
                    return Role(kind="added", factor=factor, beside=found.beside(term))
                if (norm := self.after_norm.get(value)) in term.givers:
                    return Role(
                        kind="added_after_norm", module=norm, factor=factor, beside=found.beside(term)
                    )
        for found in self.parts:
            for term, factor in found.terms:
                if term is value:
                    whole, factor = found.whole.givers[0], float(f"{factor:.4g}")
                    return Role(kind="part", module=whole, factor=factor, beside=found.beside(term))
        return None

    def _within(self, site: str) -> Role | None:
        """Tell which of the modules that add to the stream a site is in."""
        inside = [name for name in self.adders if site.startswith(f"{name}.")]
        return Role(kind="within", module=inside[0]) if inside else None


def _is_norm(module: nn.Module) -> bool:
    """Tell whether a module has parameters of one number per dimension alone, as norms have."""
    return not list(module.children()) and all(p.dim() <= 1 for p in module.parameters())

"""Where an SAE errs: by position in the row, by length of the activation, and on which tokens most."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from saemill.assess.evalset import Chunk, EvalSet
from saemill.assess.positions import Positions
from saemill.common.stores.norms import NORMS_B, norms_from, norms_of
from saemill.common.stores.site_array import SiteArray

N_LENGTHS = 10
"""Groups of tokens by the length of their activation: tenths of the training tokens."""
N_WORST = 8
"""Tokens on which an SAE errs most, at most one per document."""


@dataclass(frozen=True, slots=True)
class Worst:
    """A token on which an SAE errs much."""

    error: float
    """Squared error."""
    address: int
    document: int
    """Hash of its document's text."""


class Lengths:
    """Groups of tokens by the norm of their activation at a site: tenths of the training tokens.

    Args:
        evalset: has the store's counts of training tokens by their norm.
        site: the site.
    """

    def __init__(self, evalset: EvalSet, site: str) -> None:
        array = evalset.arrays[site]
        sketch = array.sketch if isinstance(array, SiteArray) else None
        counts_B = np.zeros(1) if sketch is None else sketch.counts_B
        self.edges = np.zeros(0, np.float32)
        if counts_B.any():
            below_B = np.cumsum(counts_B) / counts_B.sum()
            tenths = np.arange(1, N_LENGTHS) / N_LENGTHS
            self.edges = np.unique(NORMS_B[np.searchsorted(below_B, tenths)])
        ends = [f"{edge:.3g}" for edge in self.edges.tolist()]
        inner = [f"{low}–{high}" for low, high in pairwise(ends)]
        self.labels = [f"≤ {ends[0]}", *inner, f"> {ends[-1]}"] if ends else []

    def of(self, x_TD: Tensor) -> NDArray[np.int64]:
        """Look up the group of each token."""
        return np.searchsorted(self.edges, norms_from(norms_of(x_TD.cpu())))


class Profile:
    """Errors of some SAEs by groups of tokens.

    Args:
        sites: variant name → site that is reconstructed or predicted.
        evalset: where the tokens come from.
    """

    def __init__(self, sites: dict[str, str], evalset: EvalSet) -> None:
        self.sites, self.evalset = sites, evalset
        self.positions = Positions(evalset.text.ctx_len)
        self.lengths = {site: Lengths(evalset, site) for site in dict.fromkeys(sites.values())}
        self._sums: dict[tuple[str, str], NDArray[np.float64]] = {}
        """Sums per group, by what is summed: a variant's squared errors, a site's squares, tokens; and the
        kind of groups."""
        self._worst: dict[str, list[Worst]] = {name: [] for name in sites}

    def add(
        self,
        chunk: Chunk,
        units: NDArray[Any],
        columns: dict[str, Any],
        squares: dict[str, NDArray[np.float64]],
    ) -> None:
        """Count some tokens.

        Args:
            chunk: the tokens.
            units: the document of each.
            columns: values per token of all SAEs; of `<name>/sse` the squared errors.
            squares: site → squared distances from the cached mean.
        """
        position_T = self.positions.of(chunk.addresses_T)
        for site, lengths in self.lengths.items():
            groups = {"position": position_T, "length": lengths.of(chunk.x[site])}
            ones = np.ones(len(units))
            for kind, n_groups in (("position", len(self.positions.labels)), ("length", len(lengths.labels))):
                if not n_groups:
                    continue
                values = {f"{site}/n": ones, f"{site}/squares": squares[site]}
                values |= {name: columns[f"{name}/sse"] for name, its in self.sites.items() if its == site}
                for what, value_T in values.items():
                    zeros = np.zeros(n_groups)
                    self._sums.setdefault((what, kind), zeros)[:] += np.bincount(
                        groups[kind], value_T, n_groups
                    )
        for name in self.sites:
            self._look_for_worst(name, columns[f"{name}/sse"], chunk.addresses_T, units)

    def _look_for_worst(
        self, name: str, error_T: NDArray[np.float64], addresses_T: NDArray[np.int64], units: NDArray[Any]
    ) -> None:
        known = self._worst[name]
        bar = known[-1].error if len(known) == N_WORST else 0.0
        order = np.argsort(-error_T, kind="stable")[: 8 * N_WORST]
        found = [
            Worst(float(error_T[i]), int(addresses_T[i]), int(units[i])) for i in order if error_T[i] > bar
        ]
        if found:
            self._worst[name] = _one_per_document([*known, *found])

    def merge(self) -> None:
        """Put together what all processes counted."""
        gathered = self.evalset.everyone.all_gather_objects((self._sums, self._worst))
        self._sums = {}
        for sums, _ in gathered:
            for key, values in sums.items():
                self._sums.setdefault(key, np.zeros_like(values))[:] += values
        self._worst = {
            name: _one_per_document([token for _, worst in gathered for token in worst[name]])
            for name in self.sites
        }

    def groups(self, name: str) -> list[dict[str, Any]]:
        """List the groups of tokens with FVU in each: the variance there is around the cached mean."""
        site, found = self.sites[name], []
        labels = {"position": self.positions.labels, "length": self.lengths[site].labels}
        for kind, its_labels in labels.items():
            if (name, kind) not in self._sums or len(its_labels) < 2:
                continue
            sums = (self._sums[what, kind] for what in (name, f"{site}/squares", f"{site}/n"))
            for label, error, squares, n in zip(its_labels, *sums, strict=True):
                fvu = float(error / squares) if squares > 0 else None
                found.append({"by": kind, "label": label, "n_tokens": int(n), "fvu": fvu})
        return found

    def worst(self, name: str) -> list[Worst]:
        """List the tokens on which an SAE errs most, the worst first."""
        return self._worst[name]


def _one_per_document(tokens: list[Worst]) -> list[Worst]:
    """Keep the worst tokens, one per document."""
    best: dict[int, Worst] = {}
    for token in sorted(tokens, key=lambda token: (-token.error, token.address)):
        best.setdefault(token.document, token)
    return list(best.values())[:N_WORST]

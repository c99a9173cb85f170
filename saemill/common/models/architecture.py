"""What a model is made of, found from its config alone: modules, blocks, sites, widths, limits."""

import copy
import fnmatch
import re
from dataclasses import dataclass
from functools import partial
from itertools import filterfalse
from typing import Any, NamedTuple

import torch
import transformers

from saemill.common.config import nearest
from saemill.common.errors import ConfigError
from saemill.common.hub import loading
from saemill.common.models.sites import watch
from saemill.common.models.structure import (
    base_class,
    base_of,
    block_names,
    is_encoder_decoder,
    longest_row_of,
    n_ids_of,
    reader_of,
    text_tower,
)
from saemill.common.stores.site_names import INPUT, is_input, module_of
from saemill.common.stores.site_records import Site

SHAPE = (2, 3)
"""Rows and tokens of the forward pass that finds the sites."""

POOLER = "pooler"
"""Word in the names of modules that encoders have without a head and lack with one: no sites."""
MOST_LAYERS = 10_000
"""Number of layers that no model exceeds."""

Seen = tuple[int, ...] | str
"""Shape of what is at a site, or its kind if it is no tensor of numbers."""


class Architecture:
    """Module names, sites and widths of a model, found without its weights.

    The model is built on torch's meta device and run there once on a few tokens.

    Args:
        config: the model's transformers config.
        trust_remote_code: run code that the model brings.

    Raises:
        ConfigError: it cannot be built, or cannot be run on tokens alone.
    """

    def __init__(self, config: Any, trust_remote_code: bool = False) -> None:
        model, looked = _run(config, trust_remote_code)
        self._seen = looked.seen
        self.name = type(model).__name__
        self.n_weights = sum(weight.numel() for weight in model.parameters())
        """Number of its weights, those of a language-model head apart."""
        self.classes = {name: type(module).__name__ for name, module in model.named_modules() if name}
        """Name of each module's class."""
        self.modules = list(self.classes)
        self.tower = text_tower(model)[0]
        """Path of the part that is run on tokens; empty of the whole."""
        self._containers = {name for name, module in model.named_modules() if _is_container(module)}
        self._is_encoder_decoder = is_encoder_decoder(model.config)
        self.block_paths = block_names(model)
        """Paths of the transformer blocks; none where the model has no list of them."""
        places = [site for name in self.modules if POOLER not in name for site in (name + INPUT, name)]
        self.widths = {site: width for site in places if (width := _width(self._seen.get(site, [])))}
        """Width at each site, in the model's order: where modules that run once take or give one vector per
        token."""
        self.same = {site: first for site, first in looked.same.items() if site in self.widths}
        """The site that has the very same tensor, of those that are not the outermost with it."""

    @property
    def blocks(self) -> list[str]:
        """Paths of the transformer blocks.

        Raises:
            ConfigError: the model has no list of them.
        """
        if not self.block_paths:
            why = "has no list of one block per layer"
            if self._is_encoder_decoder:
                why = "is an encoder-decoder model, of which only the encoder is run"
            outer = sorted(filterfalse(is_input, self.widths), key=lambda name: name.count("."))
            raise ConfigError(
                f"{self.name} {why}; name sites by glob instead, with --sites: it has {_some(outer)}"
            )
        return self.block_paths

    def resolve(self, layers: tuple[int, ...], patterns: tuple[str, ...]) -> list[Site]:
        """Resolve layers and globs to sites, in the model's order.

        Args:
            layers: block numbers; negative ones count from the last.
            patterns: globs over module paths and `residual.<layer>`; with `:in` after it, a glob is of what
                those modules take. A list of modules, which has no output of its own, is no match of `*`.

        Raises:
            ConfigError: a layer does not exist, a glob matches nothing, or a module does not give, or
                take, one vector per token.
        """
        names = {self._block(layer) for layer in layers}
        for pattern in patterns:
            names |= self._matches(pattern)
        if bad := sorted(name for name in names if name not in self.widths):
            raise ConfigError(self._no_sites(bad))
        return [Site(name, width) for name, width in self.widths.items() if name in names]

    def _matches(self, pattern: str) -> set[str]:
        """Find the sites that a glob is of, whether they give one vector per token or not."""
        glob = module_of(pattern)
        aliases = {f"residual.{i}": block for i, block in enumerate(self.block_paths)}
        matched = set(fnmatch.filter(self.modules, glob))
        matched |= {aliases[alias] for alias in fnmatch.filter(aliases, glob)}
        if not matched:
            near = nearest(glob, [*self.modules, *aliases])
            if near.startswith("known"):
                near = "`saemill sites MODEL` lists them"
            raise ConfigError(f"no module of {self.name} matches {glob!r}; {near}")
        return {name + pattern.removeprefix(glob) for name in matched - (self._containers - {glob})}

    def _block(self, layer: int) -> str:
        n = len(self.blocks)
        if not -n <= layer < n:
            raise ConfigError(f"layers must be in {-n}..{n - 1} for {self.name}, got {layer}")
        return self.blocks[layer]

    def _no_sites(self, bad: list[str]) -> str:
        """Describe what is wrong with modules that are no sites, and which sites are near."""
        details = "; ".join(f"{name} {self._behaviour(name)}" for name in bad[:3])
        more = f"; and {len(bad) - 3} others" if len(bad) > 3 else ""
        alike = [site for site in self.widths if is_input(site) == is_input(bad[0])]
        near = sorted(alike, key=lambda site: -_n_shared(site, bad[0]))
        if self._is_encoder_decoder:
            more += f". {self.name} is an encoder-decoder model, of which only the encoder is run"
        return (
            f"{', '.join(bad[:3])} does not give one vector per token: {details}{more}; name other sites, "
            f"such as {_some(near, 4)}"
        )

    def _behaviour(self, name: str) -> str:
        match self._seen.get(name, []):
            case []:
                return "never runs on text alone"
            case [seen]:
                what = seen if isinstance(seen, str) else f"{list(seen)} for {SHAPE[0]} rows of {SHAPE[1]}"
                return f"{'takes' if is_input(name) else 'gives'} {what}"
            case all_seen:
                return f"runs {len(all_seen)} times in a pass"


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a model's input."""

    n_ids: int
    """Number of token ids that it can look up."""
    row_length: int | None
    """Most tokens in a row; None: any number."""


def limits_of(config: Any, trust_remote_code: bool = False) -> Limits:
    """Find the limits of a model's input from its transformers config; arguments as of `Architecture`.

    Raises:
        ConfigError: the model cannot be built.
    """
    base = _built(config, trust_remote_code)
    return Limits(n_ids_of(base), longest_row_of(base))


def check_row_length(limits: Limits, name: str, ctx_len: int) -> None:
    """Refuse rows longer than a model accepts.

    Args:
        limits: of the model.
        name: what to call it.
        ctx_len: tokens per row.

    Raises:
        ConfigError: naming both numbers.
    """
    longest = limits.row_length
    if longest is not None and ctx_len > longest:
        raise ConfigError(
            f"rows have {ctx_len} tokens, but {name!r} takes at most {longest}; tokenize with "
            f"--ctx-len {longest}"
        )


def _built(config: Any, trust_remote_code: bool) -> Any:
    """Build the model on the meta device; in bf16, which every kernel of mixture-of-experts models
    accepts."""
    name = getattr(config, "_name_or_path", "") or config.model_type
    n_layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(n_layers, int) and n_layers > MOST_LAYERS:  # their modules alone would fill the memory
        raise ConfigError(f"the config of the model {name!r} is damaged: it says {n_layers:,} layers")
    with loading("model", name), torch.device("meta"):
        model = base_class(config, trust_remote_code).from_config(
            copy.deepcopy(config), dtype=torch.bfloat16, trust_remote_code=trust_remote_code
        )
    return base_of(model.eval())


def _run(config: Any, trust_remote_code: bool) -> "tuple[Any, _Looked]":
    """Build the model and run it over a few tokens. Return it, and what is at each site.

    Some models look for the padding id among the tokens, which have no values on the meta device. Only if
    that fails the padding id is removed.

    Raises:
        ConfigError: the model cannot be run so.
    """
    model = _built(config, trust_remote_code)
    for has_pad in (True, False):
        if not has_pad:
            for module in model.modules():
                if isinstance(module, transformers.PreTrainedModel):
                    module.config.pad_token_id = None
        try:
            return model, _look(model)
        except Exception as error:  # whatever a model's code raises where it lacks what it needs
            last = error
    message = " ".join(str(last).split())[:200]
    raise ConfigError(
        f"{type(model).__name__} cannot be run on token ids alone, before its weights are loaded, to find "
        f"its sites ({type(last).__name__}: {message}). Models of images or sound, and those whose course "
        "depends on the tokens' values, are not supported; choose a language model"
    ) from last


class _Looked(NamedTuple):
    """What a pass over a few tokens showed."""

    seen: dict[str, list[Seen]]
    """What is at each site, one per call."""
    same: dict[str, str]
    """The site that has a site's very tensor: of those within one block the outermost, an output if it can
    be."""


def _look(model: Any) -> _Looked:
    """Run the model over a few tokens."""
    modules = {name: module for name, module in model.named_modules() if name}
    seen: dict[str, list[Seen]] = {}
    tensors: dict[tuple[int, int], tuple[torch.Tensor, list[str]]] = {}

    def see(site: str, x: Any) -> None:
        is_vector = isinstance(x, torch.Tensor) and x.is_floating_point()
        seen.setdefault(site, []).append(tuple(x.shape) if is_vector else f"a {type(x).__name__}")
        if is_vector:  # kept, so that no other tensor gets its id; one that was changed in place is another
            tensors.setdefault((id(x), x._version), (x, []))[1].append(site)

    sites = [site for name in modules for site in (name + INPUT, name)]
    handles = [watch(modules, site, partial(see, site)) for site in sites]
    try:
        with torch.no_grad():
            reader_of(model)(input_ids=torch.zeros(SHAPE, dtype=torch.long, device="meta"))
    finally:
        for handle in handles:
            handle.remove()
    return _Looked(seen, _same([alike for _, alike in tensors.values()]))


def _same(tensors: list[list[str]]) -> dict[str, str]:
    """Name the first of the sites, in each block, with one tensor; see `_Looked`."""
    same: dict[str, str] = {}
    for sites in tensors:
        by_layer: dict[str, list[str]] = {}
        for site in sorted(sites, key=lambda site: (is_input(site), site.count("."))):
            by_layer.setdefault(within_layer(site)[1], []).append(site)
        same |= {site: first for first, *others in by_layer.values() for site in others}
    return same


def within_layer(site: str) -> tuple[str, str]:
    """Return a site's name with * in the place of the first number in it, and that number; empty where there
    is none."""
    match = re.search(r"(?:^|(?<=\.))\d+(?=[.:]|$)", site)
    return (f"{site[: match.start()]}*{site[match.end() :]}", match[0]) if match else (site, "")


def _width(seen: list[Seen]) -> int | None:
    """Return the width of what is at a site, if it is there once and one vector per token."""
    match seen:
        case [(n_rows, n_tokens, int() as width)] if (n_rows, n_tokens) == SHAPE:
            return width
    return None


def _is_container(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict)


def _n_shared(a: str, b: str) -> int:
    """Count the names that two paths share at their beginning."""
    pairs = zip(a.split("."), b.split("."), strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(a.count("."), b.count(".")) + 1)


def _some(names: list[str], n: int = 8) -> str:
    """List the first names, and say how many there are."""
    more = f", … ({len(names)} in all)" if len(names) > n else ""
    return ", ".join(names[:n]) + more if names else "none"

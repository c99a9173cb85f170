"""What a model is made of, found from its config alone: modules, blocks, widths, limits."""

import copy
import fnmatch
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from saemill.common.config import nearest
from saemill.common.errors import ConfigError
from saemill.common.hub import loading
from saemill.common.models.sites import first_output
from saemill.common.models.structure import (
    block_names,
    is_encoder_decoder,
    longest_row_of,
    n_ids_of,
    reader_of,
)
from saemill.common.stores.site_records import Site

SHAPE = (2, 3)
"""Rows and tokens of the forward pass that finds the sites."""

MOST_LAYERS = 10_000
"""Number of layers that no model exceeds."""

Output = tuple[int, ...] | str
"""Shape of a module's output, or its kind if it is no tensor of numbers."""


class Architecture:
    """Module names, output widths and limits of a model, found without its weights.

    The model is built on torch's meta device and run there once on a few tokens.

    Args:
        config: the model's transformers config.

    Raises:
        ConfigError: it cannot be built, or cannot be run on tokens alone.
    """

    def __init__(self, config: Any) -> None:
        model, self._outputs = _run(config)
        self.name = type(model).__name__
        self.modules = [name for name, _ in model.named_modules() if name]
        self._containers = {name for name, module in model.named_modules() if _is_container(module)}
        self._is_encoder_decoder = is_encoder_decoder(model.config)
        self._blocks = block_names(model)
        self.widths = {name: width for name, out in self._outputs.items() if (width := _width(out))}
        """Width of each module's output, for modules that run once and give one vector per token."""

    @property
    def blocks(self) -> list[str]:
        """Paths of the transformer blocks.

        Raises:
            ConfigError: the model has no list of them.
        """
        if not self._blocks:
            why = "has no list of one block per layer"
            if self._is_encoder_decoder:
                why = "is an encoder-decoder model, of which only the encoder is run"
            outer = sorted(self.widths, key=lambda name: name.count("."))
            raise ConfigError(
                f"{self.name} {why}; name sites by glob instead, with --sites: it has {_some(outer)}"
            )
        return self._blocks

    def resolve(self, layers: tuple[int, ...], patterns: tuple[str, ...]) -> list[Site]:
        """Resolve layers and globs to sites, in the model's order.

        Args:
            layers: block numbers; negative ones count from the last.
            patterns: globs over module paths and `residual.<layer>`. A list of modules, which has no
                output of its own, is no match of `*`.

        Raises:
            ConfigError: a layer does not exist, a glob matches nothing, or a module does not give
                one vector per token.
        """
        names = {self._block(layer) for layer in layers}
        aliases = {f"residual.{i}": block for i, block in enumerate(self._blocks)}
        for pattern in patterns:
            matched = set(fnmatch.filter(self.modules, pattern))
            matched |= {aliases[alias] for alias in fnmatch.filter(aliases, pattern)}
            if not matched:
                known = [*self.modules, *aliases]
                raise ConfigError(f"no module of {self.name} matches {pattern!r}; {nearest(pattern, known)}")
            names |= matched - (self._containers - {pattern})
        if bad := sorted(name for name in names if name not in self.widths):
            raise ConfigError(self._no_sites(bad))
        return [Site(name, self.widths[name]) for name in self.modules if name in names]

    def _block(self, layer: int) -> str:
        n = len(self.blocks)
        if not -n <= layer < n:
            raise ConfigError(f"layers must be in {-n}..{n - 1} for {self.name}, got {layer}")
        return self.blocks[layer]

    def _no_sites(self, bad: list[str]) -> str:
        """Describe what is wrong with modules that are no sites, and which sites are near."""
        details = "; ".join(f"{name} {self._behaviour(name)}" for name in bad[:3])
        more = f"; and {len(bad) - 3} others" if len(bad) > 3 else ""
        near = sorted(self.widths, key=lambda site: -_n_shared(site, bad[0]))
        if self._is_encoder_decoder:
            more += f". {self.name} is an encoder-decoder model, of which only the encoder is run"
        return (
            f"{', '.join(bad[:3])} does not give one vector per token: {details}{more}; name other modules, "
            f"such as {_some(near, 4)}"
        )

    def _behaviour(self, name: str) -> str:
        match self._outputs.get(name, []):
            case []:
                return "never runs on text alone"
            case [output]:
                what = (
                    output if isinstance(output, str) else f"{list(output)} for {SHAPE[0]} rows of {SHAPE[1]}"
                )
                return f"gives {what}"
            case outputs:
                return f"runs {len(outputs)} times in a pass"


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a model's input."""

    n_ids: int
    """Number of token ids that it can look up."""
    row_length: int | None
    """Most tokens in a row; None: any number."""


def limits_of(config: Any) -> Limits:
    """Find the limits of a model's input from its transformers config.

    Raises:
        ConfigError: the model cannot be built.
    """
    base = _built(config)
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


def _built(config: Any) -> Any:
    """Build the model on the meta device; in bf16, which every kernel of mixture-of-experts models
    accepts."""
    name = getattr(config, "_name_or_path", "") or config.model_type
    n_layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(n_layers, int) and n_layers > MOST_LAYERS:  # their modules alone would fill the memory
        raise ConfigError(f"the config of the model {name!r} is damaged: it says {n_layers:,} layers")
    with loading("model", name), torch.device("meta"):
        return transformers.AutoModel.from_config(
            copy.deepcopy(config), dtype=torch.bfloat16, trust_remote_code=False
        ).eval()


def _run(config: Any) -> tuple[Any, dict[str, list[Output]]]:
    """Build the model and run it over a few tokens. Return it, and each module's outputs, one per call.

    Some models look for the padding id among the tokens, which have no values on the meta device. Only if
    that fails the padding id is removed.

    Raises:
        ConfigError: the model cannot be run so.
    """
    model = _built(config)
    for has_pad in (True, False):
        if not has_pad:
            for module in model.modules():
                if isinstance(module, transformers.PreTrainedModel):
                    module.config.pad_token_id = None
        try:
            return model, _outputs(model)
        except Exception as error:  # whatever a model's code raises where it lacks what it needs
            last = error
    message = " ".join(str(last).split())[:200]
    raise ConfigError(
        f"{type(model).__name__} cannot be run on token ids alone, before its weights are loaded, to find "
        f"its sites ({type(last).__name__}: {message}). Models of images or sound, and those whose course "
        "depends on the tokens' values, are not supported; choose a language model"
    ) from last


def _outputs(model: Any) -> dict[str, list[Output]]:
    """Run the model over a few tokens. Return each module's outputs, one per call."""
    outputs: dict[str, list[Output]] = {}
    handles = []

    def record(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            first = first_output(output)
            is_vector = isinstance(first, torch.Tensor) and first.is_floating_point()
            outputs.setdefault(name, []).append(
                tuple(first.shape) if is_vector else f"a {type(first).__name__}"
            )

        return hook

    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_hook(record(name)))
    try:
        with torch.no_grad():
            reader_of(model)(input_ids=torch.zeros(SHAPE, dtype=torch.long, device="meta"))
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _width(outputs: list[Output]) -> int | None:
    """Return the width of a module's output, if it runs once and gives one vector per token."""
    match outputs:
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

"""Sites: the places in a transformer whose activations are cached, named by module path.

The name is the module's path in the base model (without LM head): `layers.4` is the residual stream
after block 4 of GPT-NeoX or Llama, `h.4` of GPT-2, `encoder.layer.4` of BERT; `layers.4.mlp` is the
output of its MLP. `residual.4` may be written for the residual stream after block 4 in any model.
"""

import copy
import fnmatch
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from saemill.common.config import nearest
from saemill.common.errors import ConfigError
from saemill.common.hub import loading


@dataclass(frozen=True, slots=True)
class Site:
    """A place in the model."""

    name: str
    """Module path in the base model."""
    width: int
    """D, the length of one activation vector there."""


def load_model_config(name: str, revision: str | None) -> Any:
    """The transformers config of a model by hub id or local folder.

    Raises:
        ConfigError: it cannot be found.
    """
    with loading("model", name):
        return transformers.AutoConfig.from_pretrained(name, revision=revision)


class Architecture:
    """Module names and output widths of a model, found without its weights.

    The model is built on torch's meta device and run there once on a few tokens; in bf16, the type
    that every kernel of mixture-of-experts models takes, and without a padding id, whose search
    would need the tokens' values.

    Args:
        config: the model's transformers config.
    """

    def __init__(self, config: Any) -> None:
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(copy.deepcopy(config), dtype=torch.bfloat16)
        model.config.pad_token_id = None
        self.name = type(model).__name__
        self.modules = [name for name, _ in model.named_modules() if name]
        self._blocks = block_names(model)
        self.widths = _output_widths(model)

    @property
    def blocks(self) -> list[str]:
        """Paths of the transformer blocks.

        Raises:
            ConfigError: the model has no list of them.
        """
        if not self._blocks:
            raise ConfigError(f"{self.name} has no list of one block per layer; name sites by glob instead")
        return self._blocks

    def resolve(self, layers: tuple[int, ...], patterns: tuple[str, ...]) -> list[Site]:
        """The sites that layers and globs name, in the model's order.

        Args:
            layers: block numbers; negative ones count from the last.
            patterns: globs over module paths and `residual.<layer>`.

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
            names |= matched
        bad = sorted(name for name in names if name not in self.widths)
        if bad:
            raise ConfigError(
                f"{', '.join(bad[:5])} does not give one vector per token: its output has another shape, "
                "or it runs more than once or never; name another module"
            )
        return [Site(name, self.widths[name]) for name in self.modules if name in names]

    def _block(self, layer: int) -> str:
        n = len(self.blocks)
        if not -n <= layer < n:
            raise ConfigError(f"layers must be in {-n}..{n - 1} for {self.name}, got {layer}")
        return self.blocks[layer]


def block_names(model: Any) -> list[str]:
    """Paths of the transformer blocks: the outermost ModuleList with one member per hidden layer.

    Models whose layers share one module have no such list; the answer is empty then.
    """
    n_layers = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == n_layers:
            return [f"{name}.{i}" for i in range(n_layers)]
    return []


def first_output(output: Any) -> Any:
    """A module's activation: its output, or the first part of an output with several."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def replacing(module: torch.nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While the block runs, the module's activation x is replaced by `change(x)`; the rest of an output
    with several parts stays."""

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        changed = change(first_output(output))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _output_widths(model: Any) -> dict[str, int]:
    """Width of each module's output, for modules that run once and give one vector per token."""
    widths: dict[str, int] = {}
    calls: Counter[str] = Counter()
    handles = []
    shape = (2, 3)

    def record(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            calls[name] += 1
            first = first_output(output)
            if isinstance(first, torch.Tensor) and first.is_floating_point() and first.dim() == 3:
                if tuple(first.shape[:2]) == shape:
                    widths[name] = first.shape[2]

        return hook

    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_hook(record(name)))
    with torch.no_grad():
        model(input_ids=torch.zeros(shape, dtype=torch.long, device="meta"))
    for handle in handles:
        handle.remove()
    return {name: width for name, width in widths.items() if calls[name] == 1}

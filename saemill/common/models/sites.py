"""Sites: the places in a transformer whose activations are cached, named by module path.

The name is the module's path in the base model (without LM head): `layers.4` is the residual stream
after block 4 of GPT-NeoX or Llama, `h.4` of GPT-2, `encoder.layer.4` of BERT; `layers.4.mlp` is the
output of its MLP. `residual.4` may be written for the residual stream after block 4 in any model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor

from saemill.common.hub import loading


def load_model_config(name: str, revision: str | None) -> Any:
    """Load the transformers config of a model by hub id or local folder.

    Raises:
        ConfigError: it cannot be found.
    """
    with loading("model", name):
        return transformers.AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)


def first_output(output: Any) -> Any:
    """Return a module's activation: its output, or the first item of an output with several."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def replacing(module: torch.nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the module's activation x by `change(x)` while the block runs; the other items of an output
    with several stay."""

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        changed = change(first_output(output))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()

"""Sites: the places in a transformer whose activations are cached, named by module path.

The name is the module's path in the base model (without LM head): `layers.4` is the residual stream
after block 4 of GPT-NeoX or Llama, `h.4` of GPT-2, `encoder.layer.4` of BERT; `layers.4.mlp` is the
output of its MLP. `residual.4` may be written for the residual stream after block 4 in any model.

`layers.4.mlp:in` is what the MLP takes: its first argument, or the one called hidden_states.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from saemill.common.hub import loading
from saemill.common.stores.site_names import is_input, module_of


def load_model_config(name: str, revision: str | None, trust_remote_code: bool = False) -> Any:
    """Load the transformers config of a model by hub id or local folder.

    Args:
        name: hub id or local folder.
        revision: the hub's revision.
        trust_remote_code: run code that the model brings.

    Raises:
        ConfigError: it cannot be found, or brings code that may not be run.
    """
    with loading("model", name):
        return transformers.AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )


def first_output(output: Any) -> Any:
    """Return a module's activation: its output, or the first item of an output with several."""
    return output[0] if isinstance(output, tuple) else output


def first_input(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """Return what a module takes: its first positional argument, or the one called hidden_states."""
    return arguments[0] if arguments else named.get("hidden_states")


def watch(modules: Mapping[str, torch.nn.Module], site: str, see: Callable[[Any], None]) -> RemovableHandle:
    """Have `see` called with what is at a site whenever a model comes to it, until the handle is removed.

    Args:
        modules: of the base model, by path.
        site: its name.
        see: what is called; it changes nothing.
    """
    module = modules[module_of(site)]
    if is_input(site):
        return module.register_forward_pre_hook(
            lambda _module, arguments, named: see(first_input(arguments, named)), with_kwargs=True
        )
    return module.register_forward_hook(lambda _module, _inputs, output: see(first_output(output)))


@contextmanager
def replacing(
    modules: Mapping[str, torch.nn.Module], site: str, change: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Replace the activation x at a site by `change(x)` while the block runs; other arguments of the module,
    or other items of an output with several, stay.

    Args:
        modules: of the base model, by path.
        site: its name.
        change: what makes the new activation.
    """
    module = modules[module_of(site)]
    handle = (
        module.register_forward_pre_hook(_before(change), with_kwargs=True)
        if is_input(site)
        else module.register_forward_hook(_after(change))
    )
    try:
        yield
    finally:
        handle.remove()


def _before(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(_module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        changed = change(first_input(arguments, named))
        return ((changed, *arguments[1:]), named) if arguments else ((), named | {"hidden_states": changed})

    return hook


def _after(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        changed = change(first_output(output))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook

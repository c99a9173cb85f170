"""The forward pass that a splice is in: what the model was called with, and which positions are spliced."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saemill.common.errors import ConfigError

Where = Callable[[Tensor, Tensor], Tensor]
"""Function that chooses positions: token ids and positions, int64 [B, S] → bool [B, S]. A position counts the
tokens before, in the cache too, without padding; that of padding is -1."""


class ForwardPass:
    """The arguments of the latest call of a model, its head or its base.

    Args:
        where: positions to splice, as `splice` takes them.
        forget: called when a pass begins.
    """

    def __init__(self, where: Where | Tensor, forget: Callable[[], None]) -> None:
        self._where, self._forget = where, forget
        self._arguments: dict[str, Any] = {}
        self._depth = 0
        """Number of calls that have begun and not ended: a head calls its base."""

    def begin(self, arguments: dict[str, Any]) -> None:
        """Note that a forward pass begins, or that the head calls its base model.

        The outermost call's arguments count: not every head passes the attention mask on (RWKV's does not).
        """
        named = {name: value for name, value in arguments.items() if value is not None}
        if self._depth == 0:
            self._arguments = {}
            self._forget()
        self._arguments = named | self._arguments
        self._depth += 1

    def end(self, *_: Any) -> None:
        """Note that a call is over, also by an error."""
        self._depth = max(0, self._depth - 1)

    def check(self, x: Any, site: str, width: int, device: torch.device) -> None:
        """Refuse an activation that the SAE is not made for."""
        inputs = self._arguments.get("input_ids", self._arguments.get("inputs_embeds"))
        if inputs is None:
            raise ConfigError("call the model as a whole, with input_ids or inputs_embeds, not a part of it")
        shape = inputs.shape[:2]
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() != 3 or x.shape[:2] != shape:
            raise ConfigError(f"{site} does not give one vector per token; name another module")
        if x.shape[-1] != width:
            raise ConfigError(
                f"the SAE takes activations of width {width}, but those at {site} have {x.shape[-1]}; "
                "it belongs to another site or model"
            )
        if x.device != device:
            raise ConfigError(
                f"the SAE is on {device}, the model on {x.device}; move it: sae.to({str(x.device)!r})"
            )

    def positions(self, x_BSD: Tensor) -> Tensor:
        """Choose the positions to splice. bool [B, S]."""
        position_BS = count_before(self._arguments, x_BSD)
        if isinstance(self._where, Tensor):
            where_BS = self._where.to(x_BSD.device)
        else:
            ids_BS = self._arguments.get("input_ids")
            if ids_BS is None:
                raise ConfigError(
                    "the model was called without input_ids, which tell the positions to splice; "
                    "say where as a bool tensor"
                )
            where_BS = self._where(ids_BS.to(x_BSD.device), position_BS)
        if where_BS.shape != position_BS.shape or where_BS.dtype != torch.bool:
            raise ConfigError(
                f"where must be bool {tuple(position_BS.shape)}, as the forward pass is, "
                f"got {where_BS.dtype} {tuple(where_BS.shape)}; for passes of several shapes, as in "
                "generate, give a function"
            )
        return where_BS & (position_BS >= 0)


def count_before(arguments: dict[str, Any], x_BSD: Tensor) -> Tensor:
    """Count the tokens before each one, padding left out; -1 for padding. int64 [B, S].

    Args:
        arguments: what the base model was called with.
        x_BSD: an activation of that pass.

    Raises:
        ConfigError: the model keeps a cache without a known length.
    """
    n_rows, n_positions = x_BSD.shape[:2]
    attention, position_ids = arguments.get("attention_mask"), arguments.get("position_ids")
    if isinstance(attention, Tensor) and attention.dim() == 2:
        attended = attention.to(x_BSD.device) > 0
        position_BS = (attended.long().cumsum(1) - 1).masked_fill(~attended, -1)
        return position_BS[:, -n_positions:]
    if isinstance(position_ids, Tensor) and position_ids.dim() == 2:
        return position_ids.to(x_BSD.device).expand(n_rows, -1)
    if arguments.get("cache_params") is not None:
        raise ConfigError(
            "the model's cache does not tell how many tokens it holds, and so neither the positions; "
            "run it with use_cache=False"
        )
    cache = arguments.get("past_key_values")
    n_before = int(cache.get_seq_length()) if cache is not None else 0
    return torch.arange(n_before, n_before + n_positions, device=x_BSD.device).expand(n_rows, -1)


def by_name(
    signature: inspect.Signature, arguments: tuple[Any, ...], named: dict[str, Any]
) -> dict[str, Any]:
    """Bind the arguments of a call to their names, those that its signature does not name included."""
    bound = signature.bind_partial(*arguments, **named).arguments
    rest = [name for name, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD]
    return bound | (bound.pop(rest[0], {}) if rest else {})

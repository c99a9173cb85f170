"""Edits of latents: what `splice` does to the codes before they are decoded.

An edit is any function of `Encoded` that returns one, with more or fewer slots per token if it likes; the
ones here are those that studies of features are made of. Values are in the latents' own units.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from saemill.common.errors import ConfigError
from saemill.common.sae.sae import Encoded


@dataclass(frozen=True, slots=True)
class LatentEdit:
    """An edit that names the latents it changes, so that `splice` can refuse those an SAE lacks."""

    latents: tuple[int, ...]
    change: Callable[[Encoded], Encoded]

    def __call__(self, codes: Encoded) -> Encoded:
        """Return the codes after the edit."""
        return self.change(codes)


def ablate(*latents: int) -> LatentEdit:
    """Set latents to 0 wherever they fire.

    Raises:
        ConfigError: none is named.
    """
    if not latents:
        raise ConfigError("ablate() has no effect without latents; name one or more: ablate(12, 40)")
    numbers = tuple(operator.index(latent) for latent in latents)

    def change(codes: Encoded) -> Encoded:
        hit = torch.isin(codes.top_indices, torch.tensor(numbers, device=codes.top_indices.device))
        return Encoded(codes.top_acts.masked_fill(hit, 0), codes.top_indices)

    return LatentEdit(numbers, change)


def scale(latent: int, factor: float) -> LatentEdit:
    """Multiply a latent wherever it fires."""
    number = operator.index(latent)

    def change(codes: Encoded) -> Encoded:
        factors = torch.where(codes.top_indices == number, factor, 1.0)
        return Encoded(codes.top_acts * factors.to(codes.top_acts.dtype), codes.top_indices)

    return LatentEdit((number,), change)


def clamp(latent: int, value: float) -> LatentEdit:
    """Set a latent to `value` at every position, where it does not fire too."""
    number = operator.index(latent)
    off = ablate(number)
    return LatentEdit((number,), lambda codes: _with_slot(off(codes), number, value))


def steer(latent: int, amount: float) -> LatentEdit:
    """Add `amount` to a latent at every position: with the error kept, amount · W_dec[latent] to x."""
    number = operator.index(latent)
    return LatentEdit((number,), lambda codes: _with_slot(codes, number, amount))


def _with_slot(codes: Encoded, latent: int, value: float) -> Encoded:
    """Append one slot per token. [..., k] → [..., k + 1]."""

    def appended(values: Tensor, last: float) -> Tensor:
        return torch.cat([values, torch.full_like(values[..., :1], last)], -1)

    return Encoded(appended(codes.top_acts, value), appended(codes.top_indices, latent))

"""Rounding to a float type, the one lossy act of a store of floats; `forms.int8` has that of codes.

bf16 keeps fp32's range and 8 bits of a value. fp16 keeps 11 bits and ends at 65,504: what is beyond becomes
infinite, so the caller of a rounding function looks with `not_finite` afterwards and refuses such values.
"""

import torch
from torch import Tensor


def round_into(stored: Tensor, x: Tensor) -> None:
    """Write values where they are stored, each rounded to the nearest of the stored type, ties to even.

    Args:
        stored: bf16, fp16 or fp32, on the CPU.
        x: the values, of the same shape, of any type and on any device.
    """
    stored.copy_(x)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round values as `round_into` does, in memory of their own if the type differs."""
    return x.to(dtype)


def not_finite(x: Tensor) -> Tensor | None:
    """Find values that are NaN or infinite, as those beyond the stored type are. bool of x's shape, or None
    if none is."""
    finite = torch.isfinite(x)
    return None if bool(finite.all()) else ~finite


def largest(dtype: torch.dtype) -> float:
    """Return the largest value of a type."""
    return torch.finfo(dtype).max

"""Rounding to a float type, the one lossy act of a store of floats; `forms.int8` has that of codes.

bf16 keeps fp32's range and 8 bits of a value. fp16 keeps 11 bits and ends at 65,504: what is beyond becomes
infinite, so the caller of a rounding function looks with `not_finite` afterwards and refuses such values.
"""

import torch
from torch import Tensor

EXPONENTS = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}
"""The integer type that a type's bits are read as, and its exponent's bits: all set in NaN and infinity."""
CHUNK = 2**17
"""Number of values that are looked at together: they stay in a core's cache."""


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
    return None if _is_finite(x) else ~torch.isfinite(x)


def _is_finite(x: Tensor) -> bool:
    """Tell whether all values are finite, by their exponents: on bf16 much faster than `torch.isfinite`."""
    bits_type, exponent = EXPONENTS[x.dtype]
    bits = x.contiguous().view(-1).view(bits_type).numpy()
    chunks = (bits[start : start + CHUNK] for start in range(0, len(bits), CHUNK))
    return all(int((chunk & exponent).max()) < exponent for chunk in chunks)


def largest(dtype: torch.dtype) -> float:
    """Return the largest value of a type."""
    return torch.finfo(dtype).max

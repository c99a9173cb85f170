"""What all loops share: how they are compiled, and bfloat16 as numba sees it."""

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload
from torch import Tensor

COMPILED: dict[str, Any] = {
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},  # not nnan: a NaN must stay one
    "error_model": "numpy",
    "nogil": True,
    "cache": True,
}


@intrinsic
def float_of(context, bits):
    """Convert a uint32 to the float32 with the same bits."""
    return types.float32(types.uint32), lambda _c, builder, _s, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def bits_of(context, number):
    """Convert a float32 to the uint32 with the same bits."""
    return types.uint32(types.float32), lambda _c, builder, _s, args: builder.bitcast(args[0], ir.IntType(32))


def wide(number):
    """Convert an entry of a row, float32 or the bits of a bfloat16, to float32."""


@overload(wide, inline="always")
def _wide(number):
    if number == types.uint16:
        return lambda number: float_of(np.uint32(number) << np.uint32(16))
    return lambda number: number


def put(row, place, number):
    """Store a float32 in a row, rounded to the nearest (ties to even) where it is bfloat16."""


@overload(put, inline="always")
def _put(row, place, number):
    if row.dtype == types.uint16:

        def rounded(row, place, number):
            bits = bits_of(number)
            odd = (bits >> np.uint32(16)) & np.uint32(1)
            near = np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
            row[place] = near if number == number else np.uint16(0x7FC0)

        return rounded

    def stored(row, place, number):
        row[place] = number

    return stored


def rank(number, signed):
    """Return what numbers are ranked by: themselves, or with `signed` True their absolute values. None is
    another type than True, so that loops are compiled for each."""


@overload(rank, inline="always")
def _rank(number, signed):
    if signed == types.none:
        return lambda number, signed: number
    return lambda number, signed: abs(number)


@njit(**COMPILED)
def largest(numbers, n):
    """Find the largest of the first n float32, 0 at least. It compares their bits: only maxima of integers
    are vectorised."""
    most = np.int32(0)
    for i in range(n):
        most = max(most, np.int32(bits_of(numbers[i])))
    return float_of(np.uint32(most))


@njit(**COMPILED)
def magnitude(row):
    """Find the largest magnitude of a float32 row."""
    most = np.int32(0)
    for i in range(len(row)):
        most = max(most, np.int32(bits_of(row[i]) & np.uint32(0x7FFFFFFF)))
    return float_of(np.uint32(most))


@njit(**COMPILED)
def dot(a, b):
    """Compute ⟨a, b⟩ in float32."""
    total = np.float32(0)
    for i in range(len(a)):
        total += wide(a[i]) * wide(b[i])
    return total


def array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """View the tensor's memory as an array for a loop; bfloat16 as its bits. Loops read rows without gaps."""
    if not tensor.is_contiguous():
        raise ValueError(f"a loop needs a tensor without gaps, got strides {tensor.stride()}")
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()

"""Rows rotated and rounded to 8 bits, and how far a product of two may be off.

A row is multiplied by random signs and passed through butterflies, (a, b) → (a + b, a − b)/√2, which mix
2^ROUNDS entries into each: an orthogonal map, the same for all rows, so that products stay. It spreads
outliers over many entries (QuaRot, Ashkboos et al. 2024), which makes the largest one, and so the step of
the rounding, small. Each rounding error is then spread evenly over its step and independent of the others,
so ⟨x, w⟩ is off by a sum of many: normal, with

    σ² = (step_x² ‖w‖² + step_w² ‖x‖²) / 12.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from saemill.train.loops.numbers import COMPILED, REORDERED, array, dot, wide

ROUNDS = 8
"""Passes of butterflies, an even number."""
LEVELS = 127
COLUMNS = 64
"""Quantised rows are padded with zeros to a multiple of it."""


class Quantised(NamedTuple):
    """Rows as value ≈ step · code, in rotated coordinates."""

    codes_ND: Tensor
    """int8; D rounded up."""
    step_N: Tensor
    """float32."""
    norm_N: Tensor
    """float32: the rows' lengths; not finite where a row is not."""

    def rows(self, part: slice) -> "Quantised":
        """Some of the rows."""
        return Quantised(*(of_rows[part] for of_rows in self))

    def take(self, rows_ND: Tensor) -> None:
        """Quantise as many rows, float32 or bfloat16, into this memory."""
        _quantise(array(rows_ND), _signs(rows_ND.shape[1]), *(array(of_rows) for of_rows in self))


def empty(n_rows: int, d: int) -> Quantised:
    """Memory for quantised rows of length d."""
    padded = -(-d // COLUMNS) * COLUMNS
    return Quantised(torch.zeros(n_rows, padded, dtype=torch.int8), torch.zeros(n_rows), torch.zeros(n_rows))


def quantise(rows_ND: Tensor) -> Quantised:
    """Rows, float32 or bfloat16, rotated and rounded."""
    made = empty(*rows_ND.shape)
    made.take(rows_ND)
    return made


@lru_cache
def _signs(d: int) -> np.ndarray[Any, Any]:
    """The signs of the rotation with its scale, the same in every run."""
    signs = np.random.default_rng(0).integers(0, 2, d) * 2 - 1
    return (signs * 2 ** (-ROUNDS / 2)).astype(np.float32)


@njit(**COMPILED)
def _quantise(rows, signs, codes, steps, norms):
    n_rows, d = rows.shape
    row, other = np.zeros(codes.shape[1], np.float32), np.zeros(codes.shape[1], np.float32)
    for n in range(n_rows):
        row[d:] = 0
        for i in range(d):
            row[i] = wide(rows[n, i]) * signs[i]
        for _ in range(ROUNDS // 2):
            _butterflies(row, other)
            _butterflies(other, row)
        most = _magnitude(row)
        steps[n] = most / np.float32(LEVELS)
        norms[n] = np.sqrt(dot(row, row))
        inverse = np.float32(LEVELS) / most if most > 0 else np.float32(0)
        for i in range(len(row)):
            codes[n, i] = np.int8(np.rint(row[i] * inverse))


@njit(**REORDERED)
def _magnitude(row):
    """The largest magnitude of a row."""
    most = np.float32(0)
    for i in range(len(row)):
        most = max(most, abs(row[i]))
    return most


@njit(**COMPILED)
def _butterflies(row, out):
    """Neighbours' sums into the first half, their differences into the second."""
    half = len(row) // 2
    for i in range(half):
        a, b = row[2 * i], row[2 * i + 1]
        out[i] = a + b
        out[half + i] = a - b

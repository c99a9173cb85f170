"""Rows rotated and rounded to 8 bits, and how far a product of two may be off.

A row is multiplied by random signs and passed through butterflies, (a, b) → (a cos φ + b sin φ, a sin φ −
b cos φ), until each entry is mixed into all: an orthogonal map, the same for all rows, so that products
stay. It spreads outliers over many entries (QuaRot, Ashkboos et al. 2024), which makes the largest one, and
so the step of the rounding, small. The angles lie around 45° at random, so that a row with few entries does
not become one with few magnitudes, whose errors would repeat. Each rounding error is then spread evenly over
its step and nearly independent of the others, so ⟨x, w⟩ is off by a sum of many: normal, with

    σ² = (step_x² ‖w‖² + step_w² ‖x‖²) / 12.

Rows need many columns for that: `LEAST_COLUMNS`.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from saemill.common.loops.numbers import COMPILED, array, dot, magnitude, wide
from saemill.train.memory import zeros

LEAST_COLUMNS = 256
"""Shorter rows are not to be quantised: their errors are sums of few."""
SPREAD = 0.1
"""Spread of the angles, in radians, to both sides."""
TINY = 1e-30
"""Rows without a larger entry count as 0."""
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

    def rows(self, some: slice) -> "Quantised":
        """Select some of the rows."""
        return Quantised(*(per_row[some] for per_row in self))

    def fill(self, rows_ND: Tensor) -> None:
        """Quantise as many rows, float32 or bfloat16, into this memory."""
        rotation = _rotation(rows_ND.shape[1], self.codes_ND.shape[1])
        _quantise(array(rows_ND), *rotation, *(array(per_row) for per_row in self))


def empty(n_rows: int, d: int) -> Quantised:
    """Make memory for quantised rows of length d."""
    padded = -(-d // COLUMNS) * COLUMNS
    return Quantised(zeros(n_rows, padded, dtype=torch.int8), torch.zeros(n_rows), torch.zeros(n_rows))


def quantise(rows_ND: Tensor) -> Quantised:
    """Rotate and round rows, float32 or bfloat16."""
    made = empty(*rows_ND.shape)
    made.fill(rows_ND)
    return made


@lru_cache
def _rotation(d: int, padded: int) -> tuple[np.ndarray[Any, Any], ...]:
    """Draw the signs [d], and the butterflies' cosines and sines [passes, padded / 2]; the same in every
    run."""
    random = np.random.default_rng(0)
    signs = random.integers(0, 2, d) * 2 - 1
    n_passes = 2 * (padded.bit_length() // 2 + 1)
    angles = np.pi / 4 + SPREAD * random.uniform(-1, 1, (n_passes, padded // 2))
    return tuple(table.astype(np.float32) for table in (signs, np.cos(angles), np.sin(angles)))


@njit(**COMPILED)
def _quantise(rows, signs, cosines, sines, codes, steps, norms):
    n_rows, d = rows.shape
    row, other = np.zeros(codes.shape[1], np.float32), np.zeros(codes.shape[1], np.float32)
    for n in range(n_rows):
        row[d:] = 0
        for i in range(d):
            row[i] = wide(rows[n, i]) * signs[i]
        for r in range(0, len(cosines), 2):
            _butterflies(row, cosines[r], sines[r], other)
            _butterflies(other, cosines[r + 1], sines[r + 1], row)
        most = magnitude(row)
        inverse = np.float32(LEVELS) / most if most > TINY else np.float32(0)
        steps[n] = most / np.float32(LEVELS) if most > TINY else np.float32(0)
        norms[n] = np.sqrt(dot(row, row))
        for i in range(len(row)):
            codes[n, i] = np.int8(np.rint(row[i] * inverse))


@njit(**COMPILED)
def _butterflies(row, cosines, sines, out):
    """Write neighbours' sums into the first half, their differences into the second."""
    half = len(row) // 2
    for i in range(half):
        a, b = row[2 * i], row[2 * i + 1]
        out[i] = cosines[i] * a + sines[i] * b
        out[half + i] = sines[i] * a - cosines[i] * b

"""AuxK's activations and the gradients of its pre-activations: those that stay, in place, among zeros."""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from saemill.common.loops.kth import ALL_BITS, BFLOAT16_BITS, count, kth
from saemill.common.loops.numbers import COMPILED, array, put, wide
from saemill.train.backends.base import chunks
from saemill.train.backends.cpu.threads import each

PIECE_BYTES = 1 << 20
"""Bytes of the rows that a thread works on at a time."""
PIECE_COLUMNS = 512
"""Columns that a thread works on at a time, where sums run over rows."""


def keep_largest(pre_TS: Tensor, k: int) -> Tensor:
    """Rectify the k largest entries of each row, as `Sparse.keep_largest`, in place; of equal entries the
    first stay.

    Args:
        pre_TS: float32 or bfloat16.
    """
    rows, mask = array(pre_TS), BFLOAT16_BITS if pre_TS.dtype == torch.bfloat16 else ALL_BITS
    pieces = list(chunks(len(rows), max(1, rows[:1].nbytes), PIECE_BYTES))
    each(pieces, lambda piece, _: _keep_largest(rows[piece], k, mask))
    return pre_TS


@njit(**COMPILED)
def _keep_largest(rows, k, mask):
    n = rows.shape[1]
    numbers = np.empty(n, np.float32)
    for t in range(len(rows)):
        row = rows[t]
        for s in range(n):
            numbers[s] = max(wide(row[s]), np.float32(0))
        low, high = kth(numbers, n, k, mask)
        last = n
        if count(numbers, n, low) > k:
            last = _last_of_ties(numbers, k - count(numbers, n, high), low, high) + 1
        _store(row[:last], numbers[:last], low)
        _store(row[last:], numbers[last:], high)


def keep_active(dpre_TS: Tensor, acts_TS: Tensor) -> Tensor:
    """Set the gradients of inactive latents to 0, as `Sparse.keep_active`."""
    sums_S = torch.zeros(dpre_TS.shape[1])
    dpre, acts, sums = array(dpre_TS), array(acts_TS), array(sums_S)
    pieces = list(chunks(len(sums), 1, PIECE_COLUMNS))
    each(pieces, lambda piece, _: _keep_active(dpre, acts, sums, piece.start, piece.stop))
    return sums_S


@njit(**COMPILED)
def _keep_active(dpre, acts, sums, first, last):
    for t in range(len(dpre)):
        row, act, total = dpre[t, first:last], acts[t, first:last], sums[first:last]
        for s in range(len(row)):
            gradient = wide(row[s]) if wide(act[s]) != 0 else np.float32(0)
            put(row, s, gradient)
            total[s] += gradient


@njit(**COMPILED)
def _store(row, numbers, least):
    """Store numbers of no less than a bound, and zeros in place of the others."""
    for s in range(len(row)):
        put(row, s, numbers[s] if numbers[s] >= least else np.float32(0))


@njit(**COMPILED)
def _last_of_ties(numbers, n_kept, low, high):
    """Find the place up to which the numbers between two bounds are kept."""
    for s in range(len(numbers)):
        if low <= numbers[s] < high:
            n_kept -= 1
            if n_kept <= 0:
                return s
    return -1

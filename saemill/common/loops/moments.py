"""Sums over rows, in float64 and one pass each, of rows of any float type without a copy of them.

Torch's operations convert the rows first, and then read and write them once for every step: of all that
caching does to an activation that took two thirds. Rows and dimensions are summed in an order of the
compiler's choice, which shows in the last bits of a float64 alone.
"""

from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from saemill.common.loops.numbers import COMPILED, array, wide


def squared_norms(x_TD: Tensor) -> NDArray[np.float64]:
    """Compute the squared Euclidean norm of each row. float64 [T]."""
    squares_T = np.empty(len(x_TD))
    _squared_norms(_rows(x_TD), squares_T)
    return squares_T


def mean(x_TD: Tensor) -> NDArray[np.float64]:
    """Compute the mean of some rows, one at least. float64 [D]."""
    sum_D = np.zeros(x_TD.shape[1])
    _add_rows(_rows(x_TD), sum_D)
    return sum_D / len(x_TD)


def deviations(x_TD: Tensor, mean_D: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute squared deviations from `mean_D`.

    Returns: their sums over rows, float64 [D], and over dimensions, float64 [T].
    """
    squares_D, squares_T = np.zeros(len(mean_D)), np.empty(len(x_TD))
    _add_deviations(_rows(x_TD), mean_D, squares_D, squares_T)
    return squares_D, squares_T


def _rows(x_TD: Tensor) -> np.ndarray[Any, Any]:
    """View rows as an array for a loop; float16, which no loop knows, as float32."""
    x_TD = x_TD.cpu().contiguous()
    return array(x_TD.float() if x_TD.dtype == torch.float16 else x_TD)


@njit(**COMPILED)
def _squared_norms(x, squares):
    for row in range(len(x)):
        x_row, square = x[row], 0.0
        for d in range(len(x_row)):
            number = np.float64(wide(x_row[d]))
            square += number * number
        squares[row] = square


@njit(**COMPILED)
def _add_rows(x, sums):
    last = len(x) // 4 * 4
    for row in range(0, last, 4):  # four at a time: with one, a sum is read and written for each
        a, b, c, e = x[row], x[row + 1], x[row + 2], x[row + 3]
        for d in range(len(sums)):
            low = np.float64(wide(a[d])) + np.float64(wide(b[d]))
            sums[d] += low + (np.float64(wide(c[d])) + np.float64(wide(e[d])))
    for row in range(last, len(x)):
        x_row = x[row]
        for d in range(len(sums)):
            sums[d] += np.float64(wide(x_row[d]))


@njit(**COMPILED)
def _add_deviations(x, mean, squares, squares_of_rows):
    for row in range(len(x)):
        x_row, total = x[row], 0.0
        for d in range(len(mean)):
            off = np.float64(wide(x_row[d])) - mean[d]
            squares[d] += off * off
            total += off * off
        squares_of_rows[row] = total

"""Sums over rows, in float64 and one pass each, of rows of any float type without a copy of them.

Torch's operations convert the rows first, and then read and write them once for every step: of all that
caching does to an activation that took two thirds. Chosen rows are read where they are, for the same reason.
Rows and dimensions are summed in an order of the compiler's choice, which shows in the last bits of a float64
alone.
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
    _squared_norms(_rows(x_TD, np.arange(len(x_TD)))[0], squares_T)
    return squares_T


def mean(x_TD: Tensor, chosen_N: NDArray[np.int64]) -> NDArray[np.float64]:
    """Compute the mean of the rows with these numbers, one at least. float64 [D]."""
    sum_D = np.zeros(x_TD.shape[1])
    _add_rows(*_rows(x_TD, chosen_N), sum_D)
    return sum_D / len(chosen_N)


def deviations(
    x_TD: Tensor, chosen_N: NDArray[np.int64], mean_D: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute squared deviations from `mean_D` of the rows with these numbers.

    Returns: their sums over rows, float64 [D], and over dimensions, float64 [N].
    """
    squares_D, squares_N = np.zeros(len(mean_D)), np.empty(len(chosen_N))
    _add_deviations(*_rows(x_TD, chosen_N), mean_D, squares_D, squares_N)
    return squares_D, squares_N


def _rows(x_TD: Tensor, chosen_N: NDArray[np.int64]) -> tuple[np.ndarray[Any, Any], NDArray[np.int64]]:
    """View rows as an array for a loop, and number the chosen ones in it. No loop knows float16: the chosen
    rows are copied as float32."""
    x_TD = x_TD.cpu().contiguous()
    if x_TD.dtype == torch.float16:
        return array(x_TD[torch.from_numpy(chosen_N)].float()), np.arange(len(chosen_N))
    return array(x_TD), chosen_N


@njit(**COMPILED)
def _squared_norms(x, squares):
    for row in range(len(x)):
        x_row, square = x[row], 0.0
        for d in range(len(x_row)):
            number = np.float64(wide(x_row[d]))
            square += number * number
        squares[row] = square


@njit(**COMPILED)
def _add_rows(x, chosen, sums):
    last = len(chosen) // 4 * 4
    for n in range(0, last, 4):  # four at a time: with one, a sum is read and written for each
        a, b, c, e = x[chosen[n]], x[chosen[n + 1]], x[chosen[n + 2]], x[chosen[n + 3]]
        for d in range(len(sums)):
            low = np.float64(wide(a[d])) + np.float64(wide(b[d]))
            sums[d] += low + (np.float64(wide(c[d])) + np.float64(wide(e[d])))
    for n in range(last, len(chosen)):
        x_row = x[chosen[n]]
        for d in range(len(sums)):
            sums[d] += np.float64(wide(x_row[d]))


@njit(**COMPILED)
def _add_deviations(x, chosen, mean, squares, squares_of_rows):
    for n in range(len(chosen)):
        x_row, total = x[chosen[n]], 0.0
        for d in range(len(mean)):
            off = np.float64(wide(x_row[d])) - mean[d]
            squares[d] += off * off
            total += off * off
        squares_of_rows[n] = total

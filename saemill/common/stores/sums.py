"""Sums over stored rows, in float64 and one pass each over rows of any float type, compiled by numba.

Torch's operations would convert the rows first and then read and write them once for every step: of all that
caching does to an activation that took two thirds. Rows and dimensions are summed in an order of the
compiler's choice, which shows in the last bits of a float64 alone.
"""

from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload
from numpy.typing import NDArray
from torch import Tensor

COMPILED: dict[str, Any] = {
    "fastmath": {"reassoc", "contract", "nsz"},  # not nnan: a NaN must stay one
    "error_model": "numpy",
    "nogil": True,
    "cache": True,
}


def squared_norms(x_TD: Tensor) -> NDArray[np.float64]:
    """Compute the squared Euclidean norm of each row. float64 [T]."""
    squares_T = np.empty(len(x_TD))
    _squared_norms(_as_numpy(x_TD), squares_T)
    return squares_T


def mean(x_TD: Tensor) -> NDArray[np.float64]:
    """Compute the mean of some rows, one at least. float64 [D]."""
    sum_D = np.zeros(x_TD.shape[1])
    _add_rows(_as_numpy(x_TD), sum_D)
    return sum_D / len(x_TD)


def deviations(x_TD: Tensor, mean_D: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute squared deviations from `mean_D`: summed over rows, float64 [D], and over dimensions, float64
    [T]."""
    squares_D, squares_T = np.zeros(len(mean_D)), np.empty(len(x_TD))
    _add_deviations(_as_numpy(x_TD), mean_D, squares_D, squares_T)
    return squares_D, squares_T


def _as_numpy(x_TD: Tensor) -> NDArray[Any]:
    """View rows as numbers that numba has: of bfloat16 the bits."""
    x_TD = x_TD.cpu().contiguous()
    if x_TD.dtype == torch.bfloat16:
        return x_TD.view(torch.uint16).numpy()
    return (x_TD.float() if x_TD.dtype == torch.float16 else x_TD).numpy()


def _wide(number):  # type: ignore[no-untyped-def]
    """Convert a number, or the bits of a bfloat16, to float64."""


@overload(_wide, inline="always")  # type: ignore[untyped-decorator]
def _widened(number):  # type: ignore[no-untyped-def]
    if number == types.uint16:
        return lambda number: np.float64(np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32))
    return lambda number: np.float64(number)


@njit(**COMPILED)  # type: ignore[untyped-decorator]
def _squared_norms(x_TD: Any, squares_T: Any) -> None:
    for row in range(len(x_TD)):
        x_D, square = x_TD[row], 0.0
        for d in range(len(x_D)):
            square += _wide(x_D[d]) ** 2
        squares_T[row] = square


@njit(**COMPILED)  # type: ignore[untyped-decorator]
def _add_rows(x_TD: Any, sum_D: Any) -> None:
    last = len(x_TD) // 4 * 4
    for row in range(0, last, 4):  # four at a time: with one, a sum is read and written for each
        a_D, b_D, c_D, d_D = x_TD[row], x_TD[row + 1], x_TD[row + 2], x_TD[row + 3]
        for d in range(len(sum_D)):
            sum_D[d] += (_wide(a_D[d]) + _wide(b_D[d])) + (_wide(c_D[d]) + _wide(d_D[d]))
    for row in range(last, len(x_TD)):
        x_D = x_TD[row]
        for d in range(len(sum_D)):
            sum_D[d] += _wide(x_D[d])


@njit(**COMPILED)  # type: ignore[untyped-decorator]
def _add_deviations(x_TD: Any, mean_D: Any, squares_D: Any, squares_T: Any) -> None:
    for row in range(len(x_TD)):
        x_D, squares = x_TD[row], 0.0
        for d in range(len(mean_D)):
            square = (_wide(x_D[d]) - mean_D[d]) ** 2
            squares_D[d] += square
            squares += square
        squares_T[row] = squares

"""How rows lie around a point and around the means of their groups, without a copy of them in float64."""

import numpy as np
from numba import njit
from torch import Tensor

from saemill.common.loops.numbers import COMPILED, array


def squared_distances(x_TD: Tensor, centre_D: Tensor, squares_T: Tensor) -> None:
    """Fill in the squared distance of each row from a point.

    Args:
        x_TD: float32 or float64.
        centre_D, squares_T: float64.
    """
    _distances(array(x_TD), array(centre_D), array(squares_T))


def around_means(
    x_TD: Tensor, centre_D: Tensor, group_T: Tensor, n_G: Tensor, mean_GD: Tensor, squares_G: Tensor
) -> None:
    """Add up each group's rows around their mean; rows of no group are left out.

    Args:
        x_TD: float32 or float64.
        centre_D: float64, what means are told from.
        group_T: int64, the group of each row; −1 for none.
        n_G: int64, rows of each group.
        mean_GD: float64, zeros; filled with the mean minus the centre.
        squares_G: float64, zeros; filled with Σ of the squared distances from the mean.
    """
    _means(*(array(tensor) for tensor in (x_TD, centre_D, group_T, n_G, mean_GD)))
    _around(*(array(tensor) for tensor in (x_TD, centre_D, group_T, mean_GD, squares_G)))


def stretch(x_TD: Tensor, group_T: Tensor, low_D: Tensor, high_D: Tensor) -> None:
    """Lower and raise the ends of each dimension to those of the rows that are in a group.

    Args:
        x_TD: float32 or float64.
        group_T: int64; −1 for none.
        low_D, high_D: float64.
    """
    _stretch(*(array(tensor) for tensor in (x_TD, group_T, low_D, high_D)))


@njit(**COMPILED)
def _distances(x, centre, squares):
    for t in range(len(x)):
        row, total = x[t], 0.0
        for d in range(len(centre)):
            off = np.float64(row[d]) - centre[d]
            total += off * off
        squares[t] = total


@njit(**COMPILED)
def _means(x, centre, group, n, mean):
    for t in range(len(x)):
        if group[t] >= 0:
            row, sums = x[t], mean[group[t]]
            for d in range(len(centre)):
                sums[d] += np.float64(row[d]) - centre[d]
    for g in range(len(mean)):
        sums = mean[g]
        for d in range(len(centre)):
            sums[d] /= n[g]


@njit(**COMPILED)
def _around(x, centre, group, mean, squares):
    centred = np.empty(len(centre), np.float64)
    for t in range(len(x)):
        if group[t] >= 0:
            row, its, total = x[t], mean[group[t]], 0.0
            for d in range(len(centre)):  # a pass of its own: centre and mean are not to be added first
                centred[d] = np.float64(row[d]) - centre[d]
            for d in range(len(centre)):
                total += (centred[d] - its[d]) * (centred[d] - its[d])
            squares[group[t]] += total


@njit(**COMPILED)
def _stretch(x, group, low, high):
    for t in range(len(x)):
        if group[t] >= 0:
            row = x[t]
            for d in range(len(low)):
                number = np.float64(row[d])
                low[d] = number if number < low[d] else low[d]
                high[d] = number if number > high[d] else high[d]

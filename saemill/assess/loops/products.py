"""Squares and products of rows and their reconstructions, without a copy of either in float64."""

import numpy as np
from numba import njit
from torch import Tensor

from saemill.common.loops.numbers import COMPILED, array


def products_of(
    x_TD: Tensor, r_TD: Tensor, error_T: Tensor, x_T: Tensor, r_T: Tensor, product_T: Tensor
) -> None:
    """Fill in ‖r − x‖², ‖x‖², ‖r‖² and ⟨x, r⟩ of each row, as `assess.errors` does.

    Args:
        x_TD, r_TD: float32 or float64.
        error_T, x_T, r_T, product_T: float64, filled.
    """
    _products(*(array(tensor) for tensor in (x_TD, r_TD, error_T, x_T, r_T, product_T)))


@njit(**COMPILED)
def _products(x, r, error, square_x, square_r, product):
    for t in range(len(x)):
        ee = xx = rr = xr = 0.0
        x_t, r_t = x[t], r[t]
        for d in range(len(x_t)):
            a, b = np.float64(x_t[d]), np.float64(r_t[d])
            ee += (b - a) * (b - a)
            xx += a * a
            rr += b * b
            xr += a * b
        error[t], square_x[t], square_r[t], product[t] = ee, xx, rr, xr

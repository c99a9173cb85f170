"""Squares and products of activations and their reconstructions, in float64."""

from typing import NamedTuple

import torch
from torch import Tensor


class Errors(NamedTuple):
    """Of each row x and its reconstruction r. float64 [T] each."""

    error_T: Tensor
    """‖r − x‖²."""
    x_T: Tensor
    """‖x‖²."""
    r_T: Tensor
    """‖r‖²."""
    product_T: Tensor
    """⟨x, r⟩."""


def errors(x_TD: Tensor, r_TD: Tensor) -> Errors:
    """Compare rows with their reconstructions, on a CPU in one pass. A float64 holds the square of any
    float32.

    Args:
        x_TD, r_TD: float32 or float64.
    """
    if not x_TD.is_cpu:
        x_TD, r_TD = x_TD.double(), r_TD.double()
        products = (r_TD - x_TD).square(), x_TD.square(), r_TD.square(), x_TD * r_TD
        return Errors(*(product_TD.sum(1) for product_TD in products))
    from saemill.assess.loops.products import products_of  # numba is loaded where it is used

    found = Errors(*(torch.empty(len(x_TD), dtype=torch.float64) for _ in Errors._fields))
    products_of(x_TD.contiguous(), r_TD.contiguous(), *found)
    return found

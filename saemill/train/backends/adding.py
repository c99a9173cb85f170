"""Sums of numbers and rows by place, in an order that is always the same."""

import torch
from torch import Tensor


def add_rows(sums: Tensor, at_P: Tensor, rows_P: Tensor) -> Tensor:
    """Add rows to those at their places, in place; several may have the same place."""
    if sums.is_cuda:  # sorts the places; index_add_ would add in the order in which threads come
        return sums.index_put_((at_P,), rows_P, accumulate=True)
    return sums.index_add_(0, at_P, rows_P)


def sum_by_place(numbers_P: Tensor, at_P: Tensor, n: int) -> Tensor:
    """Sum the numbers of each of n places. float32 [n]."""
    if numbers_P.is_cuda:
        return add_rows(numbers_P.new_zeros(2 * n), without_zeros(numbers_P, at_P, n), numbers_P)[:n]
    return add_rows(numbers_P.new_zeros(n), at_P, numbers_P)


def without_zeros(numbers_P: Tensor, at_P: Tensor, n: int) -> Tensor:
    """Send what is 0 to places from n to 2 n, one after another.

    One warp adds all of a place, and slots that are not in use are all at latent 0.
    """
    return at_P.where(numbers_P != 0, n + torch.arange(len(at_P), device=at_P.device) % n)

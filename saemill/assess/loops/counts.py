"""How the latents of an SAE fired on some tokens, added to what is known of each."""

import numpy as np
from numba import njit
from torch import Tensor

from saemill.common.loops.numbers import COMPILED, array


def count(
    acts_TK: Tensor,
    latents_TK: Tensor,
    drivers_TC: Tensor,
    count_F: Tensor,
    sum_F: Tensor,
    squares_F: Tensor,
    products_FC: Tensor,
    min_F: Tensor,
    max_F: Tensor,
) -> None:
    """Add the active latents of some tokens, those in slots that are neither 0 nor NaN.

    Args:
        acts_TK, latents_TK: float32 and int64.
        drivers_TC: float64, what activations are multiplied with.
        count_F: int64, tokens on which a latent is active.
        sum_F, squares_F, products_FC: float64, Σ f, Σ f², and Σ f · z of each driver z.
        min_F, max_F: float32, the smallest and the largest activation.
    """
    tensors = (acts_TK, latents_TK, drivers_TC, count_F, sum_F, squares_F, products_FC, min_F, max_F)
    _count(*map(array, tensors))


@njit(**COMPILED)
def _count(acts, latents, drivers, counts, sums, squares, products, least, most):
    for t in range(len(acts)):
        for slot in range(acts.shape[1]):
            act = acts[t, slot]
            if not abs(act) > 0:
                continue
            f, wide = latents[t, slot], np.float64(act)
            counts[f] += 1
            sums[f] += wide
            squares[f] += wide * wide
            for c in range(drivers.shape[1]):
                products[f, c] += wide * drivers[t, c]
            least[f] = min(least[f], act)
            most[f] = max(most[f], act)

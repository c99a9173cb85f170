"""Two sets of latents matched by a similarity: nearest in both directions, and one to one.

For similarities s_ij of latent i of A and j of B:

- nearest: n(i) = argmax_j s_ij, and back. i and j are mutual nearest if each is the other's nearest.
- assignment: the one-to-one matching of all latents of the smaller set that maximises Σ s_ij.

Signed similarities, as a latent's code is never negative: opposite directions are no match.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

BLOCK_ROWS = 512
"""Rows of the similarities in memory at once, unless an assignment needs all."""
Blocks = Callable[[], Iterable[Tensor]]
"""Iterates over the similarities from the start, some rows at a time: fp32 [rows, F of B]."""


@dataclass(frozen=True, slots=True)
class Side:
    """One set's latents and what they were matched with in the other. All [F]."""

    nearest: NDArray[np.int64]
    nearest_similarity: NDArray[np.float32]
    mutual: NDArray[np.bool_]
    match: NDArray[np.int64] | None
    """Assigned latent; -1 where the other set is smaller and none is left. None: not asked for."""
    match_similarity: NDArray[np.float32] | None
    """NaN where there is no match."""


def cosines(a_FD: Tensor, b_FD: Tensor) -> Blocks:
    """Compute cosines of rows of unit length."""
    return lambda: ((rows @ b_FD.T).clamp(-1, 1) for rows in torch.split(a_FD, BLOCK_ROWS))


def match(blocks: Blocks, n_a: int, n_b: int, assign: bool) -> tuple[Side, Side]:
    """Match n_a latents with n_b, and back.

    Args:
        assign: find the assignment too: O(F³) time at worst, and 8 bytes for each of n_a · n_b entries.
    """
    a_to_b, a_best, b_to_a, b_best = _nearest(blocks, n_b)
    mutual_a = b_to_a[a_to_b] == np.arange(n_a)
    mutual_b = a_to_b[b_to_a] == np.arange(n_b)
    if not assign:
        return (
            Side(a_to_b, a_best, mutual_a, None, None),
            Side(b_to_a, b_best, mutual_b, None, None),
        )
    rows, columns, similarity = _assign(blocks, n_a, n_b)
    return (
        Side(a_to_b, a_best, mutual_a, *_partners(n_a, rows, columns, similarity)),
        Side(b_to_a, b_best, mutual_b, *_partners(n_b, columns, rows, similarity)),
    )


def _nearest(
    blocks: Blocks, n_b: int
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
    """Find for every latent of A the nearest of B and its similarity, and back; the first one of equals."""
    a_best: list[Tensor] = []
    a_to_b: list[Tensor] = []
    b_best = torch.full((n_b,), -torch.inf)
    b_to_a = torch.zeros(n_b, dtype=torch.int64)
    first = 0
    for block in blocks():
        along = block.max(1)
        a_best.append(along.values.cpu())
        a_to_b.append(along.indices.cpu())
        values, indices = (column.cpu() for column in block.max(0))
        better = values > b_best
        b_best = torch.where(better, values, b_best)
        b_to_a = torch.where(better, indices + first, b_to_a)
        first += len(block)
    return torch.cat(a_to_b).numpy(), torch.cat(a_best).numpy(), b_to_a.numpy(), b_best.numpy()


def _assign(
    blocks: Blocks, n_a: int, n_b: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Return rows, columns and similarities of the best one-to-one matching.

    Scipy's solver (Crouse 2016) copies a matrix that has more rows than columns, or that it is to
    maximise over; so it gets the negative, with the smaller set along the rows.
    """
    cost = np.empty((min(n_a, n_b), max(n_a, n_b)))
    by_row_of_a = cost if n_a <= n_b else cost.T
    first = 0
    for block in blocks():
        np.negative(block.cpu().numpy(), out=by_row_of_a[first : first + len(block)])
        first += len(block)
    small, large = linear_sum_assignment(cost)
    similarity = -cost[small, large].astype(np.float32)
    return (small, large, similarity) if n_a <= n_b else (large, small, similarity)


def _partners(
    n: int, own: NDArray[np.int64], other: NDArray[np.int64], similarity: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    partner, value = np.full(n, -1), np.full(n, np.nan, np.float32)
    partner[own], value[own] = other, similarity
    return partner, value

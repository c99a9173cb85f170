"""The pre-activations above a floor for each latent, from 8-bit scores and a few exact ones, or exact ones.

A latent is above its floor only if its score's margin, less the bound of the score's error, is. Groups of
latents are searched first, by their largest margin; what may be above is scored exactly (`select`).
"""

import numpy as np
from numba import njit
from torch import Tensor

from saemill.common.loops.largest import LANES
from saemill.common.loops.numbers import COMPILED, array, wide
from saemill.train.backends.cpu.loops.quantise import Quantised
from saemill.train.backends.cpu.loops.select import _error, _score

GROUP = 8
"""Latents per group: with more, most groups would hold some above the floor."""


def above_by_scores(
    scores_TF: Tensor,
    tokens: Quantised,
    latents: Quantised,
    rows_TD: Tensor,
    weights_FD: Tensor,
    bias_F: Tensor,
    floor_F: Tensor,
    val_TK: Tensor,
    idx_TK: Tensor,
    n_T: Tensor,
) -> None:
    """Fill in the pre-activations above the floors, as many as there is room for, and count them all.

    Args:
        scores_TF: int32, products of the quantised rows.
        tokens, latents: these rows.
        rows_TD, weights_FD: the rows they were made from, float32 or bfloat16.
        bias_F, floor_F: float32; the first is to be added to the product.
        val_TK, idx_TK, n_T: float32 and int64, filled.
    """
    _above_by_scores(
        *(array(scores_TF), array(tokens.step_N), array(tokens.norm_N)),
        *(array(latents.step_N), array(latents.norm_N)),
        *(array(tensor) for tensor in (rows_TD, weights_FD, bias_F, floor_F, val_TK, idx_TK, n_T)),
    )


def above(pre_TF: Tensor, floor_F: Tensor, val_TK: Tensor, idx_TK: Tensor, n_T: Tensor) -> None:
    """Do as `above_by_scores` with pre-activations, float32 or bfloat16, that are there already."""
    _above(*(array(tensor) for tensor in (pre_TF, floor_F, val_TK, idx_TK, n_T)))


@njit(**COMPILED)
def _above_by_scores(
    scores, steps_x, norms_x, steps_w, norms_w, rows, weights, bias, floor, val, idx, n_above
):
    n_latents = scores.shape[1]
    margin, score = np.empty(n_latents, np.float32), np.empty(n_latents, np.float32)
    maxima = np.empty(-(-n_latents // (GROUP * LANES)) * LANES, np.float32)
    candidates = np.empty(n_latents + len(maxima), np.int64)  # at its end the groups searched
    x, over = np.empty(rows.shape[1], np.float32), bias - floor
    widest_step, longest = np.max(steps_w), np.max(norms_w)
    for t in range(len(scores)):
        per_step = np.float32(1) / steps_x[t] if steps_x[t] > 0 else np.float32(0)
        length = norms_x[t] * per_step
        row = scores[t]
        for f in range(n_latents):
            margin[f] = np.float32(row[f]) * steps_w[f] + over[f] * per_step
        n = _reaching(margin, maxima, -_error(widest_step, longest, length), candidates)
        m = 0
        for i in range(n):
            f = candidates[i]
            candidates[m] = f
            m += 1 if margin[f] + _error(steps_w[f], norms_w[f], length) >= 0 else 0
        for i in range(len(x)):
            x[i] = wide(rows[t, i])
        _score(x, weights, bias, candidates, score, 0, m)
        n_above[t] = _keep(candidates, score, floor, m, val[t], idx[t])


@njit(**COMPILED)
def _above(pre, floor, val, idx, n_above):
    n_latents = pre.shape[1]
    margin, score = np.empty(n_latents, np.float32), np.empty(n_latents, np.float32)
    maxima = np.empty(-(-n_latents // (GROUP * LANES)) * LANES, np.float32)
    candidates = np.empty(n_latents + len(maxima), np.int64)
    for t in range(len(pre)):
        row = pre[t]
        for f in range(n_latents):
            margin[f] = wide(row[f]) - floor[f]
        n = _reaching(margin, maxima, np.float32(0), candidates)
        for i in range(n):
            score[i] = wide(row[candidates[i]])
        n_above[t] = _keep(candidates, score, floor, n, val[t], idx[t])


@njit(**COMPILED)
def _reaching(margin, maxima, least, candidates):
    """List the latents whose margin is no less than `least`. Returns: how many."""
    n, m, block = 0, 0, GROUP * LANES
    for first in range(0, len(margin), block):
        largest = maxima[first // GROUP : first // GROUP + LANES]
        largest[:] = -np.inf
        for start in range(first, min(first + block, len(margin)), LANES):
            here = margin[start : start + LANES]
            for lane in range(len(here)):
                largest[lane] = max(largest[lane], here[lane])
    groups = candidates[len(candidates) - len(maxima) :]
    for j in range(len(maxima)):  # no branch: which groups these are is hard to foretell
        groups[m] = j
        m += 1 if maxima[j] >= least else 0
    for i in range(m):
        first = groups[i] // LANES * block + groups[i] % LANES
        for f in range(first, min(first + block, len(margin)), LANES):
            candidates[n] = f
            n += 1 if margin[f] >= least else 0
    return n


@njit(**COMPILED)
def _keep(candidates, score, floor, n, val, idx):
    """Keep the scores above their floors. Returns: how many there are, also where there is no room."""
    m = 0
    for i in range(n):
        f = candidates[i]
        if score[i] > floor[f]:
            if m < len(val):
                val[m] = score[i]
                idx[m] = f
            m += 1
    return m

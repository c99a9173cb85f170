"""The k largest pre-activations of each token, from 8-bit scores and few exact ones.

The largest by absolute value are found likewise, with |u_f| for u_f.

With the score u_f of a latent, in units of the token's step, and its error's bound ε_f (`N_SIGMA` standard
deviations of `quantise`), a latent is among the k largest only if u_f + ε_f reaches the k-th largest
pre-activation. Groups of latents are searched first, by their largest score: the k-th largest of these is a
lower bound of the k-th largest score. What is left, about 1.5 k latents, is scored exactly, as
⟨x, W_enc[f]⟩ from the rows themselves with sums in float32, the likely ones first, since a k-th largest
exact score spares some of the rest.
"""

import numpy as np
from numba import njit
from torch import Tensor

from saemill.common.loops.kth import nearly_kth
from saemill.common.loops.largest import LANES, group_size, keep
from saemill.common.loops.numbers import COMPILED, array, dot, rank, wide
from saemill.train.backends.cpu.loops.quantise import Quantised

N_SIGMA = 8.0
"""The chance of a larger error is about 1e-15 for a pair of token and latent."""


def select(
    scores_TF: Tensor,
    tokens: Quantised,
    latents: Quantised,
    rows_TD: Tensor,
    weights_FD: Tensor,
    bias_F: Tensor,
    val_TK: Tensor,
    idx_TK: Tensor,
    is_signed: bool = False,
) -> None:
    """Fill in the codes of some tokens, in no particular order; latents below 0 count as 0, at latent 0.

    Args:
        scores_TF: int32, products of the quantised rows.
        tokens, latents: these rows.
        rows_TD, weights_FD: the rows they were made from, float32 or bfloat16.
        bias_F: float32, to be added to the product.
        val_TK, idx_TK: float32 and int64, filled.
        is_signed: whether codes are the largest by absolute value, with their signs.
    """
    _select(
        *(array(scores_TF), array(tokens.step_N), array(tokens.norm_N)),
        *(array(latents.step_N), array(latents.norm_N)),
        *(array(rows_TD), array(weights_FD), array(bias_F), array(val_TK), array(idx_TK)),
        True if is_signed else None,
    )


@njit(**COMPILED)
def _select(scores, steps_x, norms_x, steps_w, norms_w, rows, weights, bias, val, idx, signed):
    n_latents, k = scores.shape[1], val.shape[1]
    group = group_size(n_latents, k)
    maxima = np.empty(-(-n_latents // (group * LANES)) * LANES, np.float32)
    candidates = np.empty(n_latents + len(maxima), np.int64)  # at its end the groups searched
    score = np.empty(n_latents, np.float32)
    exact = score if signed is None else np.empty(n_latents, np.float32)
    x = np.empty(rows.shape[1], np.float32)
    widest_step, longest = np.max(steps_w), np.max(norms_w)
    for t in range(len(scores)):
        per_step = np.float32(1) / steps_x[t] if steps_x[t] > 0 else np.float32(0)
        length = norms_x[t] * per_step
        _group_maxima(scores[t], steps_w, bias, per_step, group, maxima, signed)
        least = nearly_kth(maxima, len(maxima), k, np.float32(0))
        least -= 2 * _error(widest_step, longest, length)
        n = _above(scores[t], steps_w, bias, per_step, group, maxima, least, candidates, score, signed)
        for i in range(len(x)):
            x[i] = wide(rows[t, i])
        m = _likely_first(candidates, score, n, nearly_kth(score, n, k, least))
        _score(x, weights, bias, candidates, exact, 0, m)
        _rank_all(exact, score, 0, m, signed)
        bound = nearly_kth(score, m, k, np.float32(0)) * per_step
        n = _possible(candidates, score, m, n, bound, steps_w, norms_w, length)
        _score(x, weights, bias, candidates, exact, m, n)
        _rank_all(exact, score, m, n, signed)
        keep(candidates, score, exact, n, k, val[t], idx[t])


@njit(**COMPILED)
def _error(step_w, norm_w, length):
    """Compute the bound of a score's error, in units of the token's step; `length` is the token's in these
    units."""
    return np.float32(N_SIGMA / 12**0.5) * np.sqrt(norm_w * norm_w + step_w * step_w * length * length)


@njit(**COMPILED)
def _group_maxima(scores, steps, bias, per_step, group, maxima, signed):
    """Find the largest score of each group. Its latents are LANES apart, so that a vector holds as many
    groups."""
    for first in range(0, len(scores), group * LANES):
        largest = maxima[first // group : first // group + LANES]
        largest[:] = -np.inf
        for row in range(first, min(first + group * LANES, len(scores)), LANES):
            here, step, b = scores[row : row + LANES], steps[row : row + LANES], bias[row : row + LANES]
            for lane in range(len(here)):
                number = np.float32(here[lane]) * step[lane] + b[lane] * per_step
                largest[lane] = max(largest[lane], rank(number, signed))


@njit(**COMPILED)
def _above(scores, steps, bias, per_step, group, maxima, least, candidates, score, signed):
    """List the latents whose score is no less than `least`, and their scores. Returns: how many."""
    n, m, block = 0, 0, group * LANES
    groups = candidates[len(candidates) - len(maxima) :]
    for j in range(len(maxima)):  # no branch: which groups these are is hard to foretell
        groups[m] = j
        m += 1 if maxima[j] >= least else 0
    for i in range(m):
        first = groups[i] // LANES * block + groups[i] % LANES
        for f in range(first, min(first + block, len(scores)), LANES):
            number = rank(np.float32(scores[f]) * steps[f] + bias[f] * per_step, signed)
            candidates[n] = f
            score[n] = number
            n += 1 if number >= least else 0
    return n


@njit(**COMPILED)
def _likely_first(candidates, score, n, likely):
    """Bring the latents with scores of `likely` or more to the front. Returns: how many."""
    m = 0
    for i in range(n):
        is_likely = score[i] >= likely
        # Harmless where it is not likely: nor is the one at m.
        candidates[i], candidates[m] = candidates[m], candidates[i]
        score[i], score[m] = score[m], score[i]
        m += 1 if is_likely else 0
    return m


@njit(**COMPILED)
def _possible(candidates, score, m, n, bound, steps, norms, length):
    """Move, of the latents from m to n, those that may reach the bound right behind m. Returns: how many in
    all."""
    last = m
    for i in range(m, n):
        f = candidates[i]
        if score[i] + _error(steps[f], norms[f], length) >= bound:
            candidates[last] = f
            last += 1
    return last


@njit(**COMPILED)
def _score(x, weights, bias, candidates, score, first, last):
    """Compute exact pre-activations of some latents, four at a time to fetch several rows at once."""
    i = first
    while i + 4 <= last:
        w0, w1 = weights[candidates[i]], weights[candidates[i + 1]]
        w2, w3 = weights[candidates[i + 2]], weights[candidates[i + 3]]
        s0 = s1 = s2 = s3 = np.float32(0)
        for d in range(len(x)):
            s0 += x[d] * wide(w0[d])
            s1 += x[d] * wide(w1[d])
            s2 += x[d] * wide(w2[d])
            s3 += x[d] * wide(w3[d])
        score[i], score[i + 1] = s0 + bias[candidates[i]], s1 + bias[candidates[i + 1]]
        score[i + 2], score[i + 3] = s2 + bias[candidates[i + 2]], s3 + bias[candidates[i + 3]]
        i += 4
    for j in range(i, last):
        score[j] = dot(x, weights[candidates[j]]) + bias[candidates[j]]


@njit(**COMPILED)
def _rank_all(exact, score, first, last, signed):
    """Fill in what pre-activations are ranked by, where it is not themselves."""
    if signed is not None:
        for i in range(first, last):
            score[i] = rank(exact[i], signed)

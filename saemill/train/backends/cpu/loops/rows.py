"""The pairs (token, latent) of a batch by latent, and the gradients of a block of rows."""

from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from saemill.train.backends.base import Batch
from saemill.train.backends.cpu.loops.numbers import COMPILED, array, wide
from saemill.train.backends.sparse import Forward


class Pairs(NamedTuple):
    """The active (token, latent) pairs of a batch, by latent, then by token; scaled by gs."""

    token_P: Tensor
    """int64."""
    val_P: Tensor
    dval_P: Tensor
    offsets_F: Tensor
    """int64 [F + 1]: latent f has the pairs offsets[f] to offsets[f + 1]."""
    db_enc_F: Tensor
    """Σ dval."""
    along_F: Tensor
    """Σ val · ⟨g, W_dec[f]⟩: the decoder gradient's component along its row."""
    fired_F: Tensor
    """bool: some val > 0."""


def sort_pairs(forward: Forward, n_latents: int, gs: float) -> Pairs:
    """Order a batch's pairs by latent, by counting; codes of 0 are left out."""
    val_TK, idx_TK = forward.codes
    n_pairs = idx_TK.numel()
    pairs = Pairs(
        token_P=torch.empty(n_pairs, dtype=torch.int64),
        val_P=torch.empty(n_pairs),
        dval_P=torch.empty(n_pairs),
        offsets_F=torch.zeros(n_latents + 1, dtype=torch.int64),
        db_enc_F=torch.zeros(n_latents),
        along_F=torch.zeros(n_latents),
        fired_F=torch.zeros(n_latents, dtype=torch.bool),
    )
    inputs = (array(val_TK), array(idx_TK), array(forward.dot_TK), np.float32(gs))
    _sort_pairs(*inputs, *(array(tensor) for tensor in pairs))
    return pairs


@njit(**COMPILED)
def _sort_pairs(val, idx, dots, gs, tokens, vals, dvals, offsets, db_enc, along, fired):
    n_tokens, k = val.shape
    for t in range(n_tokens):
        for i in range(k):
            if val[t, i] > 0:
                offsets[idx[t, i] + 1] += 1
    for f in range(len(offsets) - 1):
        fired[f] = offsets[f + 1] > 0
        offsets[f + 1] += offsets[f]
    place = offsets[:-1].copy()
    for t in range(n_tokens):
        for i in range(k):
            v, f = val[t, i], idx[t, i]
            if v > 0:
                p = place[f]
                place[f] += 1
                dval = gs * dots[t, i]
                tokens[p] = t
                vals[p] = gs * v
                dvals[p] = dval
                db_enc[f] += dval
                along[f] += v * dval


def gradients(
    batch: Batch, e_TD: Tensor, pairs: Pairs, block: slice, w_dec_FD: Tensor, b_D: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of a block of rows of w_enc and w_dec, the latter orthogonal to w_dec.

    The inputs are those of the product, in its dtype, and so is the error.
    """
    grad_enc, grad_dec = torch.empty_like(w_dec_FD[block]), torch.empty_like(w_dec_FD[block])
    sorted_P = (array(pairs.token_P), array(pairs.val_P), array(pairs.dval_P))
    per_latent = (pairs.offsets_F[block.start : block.stop + 1], pairs.db_enc_F[block], pairs.along_F[block])
    _gradients(
        *(array(batch.product_TD), array(e_TD), *sorted_P),
        *(array(tensor) for tensor in (*per_latent, w_dec_FD[block], b_D, grad_enc, grad_dec)),
    )
    return grad_enc, grad_dec


@njit(**COMPILED)
def _gradients(x, e, tokens, vals, dvals, offsets, db_enc, along, w_dec, b, grad_enc, grad_dec):
    for f in range(len(w_dec)):
        enc, dec, w = grad_enc[f], grad_dec[f], w_dec[f]
        for d in range(len(b)):
            enc[d] = -db_enc[f] * b[d]
            dec[d] = -along[f] * w[d]
        first, last = offsets[f], offsets[f + 1]
        fours = first + (last - first) // 4 * 4
        for p in range(first, fours, 4):  # several rows are fetched at once
            t0, t1, t2, t3 = tokens[p], tokens[p + 1], tokens[p + 2], tokens[p + 3]
            a0, a1, a2, a3 = dvals[p], dvals[p + 1], dvals[p + 2], dvals[p + 3]
            v0, v1, v2, v3 = vals[p], vals[p + 1], vals[p + 2], vals[p + 3]
            x0, x1, x2, x3 = x[t0], x[t1], x[t2], x[t3]
            e0, e1, e2, e3 = e[t0], e[t1], e[t2], e[t3]
            for d in range(len(b)):
                enc[d] += a0 * wide(x0[d]) + a1 * wide(x1[d]) + a2 * wide(x2[d]) + a3 * wide(x3[d])
                dec[d] += v0 * wide(e0[d]) + v1 * wide(e1[d]) + v2 * wide(e2[d]) + v3 * wide(e3[d])
        for p in range(fours, last):
            xt, et, a, v = x[tokens[p]], e[tokens[p]], dvals[p], vals[p]
            for d in range(len(b)):
                enc[d] += a * wide(xt[d])
                dec[d] += v * wide(et[d])

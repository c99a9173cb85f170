"""The pairs (token, latent) of a batch by latent, and the gradients of a block of rows."""

from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from saemill.common.loops.numbers import COMPILED, array, wide
from saemill.train.backends.architecture import Slopes
from saemill.train.backends.base import Batch
from saemill.train.backends.codes import Codes
from saemill.train.backends.parameters import Parameters
from saemill.train.backends.sparse import Forward


class Pairs(NamedTuple):
    """The active (token, latent) pairs of a batch, by latent, then by token; scaled by gs."""

    token_P: Tensor
    """int64."""
    row_P: Tensor
    """int64, where its error lies: the token, or g · T + the token with groups."""
    val_P: Tensor
    dpre_P: Tensor
    offsets_F: Tensor
    """int64 [F + 1]: latent f has the pairs offsets[f] to offsets[f + 1]."""
    dpre_F: Tensor
    """Σ dpre."""
    along_F: Tensor
    """Σ val · ⟨g, W_dec[f]⟩: the decoder gradient's component along its row."""
    fired_F: Tensor
    """bool: active on some token."""


def sort_pairs(forward: Forward, slopes: Slopes, n_latents: int, gs: float) -> Pairs:
    """Order a batch's pairs by latent, by counting; those without code and gradient are left out."""
    codes, groups, n_pairs = forward.codes, forward.groups, forward.codes.idx_TK.numel()
    pairs = Pairs(
        token_P=(token_P := torch.empty(n_pairs, dtype=torch.int64)),
        row_P=token_P if groups is None else torch.empty(n_pairs, dtype=torch.int64),
        val_P=torch.empty(n_pairs),
        dpre_P=torch.empty(n_pairs),
        offsets_F=torch.zeros(n_latents + 1, dtype=torch.int64),
        dpre_F=torch.zeros(n_latents),
        along_F=torch.zeros(n_latents),
        fired_F=torch.zeros(n_latents, dtype=torch.bool),
    )
    used_T = slots_used(codes)
    n_shown = codes.val_TK.shape[1]
    if groups is not None and groups.by_rank:
        n_shown = groups.ends[groups.shown]
    inputs = (codes.val_TK, codes.idx_TK, used_T, forward.dot_TK, slopes.dpre_TK.contiguous())
    first_TK = codes.idx_TK[:0] if groups is None else codes.group_TK(groups) * len(used_T)
    _sort_pairs(*map(array, inputs), array(first_TK), np.float32(gs), n_shown, *map(array, pairs))
    return pairs


def slots_used(codes: Codes) -> Tensor:
    """Count the slots in use of each token. int64 [T]."""
    n_tokens, n_slots = codes.val_TK.shape
    return torch.full((n_tokens,), n_slots) if codes.n_T is None else codes.n_T


@njit(**COMPILED)
def _sort_pairs(
    val, idx, used, dots, dpre, first, gs, n_shown, tokens, rows, vals, dpres, offsets, sums, along, fired
):
    n_tokens = len(val)
    for t in range(n_tokens):
        for i in range(used[t]):
            if abs(val[t, i]) > 0 or dpre[t, i] != 0:
                offsets[idx[t, i] + 1] += 1
    for f in range(len(offsets) - 1):
        offsets[f + 1] += offsets[f]
    place = offsets[:-1].copy()
    for t in range(n_tokens):
        for i in range(used[t]):
            v, dv, f = val[t, i], dpre[t, i], idx[t, i]
            if abs(v) > 0 or dv != 0:
                p = place[f]
                place[f] += 1
                tokens[p] = t
                if len(first):
                    rows[p] = first[t, i] + t
                vals[p] = gs * v
                dpres[p] = dv
                sums[f] += dv
                along[f] += v * (gs * dots[t, i])
                fired[f] |= abs(v) > 0 and i < n_shown


def gradients(
    batch: Batch,
    error_ND: Tensor,
    pairs: Pairs,
    block: slice,
    p: Parameters,
    toward_F: Tensor,
    layer: int = 0,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of a block of rows of w_enc and w_dec.

    The inputs are those of the product, in its dtype, and so are the errors; to a decoder row's gradient
    comes `toward_F` times the row. The block is of one layer's latents, which read their own part of the
    inputs and write to the errors' from theirs on.
    """
    own = p.layers[layer]
    first = layer * len(own.w_enc_FD)
    rows = slice(block.start - first, block.stop - first)
    grad_enc, grad_dec = torch.empty_like(own.w_enc_FD[rows]), torch.empty_like(own.w_dec_FD[rows])
    columns = layer * own.w_enc_FD.shape[1], error_ND.shape[1] - own.w_dec_FD.shape[1]
    sorted_P = (array(pairs.token_P), array(pairs.row_P), array(pairs.val_P), array(pairs.dpre_P))
    per_latent = (pairs.offsets_F[block.start : block.stop + 1], pairs.dpre_F[block], toward_F[block])
    _gradients(
        *(array(batch.product_TD), array(error_ND), *sorted_P),
        *(array(tensor) for tensor in (*per_latent, own.w_dec_FD[rows], own.offset_D)),
        *columns,
        *(array(grad_enc), array(grad_dec)),
    )
    return grad_enc, grad_dec


@njit(**COMPILED)
def _gradients(
    x, e, tokens, rows, vals, dpres, offsets, sums, toward, w_dec, b, at_x, at_e, grad_enc, grad_dec
):
    for f in range(len(w_dec)):
        enc, dec, w = grad_enc[f], grad_dec[f], w_dec[f]
        for d in range(len(b)):
            enc[d] = -sums[f] * b[d]
        for d in range(len(w)):
            dec[d] = toward[f] * w[d]
        first, last = offsets[f], offsets[f + 1]
        fours = first + (last - first) // 4 * 4
        for p in range(first, fours, 4):  # several rows are fetched at once
            t0, t1, t2, t3 = tokens[p], tokens[p + 1], tokens[p + 2], tokens[p + 3]
            a0, a1, a2, a3 = dpres[p], dpres[p + 1], dpres[p + 2], dpres[p + 3]
            v0, v1, v2, v3 = vals[p], vals[p + 1], vals[p + 2], vals[p + 3]
            x0, x1, x2, x3 = x[t0, at_x:], x[t1, at_x:], x[t2, at_x:], x[t3, at_x:]
            e0, e1 = e[rows[p], at_e:], e[rows[p + 1], at_e:]
            e2, e3 = e[rows[p + 2], at_e:], e[rows[p + 3], at_e:]
            for d in range(len(b)):
                enc[d] += a0 * wide(x0[d]) + a1 * wide(x1[d]) + a2 * wide(x2[d]) + a3 * wide(x3[d])
            for d in range(len(w)):
                dec[d] += v0 * wide(e0[d]) + v1 * wide(e1[d]) + v2 * wide(e2[d]) + v3 * wide(e3[d])
        for p in range(fours, last):
            xt, et, a, v = x[tokens[p], at_x:], e[rows[p], at_e:], dpres[p], vals[p]
            for d in range(len(b)):
                enc[d] += a * wide(xt[d])
            for d in range(len(w)):
                dec[d] += v * wide(et[d])

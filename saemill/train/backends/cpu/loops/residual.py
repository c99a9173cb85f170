"""Decoding, the error, and its products with the active rows, one token after another."""

import numpy as np
from numba import njit
from torch import Tensor

from saemill.common.loops.numbers import COMPILED, array, dot, put, wide


def residual(
    val_TK: Tensor,
    idx_TK: Tensor,
    n_T: Tensor,
    x_TD: Tensor,
    w_dec_FD: Tensor,
    b_D: Tensor,
    e_TD: Tensor,
    dot_TK: Tensor,
    sse_T: Tensor,
) -> None:
    """Compute e = Σ val · W_dec[idx] + b − x, ⟨e, W_dec[idx]⟩ and ‖e‖², all of the error as it is stored.

    Args:
        val_TK, idx_TK, n_T: float32 and int64; the slots in use.
        x_TD, w_dec_FD, b_D: float32.
        e_TD: float32 or bfloat16, filled.
        dot_TK, sse_T: float32, filled.
    """
    _residual(*(array(tensor) for tensor in (val_TK, idx_TK, n_T, x_TD, w_dec_FD, b_D, e_TD, dot_TK, sse_T)))


def residual_of_layers(
    val_TK: Tensor,
    own_TK: Tensor,
    ends_TL: Tensor,
    y_TE: Tensor,
    w_dec: Tensor,
    b_E: Tensor,
    e_TE: Tensor,
    dot_TK: Tensor,
    sse_T: Tensor,
) -> None:
    """Do as `residual` of a cross-layer transcoder, whose latents' decoders are of the sites from theirs on.

    Args:
        val_TK: float32, layer by layer.
        own_TK: int64, numbers of latents among those of their layers.
        ends_TL: int64; the latents of layer l are in the slots before ends[t, l], behind those of the last.
        y_TE, b_E: float32, of all sites side by side.
        w_dec: float32, as `common.sae.layers` has it.
        e_TE: float32 or bfloat16, filled.
        dot_TK, sse_T: float32, filled.
    """
    tensors = (val_TK, own_TK, ends_TL, y_TE, w_dec.view(-1), b_E, e_TE, dot_TK, sse_T)
    _residual_of_layers(*map(array, tensors))


def residual_of_groups(
    val_TK: Tensor,
    idx_TK: Tensor,
    ends_TG: Tensor,
    weights_G: Tensor,
    x_TD: Tensor,
    w_dec_FD: Tensor,
    b_D: Tensor,
    shown: int,
    first_token: int,
    e_TD: Tensor,
    dot_TK: Tensor,
    sse_TG: Tensor,
    rows_GTD: Tensor,
) -> None:
    """Compute the error of each group of codes, and for each the weighted sum of those of all that hold it.

    Args:
        val_TK, idx_TK: float32 and int64, in the order of the groups.
        ends_TG: int64; group g decodes the slots before ends[t, g].
        weights_G: float32, of the groups' errors.
        x_TD, w_dec_FD, b_D: float32.
        shown: the group whose error e_TD is.
        first_token: the place of the first token in rows_GTD, which has the whole batch.
        e_TD: float32 or bfloat16, filled.
        dot_TK, sse_TG: float32, filled.
        rows_GTD: the same dtype as e_TD, filled from first_token on.
    """
    arrays = (array(tensor) for tensor in (val_TK, idx_TK, ends_TG, weights_G, x_TD, w_dec_FD, b_D))
    filled = (array(tensor) for tensor in (e_TD, dot_TK, sse_TG, rows_GTD))
    _residual_of_groups(*arrays, shown, first_token, *filled)


@njit(**COMPILED)
def _residual(val, idx, n_used, x, w_dec, b, e, dots, sse):
    row = np.empty(x.shape[1], np.float32)
    for t in range(len(x)):
        row[:] = b - x[t]
        _add(row, val[t], idx[t], 0, n_used[t], w_dec)
        _round(row, e[t])
        sse[t] = dot(row, row)
        _products(row, idx[t], 0, n_used[t], w_dec, dots[t])


@njit(**COMPILED)
def _residual_of_layers(val, idx, ends, y, w_dec, b, e, dots, sse):
    row, n_layers = np.empty(y.shape[1], np.float32), ends.shape[1]
    width = len(b) // n_layers
    n_each = 2 * len(w_dec) // (width * n_layers * (n_layers + 1))
    for t in range(len(y)):
        row[:] = b - y[t]
        first, start = 0, 0
        for layer in range(n_layers):
            stop = start + n_each * (n_layers - layer) * width
            rows = w_dec[start:stop].reshape(n_each, (n_layers - layer) * width)
            _add(row[layer * width :], val[t], idx[t], first, ends[t, layer], rows)
            first, start = ends[t, layer], stop
        _round(row, e[t])
        sse[t] = dot(row, row)
        first, start = 0, 0
        for layer in range(n_layers):
            stop = start + n_each * (n_layers - layer) * width
            rows = w_dec[start:stop].reshape(n_each, (n_layers - layer) * width)
            _products(row[layer * width :], idx[t], first, ends[t, layer], rows, dots[t])
            first, start = ends[t, layer], stop


@njit(**COMPILED)
def _residual_of_groups(val, idx, ends, weights, x, w_dec, b, shown, place, e, dots, sse, rows):
    row, total = np.empty(x.shape[1], np.float32), np.empty(x.shape[1], np.float32)
    errors = np.empty((len(weights), x.shape[1]), np.float32)
    for t in range(len(x)):
        row[:] = b - x[t]
        first = 0
        for g in range(len(weights)):
            _add(row, val[t], idx[t], first, ends[t, g], w_dec)
            first = ends[t, g]
            errors[g, :] = row
            sse[t, g] = dot(row, row)
        row[:] = errors[shown]
        _round(row, e[t])
        total[:] = 0
        for g in range(len(weights) - 1, -1, -1):
            total += weights[g] * errors[g]
            row[:] = total
            _round(row, rows[g, place + t])
            first = ends[t, g - 1] if g > 0 else 0
            _products(row, idx[t], first, ends[t, g], w_dec, dots[t])


@njit(**COMPILED)
def _round(row, stored):
    """Store a row, and give it the values that are stored."""
    for d in range(len(row)):
        put(stored, d, row[d])
    for d in range(len(row)):
        row[d] = wide(stored[d])


@njit(**COMPILED)
def _add(row, val, idx, first, last, w_dec):
    """Add val · W_dec[idx] of some slots to a row."""
    fours = first + (last - first) // 4 * 4
    for i in range(first, fours, 4):  # several rows are fetched at once
        v0, v1, v2, v3 = val[i], val[i + 1], val[i + 2], val[i + 3]
        w0, w1, w2, w3 = w_dec[idx[i]], w_dec[idx[i + 1]], w_dec[idx[i + 2]], w_dec[idx[i + 3]]
        for d in range(len(row)):
            row[d] += v0 * w0[d] + v1 * w1[d] + v2 * w2[d] + v3 * w3[d]
    for i in range(fours, last):
        row += val[i] * w_dec[idx[i]]


@njit(**COMPILED)
def _products(row, idx, first, last, w_dec, dots):
    """Compute ⟨row, W_dec[idx]⟩ of some slots."""
    fours = first + (last - first) // 4 * 4
    for i in range(first, fours, 4):
        w0, w1, w2, w3 = w_dec[idx[i]], w_dec[idx[i + 1]], w_dec[idx[i + 2]], w_dec[idx[i + 3]]
        s0 = s1 = s2 = s3 = np.float32(0)
        for d in range(len(row)):
            s0 += row[d] * w0[d]
            s1 += row[d] * w1[d]
            s2 += row[d] * w2[d]
            s3 += row[d] * w3[d]
        dots[i], dots[i + 1], dots[i + 2], dots[i + 3] = s0, s1, s2, s3
    for i in range(fours, last):
        dots[i] = dot(row, w_dec[idx[i]])

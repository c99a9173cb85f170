"""Decoding, the error, and its products with the active rows, one token after another."""

import numpy as np
from numba import njit
from torch import Tensor

from saemill.train.backends.cpu.loops.numbers import COMPILED, array, dot, put, wide


def residual(
    val_TK: Tensor,
    idx_TK: Tensor,
    x_TD: Tensor,
    w_dec_FD: Tensor,
    b_D: Tensor,
    e_TD: Tensor,
    dot_TK: Tensor,
    sse_T: Tensor,
) -> None:
    """Compute e = Σ val · W_dec[idx] + b − x, ⟨e, W_dec[idx]⟩ and ‖e‖², all of the error as it is stored.

    Args:
        val_TK, idx_TK: float32 and int64.
        x_TD, w_dec_FD, b_D: float32.
        e_TD: float32 or bfloat16, filled.
        dot_TK, sse_T: float32, filled.
    """
    _residual(*(array(tensor) for tensor in (val_TK, idx_TK, x_TD, w_dec_FD, b_D, e_TD, dot_TK, sse_T)))


@njit(**COMPILED)
def _residual(val, idx, x, w_dec, b, e, dots, sse):
    n_tokens, k = val.shape
    fours = k // 4 * 4
    row = np.empty(x.shape[1], np.float32)
    for t in range(n_tokens):
        row[:] = b - x[t]
        for i in range(0, fours, 4):  # several rows are fetched at once
            v0, v1, v2, v3 = val[t, i], val[t, i + 1], val[t, i + 2], val[t, i + 3]
            w0, w1 = w_dec[idx[t, i]], w_dec[idx[t, i + 1]]
            w2, w3 = w_dec[idx[t, i + 2]], w_dec[idx[t, i + 3]]
            for d in range(len(row)):
                row[d] += v0 * w0[d] + v1 * w1[d] + v2 * w2[d] + v3 * w3[d]
        for i in range(fours, k):
            row += val[t, i] * w_dec[idx[t, i]]
        for d in range(len(row)):
            put(e[t], d, row[d])
        for d in range(len(row)):
            row[d] = wide(e[t, d])
        sse[t] = dot(row, row)
        for i in range(0, fours, 4):
            w0, w1 = w_dec[idx[t, i]], w_dec[idx[t, i + 1]]
            w2, w3 = w_dec[idx[t, i + 2]], w_dec[idx[t, i + 3]]
            s0 = s1 = s2 = s3 = np.float32(0)
            for d in range(len(row)):
                s0 += row[d] * w0[d]
                s1 += row[d] * w1[d]
                s2 += row[d] * w2[d]
                s3 += row[d] * w3[d]
            dots[t, i], dots[t, i + 1], dots[t, i + 2], dots[t, i + 3] = s0, s1, s2, s3
        for i in range(fours, k):
            dots[t, i] = dot(row, w_dec[idx[t, i]])

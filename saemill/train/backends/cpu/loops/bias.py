"""What a product with x misses of one with x − b."""

import torch
from numba import njit
from torch import Tensor

from saemill.common.loops.numbers import COMPILED, array, dot
from saemill.train.backends.base import chunks
from saemill.train.backends.cpu.threads import each

PIECE_BYTES = 1 << 20
"""Bytes of the rows that a thread works on at a time."""


def fold_bias(w_enc_FD: Tensor, b_enc_F: Tensor, b_D: Tensor) -> Tensor:
    """Compute `sparse.fold_bias` with b and the sums in float32."""
    bias_F = torch.empty_like(b_enc_F)
    arrays = [array(tensor) for tensor in (w_enc_FD, b_enc_F, bias_F)]
    pieces = list(chunks(len(w_enc_FD), w_enc_FD[0].nbytes, PIECE_BYTES))
    each(pieces, lambda piece, _: _fold_bias(*(per_latent[piece] for per_latent in arrays), array(b_D)))
    return bias_F


@njit(**COMPILED)
def _fold_bias(w_enc, b_enc, bias, b):
    for f in range(len(w_enc)):
        bias[f] = b_enc[f] - dot(w_enc[f], b)

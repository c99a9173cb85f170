"""The two passes of a step with compiled loops: what codes.py and rows.py define, on a CPU.

Where the CPU multiplies 8-bit integers fast, the product is made of these, and its result only chooses
which latents are scored exactly; elsewhere the product is torch's. The inputs and the residual are gathered
in the product's dtype; sums are float32.
"""

from functools import lru_cache, partial

import torch
from torch import Tensor

from saemill.train.backends import auxk, rows
from saemill.train.backends.codes import Batch, Codes, Forward, Weights, chunks, encode, own_codes
from saemill.train.backends.codes import residual as residual_of_team
from saemill.train.backends.cpu.loops.auxk import keep_active, keep_largest
from saemill.train.backends.cpu.loops.bias import fold_bias
from saemill.train.backends.cpu.loops.quantise import LEAST_COLUMNS, Quantised, empty
from saemill.train.backends.cpu.loops.residual import residual
from saemill.train.backends.cpu.loops.rows import gradients, sort_pairs
from saemill.train.backends.cpu.loops.select import select
from saemill.train.backends.team import ALONE, Team
from saemill.train.backends.threads import each, number, one_in_torch
from saemill.train.memory import zeros
from saemill.train.profile import part

__all__ = ["AUXK", "backward", "forward", "prepare", "quantised_weights", "room"]

CHUNK_TOKENS = 1024
CHUNK_BYTES = 1 << 26
"""Most bytes of a thread's scores: a shorter chunk reads the weights too often."""
SCORE_BYTES = 4
"""Of a score; a pre-activation takes no more."""


def multiplies_8_bits(d: int) -> bool:
    """Whether this CPU has instructions for sums of 8-bit products, and rows have enough columns for them."""
    return d >= LEAST_COLUMNS and bool(torch.cpu._is_vnni_supported())


@one_in_torch()
def prepare(x_TD: Tensor, dtype: torch.dtype) -> Batch:
    """A batch with the copies that this machine's product needs."""
    product_TD = x_TD.to(dtype)
    if not multiplies_8_bits(x_TD.shape[1]):
        return Batch(x_TD, product_TD)
    quantised = empty(*x_TD.shape)
    with part("copy"):
        pieces = _pieces(len(x_TD), CHUNK_TOKENS)
        each(pieces, lambda piece, _: quantised.rows(piece).take(product_TD[piece]))
    return Batch(x_TD, product_TD, quantised)


def _pieces(n_tokens: int, most_tokens: int) -> list[slice]:
    """Tokens for all threads, no more than so many each at a time."""
    share = -(-n_tokens // number())
    return list(chunks(n_tokens, 1, min(most_tokens, share)))


def quantised_weights(n_latents: int, d: int) -> Quantised | None:
    """Memory for `Weights.quantised_FD`, where this machine uses it."""
    return empty(n_latents, d) if multiplies_8_bits(d) else None


def room(n_latents: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for each thread's scores or pre-activations, shared by banks: uint8 [threads, bytes]."""
    return _memory(number(), max(CHUNK_BYTES, SCORE_BYTES * n_latents))


@lru_cache(maxsize=1)
def _memory(n_threads: int, n_bytes: int) -> Tensor:
    """Made once: fresh pages cost more than filling them. What is not used takes none."""
    return zeros(n_threads, n_bytes, dtype=torch.uint8)


@one_in_torch()
def forward(batch: Batch, weights: Weights, k: int, room_NB: Tensor, team: Team = ALONE) -> Forward:
    """As `codes.forward`; the codes' values are sums in float32, not rounded to the product's dtype."""
    n_tokens = len(batch.x_TD)
    bias_F = fold_bias(weights.product_FD, weights.b_enc_F, weights.b_D)
    codes = Codes(torch.empty(n_tokens, k), torch.empty(n_tokens, k, dtype=torch.int64))
    e_TD, dot_TK, sse_T = torch.empty_like(batch.product_TD), torch.empty(n_tokens, k), torch.empty(n_tokens)
    most_tokens = max(1, CHUNK_BYTES // (SCORE_BYTES * len(weights.product_FD)))
    pieces = _pieces(n_tokens, min(CHUNK_TOKENS, most_tokens))

    def find_codes(piece: slice, thread: int) -> None:
        here = Codes(codes.val_TK[piece], codes.idx_TK[piece])
        _encode(batch.tokens(piece), weights, bias_F, here, room_NB[thread])

    def reconstruct(piece: slice, _thread: int) -> None:
        here, b_D = Codes(codes.val_TK[piece], codes.idx_TK[piece]), weights.b_D
        with part("decode"):
            residual(
                *here, batch.x_TD[piece], weights.w_dec_FD, b_D, e_TD[piece], dot_TK[piece], sse_T[piece]
            )

    each(pieces, find_codes, len(room_NB))
    codes, n_active = own_codes(codes, team)
    if team.latents.size == 1:
        each(pieces, reconstruct)  # a pass of its own: the scores would drive the decoder out of the cache
    else:
        with part("decode"):
            e, dot_TK = residual_of_team(codes, batch.x_TD, weights.w_dec_FD, weights.b_D, team)
            sse_T, e_TD = e.square().sum(1), e.to(e_TD.dtype)
    sse = sse_T.sum()
    if weights.quantised_FD is not None:  # no comparison of scores finds a NaN
        n_infinite = (~torch.isfinite(weights.quantised_FD.norm_N + bias_F)).sum()
        sse = sse.where(team.latents.sum_(n_infinite) == 0, torch.nan)
    return Forward(codes, e_TD, dot_TK, sse, n_active, bias_F)


def _encode(batch: Batch, weights: Weights, bias_F: Tensor, codes: Codes, room_B: Tensor) -> None:
    """Fill in the codes of a chunk."""
    (val_TK, idx_TK), rows_TD, product_FD = codes, batch.product_TD, weights.product_FD
    tokens, latents = batch.quantised_TD, weights.quantised_FD
    n_tokens, n_latents = len(rows_TD), len(product_FD)
    if tokens is None or latents is None:
        room_TF = room_B.view(rows_TD.dtype)[: n_tokens * n_latents].view(n_tokens, n_latents)
        val_TK[:], idx_TK[:] = encode(rows_TD, product_FD, bias_F, val_TK.shape[1], room_TF)
        return
    scores_TF = room_B.view(torch.int32)[: n_tokens * n_latents].view(n_tokens, n_latents)
    with part("encode"):
        torch._int_mm(tokens.codes_ND, latents.codes_ND.T, out=scores_TF)
    with part("top-k"):
        select(scores_TF, tokens, latents, rows_TD, product_FD, bias_F, val_TK, idx_TK)


backward = one_in_torch()(partial(rows.backward, ways=rows.Ways(sort_pairs, gradients)))
"""As `rows.backward`."""

AUXK = auxk.Ways(keep_largest, keep_active)

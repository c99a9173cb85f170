"""`Cpu`: a step in loops that numba compiles.

Where the CPU multiplies 8-bit integers fast, the product is made of these, and its result only chooses
which latents are scored exactly; elsewhere the product is torch's. The inputs and the residual are gathered
in the product's dtype; sums are float32.
"""

import torch
from torch import Tensor

from saemill.train.backends.auxk import DeadRows
from saemill.train.backends.base import Batch, Parameters, Task, Weights, chunks
from saemill.train.backends.cpu.loops.auxk import keep_active, keep_largest
from saemill.train.backends.cpu.loops.bias import fold_bias
from saemill.train.backends.cpu.loops.quantise import LEAST_COLUMNS, empty
from saemill.train.backends.cpu.loops.residual import residual
from saemill.train.backends.cpu.loops.select import select
from saemill.train.backends.cpu.threads import each, number, one_in_torch
from saemill.train.backends.cpu.update import update
from saemill.train.backends.sparse import Codes, Forward, Sparse, encode, own_codes, residual_of_team
from saemill.train.backends.team import ALONE, Team
from saemill.train.memory import zeros
from saemill.train.profile import region

CHUNK_TOKENS = 1024
CHUNK_BYTES = 1 << 26
"""Most bytes of a thread's scores: a shorter chunk reads the weights too often."""
SCORE_BYTES = 4
"""Bytes of a score; a pre-activation takes no more."""


def multiplies_8_bits(d: int) -> bool:
    """Tell whether this CPU sums 8-bit products by one instruction, and rows have enough columns for them."""
    return d >= LEAST_COLUMNS and bool(torch.cpu._is_vnni_supported())


class Cpu(Sparse):
    """Loops for CPUs, each token and each latent computed alone: results do not depend on the threads.

    Args:
        dtype: of the encoder's product.
        team: the processes that share the work.
    """

    name = "numba"

    def __init__(self, dtype: torch.dtype, team: Team = ALONE) -> None:
        super().__init__(dtype, team)
        self._scratch = torch.empty(0, 0, dtype=torch.uint8)

    def weights(self, n_latents: int, d: int, device: torch.device, further: tuple[str, ...] = ()) -> Weights:
        """Make the memory of one SAE, all zeros, as `Backend.weights`."""
        w_enc_FD, w_dec_FD = zeros(n_latents, d), zeros(n_latents, d)
        own_F = {name: torch.zeros(n_latents) for name in further}
        parameters = Parameters(w_enc_FD, torch.zeros(n_latents), w_dec_FD, torch.zeros(d), own_F)
        product_FD = w_enc_FD if self.dtype == torch.float32 else zeros(n_latents, d, dtype=self.dtype)
        quantised = empty(n_latents, d) if multiplies_8_bits(d) else None
        return Weights(parameters, product_FD, w_dec_FD, quantised)

    @one_in_torch()
    def prepare(self, x_TD: Tensor) -> Batch:
        """Make the copies that this machine's product needs, as `Backend.prepare`."""
        product_TD = x_TD.to(self.dtype)
        if not multiplies_8_bits(x_TD.shape[1]):
            return Batch(x_TD, product_TD)
        quantised = empty(*x_TD.shape)
        with region("copy"):
            pieces = _pieces(len(x_TD), CHUNK_TOKENS)
            each(pieces, lambda piece, _: quantised.rows(piece).fill(product_TD[piece]))
        return Batch(x_TD, product_TD, quantised)

    @one_in_torch()
    def forward(self, batch: Batch, weights: Weights, k: int) -> Forward:
        """Encode and reconstruct; the codes' values are float32 sums, not rounded to the product's dtype."""
        n_tokens, (_, b_enc_F, w_dec_FD, b_D, _) = len(batch.x_TD), weights.parameters
        bias_F = fold_bias(weights.product_FD, b_enc_F, b_D)
        codes = Codes(torch.empty(n_tokens, k), torch.empty(n_tokens, k, dtype=torch.int64))
        e_TD, dot_TK = torch.empty_like(batch.product_TD), torch.empty(n_tokens, k)
        sse_T = torch.empty(n_tokens)
        most_tokens = max(1, CHUNK_BYTES // (SCORE_BYTES * len(w_dec_FD)))
        pieces = _pieces(n_tokens, min(CHUNK_TOKENS, most_tokens))
        scratch_NB = self._scratch_for(len(w_dec_FD))

        def find_codes(piece: slice, thread: int) -> None:
            here = Codes(codes.val_TK[piece], codes.idx_TK[piece])
            _encode(batch.tokens(piece), weights, bias_F, here, scratch_NB[thread])

        def reconstruct(piece: slice, _thread: int) -> None:
            val_TK, idx_TK = codes.val_TK[piece], codes.idx_TK[piece]
            results = e_TD[piece], dot_TK[piece], sse_T[piece]
            with region("decode"):
                residual(val_TK, idx_TK, batch.x_TD[piece], w_dec_FD, b_D, *results)

        each(pieces, find_codes, len(scratch_NB))
        codes, n_active = own_codes(codes, self.team)
        if self.team.latents.size == 1:
            # A pass of its own: the scores would drive the decoder out of the cache.
            each(pieces, reconstruct)
        else:
            with region("decode"):
                e, dot_TK = residual_of_team(codes, batch, weights, self.team)
                sse_T, e_TD = e.square().sum(1), e.to(e_TD.dtype)
        sse = self._nan_unless_finite(sse_T.sum(), weights, bias_F)
        return Forward(codes, e_TD, dot_TK, sse, n_active, bias_F)

    def _nan_unless_finite(self, sse: Tensor, weights: Weights, bias_F: Tensor) -> Tensor:
        """Make the error NaN where a weight is not finite, which no comparison of 8-bit scores finds."""
        if weights.quantised_FD is None:
            return sse
        n_infinite = (~torch.isfinite(weights.quantised_FD.norm_N + bias_F)).sum()
        return sse.where(self.team.latents.all_reduce(n_infinite) == 0, torch.nan)

    def _scratch_for(self, n_latents: int) -> Tensor:
        """Keep memory for each thread's scores or pre-activations, uint8 [threads, bytes].

        Fresh pages cost more than filling them. What is not used takes none.
        """
        shape = number(), max(CHUNK_BYTES, SCORE_BYTES * n_latents)
        if self._scratch.shape[0] != shape[0] or self._scratch.shape[1] < shape[1]:
            self._scratch = zeros(*shape, dtype=torch.uint8)
        return self._scratch

    def keep_largest(self, pre_TS: Tensor, k: int) -> Tensor:
        """Rectify the k largest entries of each row, as `Sparse.keep_largest`."""
        return keep_largest(pre_TS, k)

    def keep_active(self, dpre_TS: Tensor, acts_TS: Tensor) -> Tensor:
        """Set the gradients of inactive latents to 0, as `Sparse.keep_active`."""
        return keep_active(dpre_TS, acts_TS)

    @one_in_torch()
    def update(self, task: Task, forward: Forward, dead: DeadRows | None) -> Tensor:
        """Take one optimizer step, as `Sparse.update`."""
        return update(task, forward, dead, self.team)


def _pieces(n_tokens: int, most_tokens: int) -> list[slice]:
    """Cut tokens for all threads, no more than so many each at a time."""
    share = -(-n_tokens // number())
    return list(chunks(n_tokens, 1, min(most_tokens, share)))


def _encode(batch: Batch, weights: Weights, bias_F: Tensor, codes: Codes, scratch_B: Tensor) -> None:
    """Fill in the codes of a chunk."""
    (val_TK, idx_TK), rows_TD, product_FD = codes, batch.product_TD, weights.product_FD
    tokens, latents = batch.quantised_TD, weights.quantised_FD
    n_tokens, n_latents = len(rows_TD), len(product_FD)
    if tokens is None or latents is None:
        n_entries = n_tokens * n_latents
        pre_TF = scratch_B[: n_entries * rows_TD.itemsize].view(rows_TD.dtype).view(n_tokens, n_latents)
        val_TK[:], idx_TK[:] = encode(rows_TD, product_FD, bias_F, val_TK.shape[1], pre_TF)
        return
    scores_TF = scratch_B[: n_tokens * n_latents * SCORE_BYTES].view(torch.int32).view(n_tokens, n_latents)
    with region("encode"):
        torch._int_mm(tokens.codes_ND, latents.codes_ND.T, out=scores_TF)
    with region("top-k"):
        select(scores_TF, tokens, latents, rows_TD, product_FD, bias_F, val_TK, idx_TK)

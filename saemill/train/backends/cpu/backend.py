"""`Cpu`: a step in loops that numba compiles.

Where 8-bit products are the faster way (`product.py`), the product is made of these, and its result only
chooses which latents are scored exactly; elsewhere the product is torch's. The inputs and the residual are
gathered in the product's dtype; sums are float32.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from saemill.common.sae.abs_topk import abs_topk
from saemill.common.sae.groupmax import groupmax
from saemill.common.sae.topk import topk
from saemill.train.backends.architecture import Slopes
from saemill.train.backends.auxk import DeadRows
from saemill.train.backends.base import Batch, Task, Weights, chunks
from saemill.train.backends.codes import Codes, Groups, Largest, slots
from saemill.train.backends.cpu.loops.above import above, above_by_scores
from saemill.train.backends.cpu.loops.auxk import keep_active, keep_largest
from saemill.train.backends.cpu.loops.bias import fold_bias
from saemill.train.backends.cpu.loops.quantise import Quantised, empty
from saemill.train.backends.cpu.loops.residual import residual, residual_of_groups, residual_of_layers
from saemill.train.backends.cpu.loops.rows import slots_used
from saemill.train.backends.cpu.loops.select import select
from saemill.train.backends.cpu.product import chooses_by_8_bits
from saemill.train.backends.cpu.threads import each, number, one_in_torch
from saemill.train.backends.cpu.update import update
from saemill.train.backends.parameters import Parameters, Shape
from saemill.train.backends.sparse import Forward, Sparse, groups_of_team, residual_of_team
from saemill.train.backends.team import ALONE, Team
from saemill.train.memory import zeros
from saemill.train.profile import region

CHUNK_TOKENS = 1024
CHUNK_BYTES = 1 << 26
"""Most bytes of a thread's scores: a shorter chunk reads the weights too often."""
SCORE_BYTES = 4
"""Bytes of a score; a pre-activation takes no more."""


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
        self._n_slots = 128
        self._by_8_bits: set[tuple[int, int]] = set()
        """Latents and columns of the SAEs whose codes 8-bit products choose."""

    def describe(self) -> str:
        """Describe how it multiplies, as `Backend.describe`."""
        widths = ", ".join(f"{n_latents:,}" for n_latents in sorted({n for n, _ in self._by_8_bits}))
        return super().describe() + (f", codes of {widths} latents from 8-bit products" if widths else "")

    def weights(self, shape: Shape, device: torch.device) -> Weights:
        """Make the memory of one SAE, all zeros, as `Backend.weights`."""
        parameters = Parameters.of({name: zeros(*s) for name, s in shape.of_each.items()}, shape)
        w_enc_FD, (n_latents, d) = parameters.w_enc_FD, parameters.w_enc_FD.shape
        product_FD = w_enc_FD if self.dtype == torch.float32 else zeros(n_latents, d, dtype=self.dtype)
        if not chooses_by_8_bits(n_latents // shape.n_layers, d, self.dtype):
            return Weights(parameters, product_FD, parameters.w_dec_FD)
        self._by_8_bits.add((n_latents // shape.n_layers, d))
        return Weights(parameters, product_FD, parameters.w_dec_FD, empty(n_latents, d))

    @one_in_torch()
    def prepare(self, x_TD: Tensor, y_TE: Tensor | None = None) -> Batch:
        """Make the copies that the products of the SAEs need, as `Backend.prepare`."""
        product_TD = x_TD.to(self.dtype)
        if x_TD.shape[1] not in {d for _, d in self._by_8_bits}:
            return Batch(x_TD, product_TD, y_TE=y_TE)
        quantised = empty(*x_TD.shape)
        with region("copy"):
            pieces = _pieces(len(x_TD), CHUNK_TOKENS)
            each(pieces, lambda piece, _: quantised.rows(piece).fill(product_TD[piece]))
        return Batch(x_TD, product_TD, quantised, y_TE)

    @one_in_torch()
    def bias(self, weights: Weights) -> Tensor:
        """Compute it with sums in float32, as `Sparse.bias`."""
        return fold_bias(weights.product_FD, weights.parameters.b_enc_F, weights.parameters.offset_D)

    @one_in_torch()
    def largest(self, batch: Batch, weights: Weights, bias_F: Tensor, rule: Largest) -> Codes:
        """Find codes, as `Sparse.largest`; they are float32 sums, not rounded to the product's dtype."""
        n_tokens, k = len(batch.x_TD), rule.k
        codes = Codes(torch.empty(n_tokens, k), torch.empty(n_tokens, k, dtype=torch.int64))

        def find(piece: slice, scores_TF: Tensor) -> None:
            val_TK, idx_TK = codes.val_TK[piece], codes.idx_TK[piece]
            if scores_TF.dtype == torch.int32:
                select(scores_TF, *_rows(batch, weights, piece), bias_F, val_TK, idx_TK, rule.is_signed)
            else:
                values_TK, idx_TK[:] = (abs_topk if rule.is_signed else topk)(scores_TF, k)
                val_TK.copy_(values_TK)

        self._score(batch, weights, bias_F, find)
        return codes

    @one_in_torch()
    def largest_of_groups(self, batch: Batch, weights: Weights, bias_F: Tensor, k: int) -> Codes:
        """Find codes, as `Sparse.largest_of_groups`, of pre-activations rounded to the product's dtype."""
        n_tokens, n_latents, bias = len(batch.x_TD), len(bias_F), bias_F.to(self.dtype)
        codes = Codes(torch.empty(n_tokens, k), torch.empty(n_tokens, k, dtype=torch.int64))

        def find(piece: slice, _thread: int) -> None:
            with region("encode"):
                pre_TF = torch.addmm(bias, batch.product_TD[piece], weights.product_FD.T)
            with region("top-k"):
                values_TK, codes.idx_TK[piece] = groupmax(pre_TF, k)
                codes.val_TK[piece] = values_TK

        most_tokens = max(1, CHUNK_BYTES // (self.dtype.itemsize * n_latents))
        each(_pieces(n_tokens, min(CHUNK_TOKENS, most_tokens)), find)
        return codes

    @one_in_torch()
    def above(
        self, batch: Batch, weights: Weights, bias_F: Tensor, floor_F: Tensor, most_codes: float
    ) -> Codes | None:
        """Find pre-activations above floors, as `Sparse.above`; values as in `largest`.

        Memory is made for as many slots as the last call needed, and for more where they do not do.
        """
        n_tokens, n_slots = len(batch.x_TD), min(self._n_slots, len(bias_F))
        codes = Codes(
            torch.zeros(n_tokens, n_slots),
            torch.zeros(n_tokens, n_slots, dtype=torch.int64),
            n_T=(n_T := torch.empty(n_tokens, dtype=torch.int64)),
        )

        def find(piece: slice, scores_TF: Tensor) -> None:
            filled = codes.val_TK[piece], codes.idx_TK[piece], n_T[piece]
            if scores_TF.dtype == torch.int32:
                above_by_scores(scores_TF, *_rows(batch, weights, piece), bias_F, floor_F, *filled)
            else:
                above(scores_TF, floor_F, *filled)

        self._score(batch, weights, bias_F, find)
        if int(n_T.sum()) > most_codes:
            return None
        needed = slots(int(n_T.max()))
        if needed > n_slots and n_slots < len(bias_F):
            self._n_slots = needed * 5 // 4
            return self.above(batch, weights, bias_F, floor_F, most_codes)
        val_TK, idx_TK = codes.val_TK[:, :needed].contiguous(), codes.idx_TK[:, :needed].contiguous()
        return Codes(val_TK, idx_TK, n_T=n_T)

    def _score(
        self, batch: Batch, weights: Weights, bias_F: Tensor, take: Callable[[slice, Tensor], None]
    ) -> None:
        """Multiply tokens with all latents, and let `take` have the results of each piece of them.

        These are 8-bit scores, int32, where the machine has them; else pre-activations in the product's
        dtype.
        """
        n_tokens, n_latents = len(batch.x_TD), len(bias_F)
        scratch_NB, bias = self._scratch_for(n_latents), bias_F.to(self.dtype)
        tokens, latents = batch.quantised_TD, weights.quantised_FD

        def score(piece: slice, thread: int) -> None:
            n_here = piece.stop - piece.start
            dtype = self.dtype if tokens is None or latents is None else torch.int32
            scores = scratch_NB[thread][: n_here * n_latents * dtype.itemsize].view(dtype)
            scores_TF = scores.view(n_here, n_latents)
            with region("encode"):
                if tokens is not None and latents is not None:
                    torch._int_mm(tokens.codes_ND[piece], latents.codes_ND.T, out=scores_TF)
                else:
                    torch.addmm(bias, batch.product_TD[piece], weights.product_FD.T, out=scores_TF)
            with region("top-k"):
                take(piece, scores_TF)

        most_tokens = max(1, CHUNK_BYTES // (SCORE_BYTES * n_latents))
        each(_pieces(n_tokens, min(CHUNK_TOKENS, most_tokens)), score, len(scratch_NB))

    @one_in_torch()
    def reconstruct(self, codes: Codes, batch: Batch, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
        """Decode, as `Sparse.reconstruct`, in a pass of its own: scores would drive rows out of the cache."""
        p, n_tokens, target_TD = weights.parameters, len(batch.x_TD), batch.target_TE
        if self.team.latents.size > 1:
            with region("decode"):
                e_TD, dot_TK = residual_of_team(codes, batch, weights, self.team)
                return e_TD.to(self.dtype), dot_TK, e_TD.square().sum()
        e_TD, dot_TK = torch.empty_like(batch.target_TE, dtype=self.dtype), torch.zeros_like(codes.val_TK)
        one_by_one: Callable[..., None] = residual
        sse_T, idx_TK, used = torch.empty(n_tokens), codes.idx_TK, slots_used(codes)
        if p.n_layers > 1:
            n_each = len(p.b_enc_F) // p.n_layers
            one_by_one, idx_TK = residual_of_layers, idx_TK % n_each
            used = codes.ends_of_layers(p.n_layers, n_each)

        def decode(piece: slice, _thread: int) -> None:
            inputs = codes.val_TK[piece], idx_TK[piece], used[piece], target_TD[piece]
            with region("decode"):
                one_by_one(*inputs, p.w_dec_FD, p.b_D, e_TD[piece], dot_TK[piece], sse_T[piece])

        each(_pieces(n_tokens, CHUNK_TOKENS), decode)
        return e_TD, dot_TK, sse_T.sum()

    @one_in_torch()
    def reconstruct_groups(
        self, codes: Codes, groups: Groups, batch: Batch, weights: Weights
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Decode group by group, as `Sparse.reconstruct_groups`."""
        if self.team.latents.size > 1:
            e_TD, dot_TK, sse_G, rows_GTD = groups_of_team(codes, groups, batch, weights, self.team)
            return e_TD.to(self.dtype), dot_TK, sse_G, rows_GTD.to(self.dtype)
        p, n_tokens, weights_G = weights.parameters, len(batch.x_TD), torch.tensor(groups.weights)
        group_TK = codes.group_TK(groups).where(codes.active_TK, len(weights_G))
        ends_TG = torch.stack([(group_TK <= g).sum(1) for g in range(len(weights_G))], 1)
        e_TD, dot_TK = torch.empty_like(batch.target_TE, dtype=self.dtype), torch.zeros_like(codes.val_TK)
        rows_GTD = e_TD.new_empty(len(weights_G), *e_TD.shape)
        sse_TG = torch.empty(n_tokens, len(weights_G))

        def decode(piece: slice, _thread: int) -> None:
            inputs = (
                codes.val_TK[piece],
                codes.idx_TK[piece],
                ends_TG[piece],
                weights_G,
                batch.target_TE[piece],
            )
            filled = e_TD[piece], dot_TK[piece], sse_TG[piece], rows_GTD
            with region("decode"):
                residual_of_groups(*inputs, p.w_dec_FD, p.b_D, groups.shown, piece.start, *filled)

        each(_pieces(n_tokens, CHUNK_TOKENS), decode)
        return e_TD, dot_TK, sse_TG.sum(0), rows_GTD

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
    def update(self, task: Task, forward: Forward, slopes: Slopes, dead: DeadRows | None) -> Tensor:
        """Take one optimizer step, as `Sparse.update`."""
        return update(task, forward, slopes, dead, self.team)


def _pieces(n_tokens: int, most_tokens: int) -> list[slice]:
    """Cut tokens for all threads, no more than so many each at a time."""
    share = -(-n_tokens // number())
    return list(chunks(n_tokens, 1, min(most_tokens, share)))


def _rows(batch: Batch, weights: Weights, piece: slice) -> tuple[Quantised, Quantised, Tensor, Tensor]:
    """Return what 8-bit scores of a piece were made from: quantised tokens and latents, and their rows."""
    assert batch.quantised_TD is not None
    assert weights.quantised_FD is not None
    tokens = batch.quantised_TD.rows(piece)
    return tokens, weights.quantised_FD, batch.product_TD[piece], weights.product_FD

"""`Gpu`: a step in Triton's kernels.

The residual is kept in the product's dtype, unscaled; sums are float32. For the k largest of each token the
host never waits; for thresholds and batch-wide cutoffs it waits for the number of codes.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from saemill.common.sae.groupmax import groupmax
from saemill.common.sae.topk import topk
from saemill.train.backends.architecture import Slopes
from saemill.train.backends.auxk import DeadRows
from saemill.train.backends.base import Batch, Sums, Task, Weights, chunks
from saemill.train.backends.codes import Codes, Groups, Largest, slots
from saemill.train.backends.gpu.kernels.above import above
from saemill.train.backends.gpu.kernels.groups import residual_of_groups
from saemill.train.backends.gpu.kernels.residual import MAX_K, residual
from saemill.train.backends.gpu.kernels.select import select
from saemill.train.backends.gpu.update import update
from saemill.train.backends.parameters import Parameters, Shape
from saemill.train.backends.sparse import Forward, Sparse, fold_bias, groups_of_team, residual_of_team
from saemill.train.backends.team import ALONE, Team
from saemill.train.optim.optimizer import Adam, Sgd
from saemill.train.profile import region

CHUNK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 29}
"""Most bytes of pre-activations at once: what fills a GPU; less in Triton's interpreter."""

FIRST_SLOTS = 128
"""Codes above floors that a token has room for at first."""


class Gpu(Sparse):
    """Kernels for GPUs: no atomics, so the same inputs give the same bits.

    Args:
        dtype: of the encoder's product.
        team: the processes that share the work.
    """

    name = "triton"

    def __init__(self, dtype: torch.dtype, team: Team = ALONE) -> None:
        super().__init__(dtype, team)
        self._scratch = torch.empty(0, dtype=dtype)
        self._n_slots = FIRST_SLOTS

    def weights(self, shape: Shape, device: torch.device) -> Weights:
        """Make the memory of one SAE, all zeros, as `Backend.weights`."""
        parameters = Parameters.zeros(shape, device)
        # `to` gives float32 weights back as they are: there they are their own copies.
        return Weights(parameters, parameters.w_enc_FD.to(self.dtype), parameters.w_dec_FD.to(self.dtype))

    def prepare(self, x_TD: Tensor, y_TE: Tensor | None = None) -> Batch:
        """Round a batch for products, as `Backend.prepare`."""
        return Batch(x_TD, x_TD.to(self.dtype), y_TE=y_TE)

    def step(self, task: Task) -> Sums:
        """Take a step, as `Backend.step`; dense where there is no kernel for it: with other optimizers, if it
        is clipped or the decoder frozen, where x and what is predicted differ in width, and with free rows of
        several sites."""
        p = task.weights.parameters
        has_kernels = isinstance(task.optimizer, Adam | Sgd) and task.rates.clip_norm is None
        has_kernels &= task.architecture.unit_rows or not p.widths
        if has_kernels and not task.is_decoder_frozen and p.w_enc_FD.shape == p.w_dec_FD.shape:
            return super().step(task)
        return self._dense_step(task)

    def bias(self, weights: Weights) -> Tensor:
        """Compute it, as `Sparse.bias`."""
        return fold_bias(weights.product_FD, weights.parameters.b_enc_F, weights.parameters.offset_D)

    def largest(self, batch: Batch, weights: Weights, bias_F: Tensor, rule: Largest) -> Codes:
        """Find codes, as `Sparse.largest`; idx_TK is int32, ascending, ties going to the lowest latent."""
        return self._k_codes(batch, weights, bias_F, rule.k, partial(select, is_signed=rule.is_signed))

    def largest_of_groups(self, batch: Batch, weights: Weights, bias_F: Tensor, k: int) -> Codes:
        """Find codes by torch's own maxima, as `Sparse.largest_of_groups`; idx_TK is int32."""
        return self._k_codes(batch, weights, bias_F, k, groupmax)

    def _k_codes(
        self,
        batch: Batch,
        weights: Weights,
        bias_F: Tensor,
        k: int,
        choose: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    ) -> Codes:
        """Find k codes of each token by what chooses them from pre-activations."""
        n_tokens, device = len(batch.x_TD), bias_F.device
        val_TK = torch.empty(n_tokens, k, device=device)
        idx_TK = torch.empty(n_tokens, k, dtype=torch.int32, device=device)
        for chunk, pre_TF in self._pre_activations(batch, weights, bias_F):
            with region("top-k"):
                val_TK[chunk], idx_TK[chunk] = choose(pre_TF, k)
        return Codes(val_TK, idx_TK)

    def above(
        self, batch: Batch, weights: Weights, bias_F: Tensor, floor_F: Tensor, most_codes: float
    ) -> Codes | None:
        """Find pre-activations above floors, as `Sparse.above`; idx_TK as in `largest`.

        Memory is made for as many slots as the last call needed, and for more where they do not do. The host
        waits once, for how many there are.
        """
        n_tokens, device, n_slots = len(batch.x_TD), bias_F.device, min(self._n_slots, len(bias_F))
        val_TK = torch.zeros(n_tokens, n_slots, device=device)
        idx_TK = torch.zeros(n_tokens, n_slots, dtype=torch.int32, device=device)
        n_T = torch.empty(n_tokens, dtype=torch.int64, device=device)
        for chunk, pre_TF in self._pre_activations(batch, weights, bias_F):
            with region("top-k"):
                above(pre_TF, floor_F, val_TK[chunk], idx_TK[chunk], n_T[chunk])
        n_codes, n_most = torch.stack((n_T.sum(), n_T.max())).tolist()
        if n_codes > most_codes:
            return None
        needed = slots(n_most)
        if n_most > n_slots:
            self._n_slots = needed * 5 // 4
            return self.above(batch, weights, bias_F, floor_F, most_codes)
        return Codes(val_TK[:, :needed].contiguous(), idx_TK[:, :needed].contiguous(), n_T=n_T)

    def _pre_activations(
        self, batch: Batch, weights: Weights, bias_F: Tensor
    ) -> Iterator[tuple[slice, Tensor]]:
        """Multiply some tokens at a time with all latents, in memory that the next ones will take."""
        bias, scratch_TF = bias_F.to(self.dtype), self._scratch_for(len(bias_F), bias_F.device)
        for chunk in chunks(len(batch.x_TD), 1, len(scratch_TF)):
            with region("encode"):
                rows_TD = batch.product_TD[chunk]
                pre_TF = scratch_TF[: len(rows_TD)]
                torch.addmm(bias, rows_TD, weights.product_FD.T, out=pre_TF)
            yield chunk, pre_TF

    def reconstruct(self, codes: Codes, batch: Batch, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
        """Decode, as `Sparse.reconstruct`: one gather of decoder rows gives the residual and its products.

        Where tokens have other numbers of codes, or very many, rows are gathered a few at a time, twice.
        Where the team splits the latents, the residual is known only after a sum over the team, so both are
        made in torch.
        """
        val_TK, idx_TK, _, n_T = codes
        with region("decode"):
            if self.team.latents.size > 1:
                e_TD, dot_TK = residual_of_team(_wide(codes), batch, weights, self.team)
                return e_TD.to(self.dtype), dot_TK, e_TD.square().sum()
            decoder = weights.gathered_FD, weights.parameters.b_D, self._target(batch)
            if n_T is None and val_TK.shape[1] <= MAX_K:
                e_TD, dot_TK, sse_T = residual(val_TK, idx_TK, *decoder)
                return e_TD, dot_TK, sse_T.sum()
            ends_T = torch.full_like(idx_TK[:, 0], val_TK.shape[1]) if n_T is None else n_T.int()
            e_TD, dot_TK, sse_T1, _ = residual_of_groups(val_TK, idx_TK, ends_T[:, None], None, 0, *decoder)
            return e_TD, dot_TK, sse_T1.sum()

    def reconstruct_groups(
        self, codes: Codes, groups: Groups, batch: Batch, weights: Weights
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Decode group by group, as `Sparse.reconstruct_groups`."""
        with region("decode"):
            if self.team.latents.size > 1:
                found = groups_of_team(_wide(codes), groups, batch, weights, self.team)
                return found[0].to(self.dtype), *found[1:3], found[3].to(self.dtype)
            n_groups = len(groups.ends)
            group_TK = codes.group_TK(groups).where(codes.active_TK, n_groups)
            ends_TG = torch.stack([(group_TK <= g).sum(1, dtype=torch.int32) for g in range(n_groups)], 1)
            weights_G = torch.tensor(groups.weights, device=ends_TG.device)
            decoder = weights.gathered_FD, weights.parameters.b_D, self._target(batch)
            e_TD, dot_TK, sse_TG, rows_GTD = residual_of_groups(
                codes.val_TK, codes.idx_TK, ends_TG, weights_G, groups.shown, *decoder
            )
            assert rows_GTD is not None
            return e_TD, dot_TK, sse_TG.sum(0), rows_GTD

    def _target(self, batch: Batch) -> Tensor:
        """Return what is to be reconstructed or predicted, in the product's dtype."""
        return batch.product_TD if batch.y_TE is None else batch.y_TE.to(self.dtype)

    def _scratch_for(self, n_latents: int, device: torch.device) -> Tensor:
        """Keep memory for a chunk's pre-activations, [T, F]."""
        n_tokens = max(
            1, CHUNK_BYTES["cuda" if device.type == "cuda" else "cpu"] // (n_latents * self.dtype.itemsize)
        )
        if self._scratch.numel() < n_tokens * n_latents or self._scratch.device != device:
            self._scratch = torch.empty(n_tokens * n_latents, dtype=self.dtype, device=device)
        return self._scratch[: n_tokens * n_latents].view(n_tokens, n_latents)

    def keep_largest(self, pre_TS: Tensor, k: int) -> Tensor:
        """Rectify the k largest entries of each row, as `Sparse.keep_largest`."""
        values, places = topk(pre_TS, k)
        return torch.zeros_like(pre_TS).scatter_(1, places, values)

    def keep_active(self, dpre_TS: Tensor, acts_TS: Tensor) -> Tensor:
        """Set the gradients of inactive latents to 0, as `Sparse.keep_active`."""
        return dpre_TS.mul_(acts_TS != 0).float().sum(0)

    def update(self, task: Task, forward: Forward, slopes: Slopes, dead: DeadRows | None) -> Tensor:
        """Take one optimizer step, as `Sparse.update`; nothing is read back to the host."""
        return update(task, forward, slopes, dead, self.team)


def _wide(codes: Codes) -> Codes:
    """Give latents numbers of 64 bits, which torch's operations ask for."""
    return codes._replace(idx_TK=codes.idx_TK.long())

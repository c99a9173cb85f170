"""`Gpu`: a step in Triton's kernels.

The residual is kept in the product's dtype, unscaled; sums are float32. The host never waits.
"""

import torch
from torch import Tensor

from saemill.common.sae.topk import topk
from saemill.train.backends.auxk import DeadRows
from saemill.train.backends.base import (
    Batch,
    Codes,
    Groups,
    Largest,
    Parameters,
    Rates,
    Slopes,
    Sums,
    Task,
    Weights,
    chunks,
)
from saemill.train.backends.gpu.kernels.hyper import Hyper, hyper_values
from saemill.train.backends.gpu.kernels.residual import residual
from saemill.train.backends.gpu.kernels.rows import Latents, Moments, decoder_bias_gradient, update_rows
from saemill.train.backends.gpu.kernels.segments import AuxGradients, latent_sums, segments
from saemill.train.backends.gpu.kernels.select import select
from saemill.train.backends.sparse import Forward, Sparse, fold_bias, residual_of_team
from saemill.train.backends.team import ALONE, Team
from saemill.train.optim.optimizer import ADAM_EPS, SGD_MOMENTUM, Adam, Sgd
from saemill.train.profile import region

CHUNK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 29}
"""Most bytes of pre-activations at once: what fills a GPU; less in Triton's interpreter."""


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

    def weights(self, n_latents: int, d: int, device: torch.device, further: tuple[str, ...] = ()) -> Weights:
        """Make the memory of one SAE, all zeros, as `Backend.weights`."""
        parameters = Parameters.zeros(n_latents, d, device, further)
        # `to` gives float32 weights back as they are: there they are their own copies.
        return Weights(parameters, parameters.w_enc_FD.to(self.dtype), parameters.w_dec_FD.to(self.dtype))

    def prepare(self, x_TD: Tensor) -> Batch:
        """Round a batch for products, as `Backend.prepare`."""
        return Batch(x_TD, x_TD.to(self.dtype))

    def step(self, task: Task) -> Sums:
        """Take a step, as `Backend.step`; dense where there are no kernels yet."""
        architecture, p = task.architecture, task.weights.parameters
        steps_rows = isinstance(task.optimizer, Adam | Sgd) and task.rates.clip_norm is None
        if architecture.groups or not isinstance(architecture.rule(p), Largest) or not steps_rows:
            return self._dense_step(task)
        return super().step(task)

    def bias(self, weights: Weights) -> Tensor:
        """Compute it, as `Sparse.bias`."""
        return fold_bias(weights.product_FD, weights.parameters.b_enc_F, weights.parameters.b_D)

    def largest(self, batch: Batch, weights: Weights, bias_F: Tensor, k: int) -> Codes:
        """Find codes, as `Sparse.largest`; idx_TK is int32, ascending, ties going to the lowest latent."""
        product_TD, device, bias = batch.product_TD, bias_F.device, bias_F.to(self.dtype)
        n_tokens = len(product_TD)
        val_TK = torch.empty(n_tokens, k, device=device)
        idx_TK = torch.empty(n_tokens, k, dtype=torch.int32, device=device)
        scratch_TF = self._scratch_for(len(bias_F), device)
        for chunk in chunks(n_tokens, 1, len(scratch_TF)):
            with region("encode"):
                rows_TD = product_TD[chunk]
                pre_TF = scratch_TF[: len(rows_TD)]
                torch.addmm(bias, rows_TD, weights.product_FD.T, out=pre_TF)
            with region("top-k"):
                val_TK[chunk], idx_TK[chunk] = select(pre_TF, k)
        return Codes(val_TK, idx_TK)

    def above(
        self, batch: Batch, weights: Weights, bias_F: Tensor, floor_F: Tensor, most_codes: float
    ) -> Codes | None:
        """Find pre-activations above floors, as `Sparse.above`."""
        raise NotImplementedError

    def reconstruct_groups(
        self, codes: Codes, groups: Groups, batch: Batch, weights: Weights
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Decode group by group, as `Sparse.reconstruct_groups`."""
        raise NotImplementedError

    def reconstruct(self, codes: Codes, batch: Batch, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
        """Decode, as `Sparse.reconstruct`: one gather of decoder rows gives the residual and its products.

        Where the team splits the latents, the residual is known only after a sum over the team, so both are
        made in torch.
        """
        with region("decode"):
            if self.team.latents.size > 1:
                wide = codes._replace(idx_TK=codes.idx_TK.long())
                e_TD, dot_TK = residual_of_team(wide, batch, weights, self.team)
                return e_TD.to(self.dtype), dot_TK, e_TD.square().sum()
            b_D, product_TD = weights.parameters.b_D, batch.product_TD
            e_TD, dot_TK, sse_T = residual(codes.val_TK, codes.idx_TK, weights.gathered_FD, b_D, product_TD)
            return e_TD, dot_TK, sse_T.sum()

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
        return dpre_TS.mul_(acts_TS > 0).float().sum(0)

    def update(self, task: Task, forward: Forward, slopes: Slopes, dead: DeadRows | None) -> Tensor:
        """Take one optimizer step, as `Sparse.update`; nothing is read back to the host."""
        weights, optimizer, healthy = task.weights, task.optimizer, task.healthy
        assert isinstance(optimizer, Adam | Sgd)
        w_enc_FD, b_enc_F, w_dec_FD, b_D, _ = weights.parameters
        n_latents = len(w_enc_FD)
        val_TK, idx_TK, e_TD, dot_TK = *forward.codes[:2], forward.e_TD, forward.dot_TK
        hyper = _hyper(task.rates, optimizer, w_enc_FD.device)
        hyper[Hyper.HEALTHY] = healthy
        aux = None if dead is None else _aux(dead, n_latents)
        with region("sort"):
            pairs = segments(torch.where(val_TK > 0, idx_TK, n_latents), n_latents)
            sums = latent_sums(val_TK, dot_TK, pairs, hyper, aux)
        with region("optimizer"):
            db_D = decoder_bias_gradient(e_TD, sums.db_enc_F, w_enc_FD, hyper, self.team.latents.size)
            self.team.latents.all_reduce(db_D)
            copied = self.dtype != torch.float32
            copies = (weights.product_FD, weights.gathered_FD) if copied else (None, None)
            seed = None
            if isinstance(optimizer, Adam) and optimizer.moment_format != "fp32":
                seed = optimizer.count.int().view(1)
            update_rows(
                Latents(w_enc_FD, b_enc_F, w_dec_FD, *copies),
                _moments(optimizer),
                *(task.batch.product_TD, e_TD, val_TK, dot_TK, b_D, pairs, sums, hyper),
                optimizer="adam" if isinstance(optimizer, Adam) else "sgd",
                seed=seed,
                aux=aux,
            )
            before_D = b_D.clone()
            optimizer.update("b", slice(None), db_D, hyper[Hyper.LR])
            b_D.copy_(torch.where(healthy, b_D, before_D))
        return sums.fired_F


def _hyper(rates: Rates, optimizer: Adam | Sgd, device: torch.device) -> Tensor:
    """Put the numbers of a step where the kernels read them, without waiting. float32 [len(Hyper)]."""
    betas = optimizer.betas if isinstance(optimizer, Adam) else (SGD_MOMENTUM, 0.0)
    values = hyper_values(
        lr=rates.lr,
        step=optimizer.n_steps,
        gradient_scale=rates.grad_scale,
        beta1=betas[0],
        beta2=betas[1],
        eps=ADAM_EPS,
        weight_decay=rates.weight_decay,
    )
    return torch.tensor(values, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _moments(optimizer: Adam | Sgd) -> Moments:
    """List the optimizer's state of the latents as the kernels take it: w_enc, b_enc, w_dec."""
    if isinstance(optimizer, Adam):
        names = ("w_enc", "b_enc", "w_dec")
        state = [kind[name].tensors() for kind in (optimizer.first, optimizer.second) for name in names]
        scales = [tensors[1] for tensors in state if len(tensors) == 2]  # of w_enc and w_dec, in 8 bits
        return Moments(*(tensors[0] for tensors in state), *scales)
    momentum = optimizer.momentum
    return Moments(momentum["w_enc"], momentum["b_enc"], momentum["w_dec"], None, None, None)


def _aux(dead: DeadRows, n_latents: int) -> AuxGradients:
    """Note where in AuxK's gradients a latent's row lies."""
    slot_F = torch.full((n_latents,), -1, dtype=torch.int32, device=dead.dead_S.device)
    slot_F[dead.dead_S] = torch.arange(len(dead.dead_S), dtype=torch.int32, device=slot_F.device)
    return AuxGradients(slot_F, dead.w_enc_SD, dead.b_enc_S, dead.w_dec_SD)

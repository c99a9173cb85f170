"""The two passes of a step with the Triton kernels: what codes.py and rows.py define, on a GPU.

The residual is kept in the product's dtype, unscaled; sums are float32. The host never waits.
"""

import torch
from torch import Tensor

from saemill.train.backends.auxk import DeadRows
from saemill.train.backends.codes import Batch, Codes, Forward, Weights, chunks, fold_bias, own_codes
from saemill.train.backends.codes import residual as residual_of_team
from saemill.train.backends.gpu.kernels.hyper import Hyper, hyper_values
from saemill.train.backends.gpu.kernels.residual import residual
from saemill.train.backends.gpu.kernels.rows import Moments, Parameters, decoder_bias_gradient, update_rows
from saemill.train.backends.gpu.kernels.segments import AuxGradients, latent_sums, segments
from saemill.train.backends.gpu.kernels.select import select
from saemill.train.backends.rows import B, Rates
from saemill.train.backends.team import ALONE, Team
from saemill.train.optim.optimizer import ADAM_EPS, SGD_MOMENTUM, Adam, Optimizer
from saemill.train.profile import part


def forward(batch: Batch, weights: Weights, k: int, room_TF: Tensor, team: Team = ALONE) -> Forward:
    """As `codes.forward`; idx_TK is int32, ascending, ties going to the lowest latent.

    One gather of decoder rows gives the residual and its products with the rows; where the team splits
    the latents, the residual is known only after a sum over the team, so both are made in torch.
    """
    product_TD = batch.product_TD
    n_tokens = len(product_TD)
    bias_F = fold_bias(weights.product_FD, weights.b_enc_F, weights.b_D)
    bias = bias_F.to(product_TD.dtype)
    val_TK = torch.empty(n_tokens, k, device=product_TD.device)
    idx_TK = torch.empty(n_tokens, k, dtype=torch.int32, device=product_TD.device)
    for chunk in chunks(n_tokens, 1, len(room_TF)):
        with part("encode"):
            rows_TD = product_TD[chunk]
            pre_TF = torch.addmm(bias, rows_TD, weights.product_FD.T, out=room_TF[: len(rows_TD)])
        with part("top-k"):
            val_TK[chunk], idx_TK[chunk] = select(pre_TF, k)
    codes, n_active = own_codes(Codes(val_TK, idx_TK), team)
    with part("decode"):
        if team.latents.size > 1:
            wide = Codes(codes.val_TK, codes.idx_TK.long())
            e_TD, dot_TK = residual_of_team(wide, batch.x_TD, weights.w_dec_FD, weights.b_D, team)
            sse, e_TD = e_TD.square().sum(), e_TD.to(product_TD.dtype)
        else:
            e_TD, dot_TK, sse_T = residual(*codes, weights.gathered_FD, weights.b_D, product_TD)
            sse = sse_T.sum()
    return Forward(codes, e_TD, dot_TK, sse, n_active, bias_F)


def backward(
    batch: Batch,
    passed: Forward,
    dead: DeadRows | None,
    weights: Weights,
    optimizer: Optimizer,
    healthy: Tensor,
    hyper: Tensor,
    team: Team = ALONE,
) -> Tensor:
    """As `rows.backward`, with the step's numbers on the device: of `place`."""
    n_latents = len(weights.w_enc_FD)
    (val_TK, idx_TK), e_TD, dot_TK = passed.codes, passed.e_TD, passed.dot_TK
    hyper[Hyper.HEALTHY] = healthy
    aux = None if dead is None else _aux(dead, n_latents)
    with part("sort"):
        pairs = segments(torch.where(val_TK > 0, idx_TK, n_latents), n_latents)
        sums = latent_sums(val_TK, dot_TK, pairs, hyper, aux)
    with part("optimizer"):
        db_D = decoder_bias_gradient(e_TD, sums.db_enc_F, weights.w_enc_FD, hyper, team.latents.size)
        team.latents.sum_(db_D)
        copies = weights.product_FD.dtype != weights.w_enc_FD.dtype
        parameters = Parameters(
            weights.w_enc_FD,
            weights.b_enc_F,
            weights.w_dec_FD,
            weights.product_FD if copies else None,
            weights.gathered_FD if copies else None,
        )
        adam = isinstance(optimizer, Adam)
        seed = None
        if isinstance(optimizer, Adam) and optimizer.second[0].tensors()[0].dtype != torch.float32:
            seed = optimizer.count.int().view(1)
        update_rows(
            parameters,
            _moments(optimizer),
            batch.product_TD,
            e_TD,
            val_TK,
            dot_TK,
            weights.b_D,
            pairs,
            sums,
            hyper,
            optimizer="adam" if adam else "sgd",
            seed=seed,
            aux=aux,
        )
        before_D = weights.b_D.clone()
        optimizer.update(B, slice(None), db_D, hyper[Hyper.LR])
        weights.b_D.copy_(torch.where(healthy, weights.b_D, before_D))
    return sums.fired_F


def place(rates_V: list[Rates], optimizers: list[Optimizer], hyper_VH: Tensor) -> list[Tensor]:
    """Copy the numbers of a step that has begun to where the kernels read them, all variants' at once.

    Args:
        hyper_VH: float32 [V, 16]: rows of 64 bytes, since Triton compiles anew for pointers that are aligned
            otherwise.

    Returns: the first len(Hyper) numbers of its rows.
    """
    values_VH = torch.zeros(hyper_VH.shape, pin_memory=hyper_VH.is_cuda)
    for values_H, rates, optimizer in zip(values_VH, rates_V, optimizers, strict=True):
        values_H[: len(Hyper)] = torch.tensor(_hyper(rates, optimizer))
    hyper_VH.copy_(values_VH, non_blocking=True)
    return list(hyper_VH[:, : len(Hyper)])


def _hyper(rates: Rates, optimizer: Optimizer) -> list[float]:
    betas = optimizer.betas if isinstance(optimizer, Adam) else (SGD_MOMENTUM, 0.0)
    return hyper_values(
        lr=rates.lr,
        step=optimizer.n_steps,
        gradient_scale=rates.gs,
        beta1=betas[0],
        beta2=betas[1],
        eps=ADAM_EPS,
        weight_decay=rates.weight_decay,
    )


def _moments(optimizer: Optimizer) -> Moments:
    """The optimizer's state of the latents, as the kernels take it: w_enc, b_enc, w_dec."""
    if isinstance(optimizer, Adam):
        kept = [moment.tensors() for moment in (*optimizer.first[:B], *optimizer.second[:B])]
        scales = [tensors[1] for tensors in kept if len(tensors) == 2]  # of w_enc and w_dec, in 8 bits
        return Moments(*(tensors[0] for tensors in kept), *scales)
    m_enc, m_b, m_dec = optimizer.momentum[:B]
    return Moments(m_enc, m_b, m_dec, None, None, None)


def _aux(dead: DeadRows, n_latents: int) -> AuxGradients:
    """AuxK's gradients with the places of the dead latents' rows."""
    slot_F1 = torch.full((n_latents + 1,), -1, dtype=torch.int32, device=dead.dead_S.device)
    slot_F1[dead.dead_S] = torch.arange(len(dead.dead_S), dtype=torch.int32, device=slot_F1.device)
    return AuxGradients(slot_F1[:n_latents], dead.w_enc_SD, dead.b_enc_S, dead.w_dec_SD)

"""The backward pass and the update of one SAE on a GPU: pairs sorted by latent, then each latent at once."""

import torch
from torch import Tensor

from saemill.train.backends.architecture import Slopes
from saemill.train.backends.auxk import DeadRows
from saemill.train.backends.base import Rates, Task
from saemill.train.backends.codes import Codes, Groups
from saemill.train.backends.gpu.kernels.hyper import Hyper, hyper_values
from saemill.train.backends.gpu.kernels.rows import Latents, Moments, update_rows
from saemill.train.backends.gpu.kernels.segments import (
    AuxGradients,
    LatentSums,
    Segments,
    Terms,
    latent_sums,
    segments,
)
from saemill.train.backends.sparse import Forward, gradients_of_whole
from saemill.train.backends.team import Team
from saemill.train.optim.optimizer import ADAM_EPS, SGD_MOMENTUM, Adam, Sgd
from saemill.train.profile import region


def update(task: Task, forward: Forward, slopes: Slopes, dead: DeadRows | None, team: Team) -> Tensor:
    """Take one optimizer step of all parameters, in place; nothing is read back to the host.

    Args:
        task: what to step, over T tokens; nothing is changed where it is not healthy.
        forward: of the same batch.
        slopes: gradients at its pre-activations and at further parameters.
        dead: gradients of dead latents, to be added.
        team: where it splits the latents, weights and codes are this process's.

    Returns: bool [F], which latents fired.
    """
    optimizer, p = task.optimizer, task.weights.parameters
    assert isinstance(optimizer, Adam | Sgd)
    hyper = _hyper(task.rates, optimizer, p.b_D.device)
    hyper[Hyper.HEALTHY] = task.healthy
    aux, dpre_TK = None if dead is None else _aux(dead, len(p.b_enc_F)), slopes.dpre_TK.contiguous()
    with region("sort"):
        pairs, sums = _sorted(task, forward, dpre_TK, hyper, aux)
    with region("optimizer"):
        rows_GTD = forward.e_TD[None] if forward.rows_GTD is None else forward.rows_GTD
        whole = gradients_of_whole(task, rows_GTD[0], sums.db_enc_F, team)
        if not task.architecture.unit_rows:
            sums = sums._replace(toward_F=None if slopes.toward_FL is None else slopes.toward_FL[:, 0])
        if slopes.db_enc_F is not None:
            sums = sums._replace(db_enc_F=_with_dead(slopes.db_enc_F, dead))
        _step_latents(task, forward, dpre_TK, rows_GTD, pairs, sums, hyper, aux)
        _step_others(task, whole | dict(slopes.further_F), hyper)
    return sums.fired_F


def _sorted(
    task: Task, forward: Forward, dpre_TK: Tensor, hyper: Tensor, aux: AuxGradients | None
) -> tuple[Segments, LatentSums]:
    """Sort the pairs that have a code or a gradient by latent, and sum their numbers."""
    val_TK, n_latents = forward.codes.val_TK, len(task.weights.product_FD)
    dot_TK = forward.dot_TK if task.architecture.unit_rows else None
    counts_TK = forward.codes.active_TK | (dpre_TK != 0)
    pairs = segments(torch.where(counts_TK, forward.codes.idx_TK, n_latents), n_latents)
    groups = forward.groups
    n_shown = groups.ends[groups.shown] if groups and groups.by_rank else None
    return pairs, latent_sums(val_TK, dot_TK, dpre_TK, pairs, hyper, aux, n_shown)


def _step_latents(
    task: Task,
    forward: Forward,
    dpre_TK: Tensor,
    rows_GTD: Tensor,
    pairs: Segments,
    sums: LatentSums,
    hyper: Tensor,
    aux: AuxGradients | None,
) -> None:
    """Step the rows and biases of all latents."""
    weights, optimizer, codes = task.weights, task.optimizer, forward.codes
    assert isinstance(optimizer, Adam | Sgd)
    copied = weights.product_FD.dtype != torch.float32
    copies = (weights.product_FD, weights.gathered_FD) if copied else (None, None)
    seed = None
    if isinstance(optimizer, Adam) and optimizer.moment_format != "fp32":
        seed = optimizer.count.int().view(1)
    update_rows(
        Latents(*weights.parameters[:3], *copies),
        _moments(optimizer),
        Terms(
            task.batch.product_TD,
            rows_GTD.flatten(0, 1),
            codes.val_TK,
            dpre_TK,
            _error_rows(codes, forward.groups),
        ),
        weights.parameters.offset_D,
        pairs,
        sums,
        hyper,
        optimizer="adam" if isinstance(optimizer, Adam) else "sgd",
        seed=seed,
        aux=aux,
        unit=task.architecture.unit_rows,
    )


def _error_rows(codes: Codes, groups: Groups | None) -> Tensor | None:
    """Say where the error of each pair lies among those of all groups, g · T + t. int32."""
    if groups is None:
        return None
    n_tokens = len(codes.val_TK)
    tokens_T = torch.arange(n_tokens, device=codes.val_TK.device)
    return (codes.group_TK(groups) * n_tokens + tokens_T[:, None]).int()


def _with_dead(db_enc_F: Tensor, dead: DeadRows | None) -> Tensor:
    return db_enc_F if dead is None else db_enc_F.index_add(0, dead.dead_S, dead.b_enc_S)


def _step_others(task: Task, gradients: dict[str, Tensor], hyper: Tensor) -> None:
    """Step parameters that no kernel does; as they were where the step is not healthy."""
    assert isinstance(task.optimizer, Adam | Sgd)
    for name, grad in gradients.items():
        parameter = task.weights.parameters.named[name]
        before = parameter.clone()
        task.optimizer.update(name, slice(None), grad, hyper[Hyper.LR])
        parameter.copy_(torch.where(task.healthy, parameter, before))


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

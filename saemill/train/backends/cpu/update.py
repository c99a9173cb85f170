"""The backward pass and the update of one SAE on a CPU, a block of latents at a time.

The pairs are sorted by latent once. Then a block of rows is taken from its gradient to its renormalised
weights while it is in the cache: only T·K pairs are touched, and each weight and moment is read and written
once.
"""

import itertools

import torch
from torch import Tensor

from saemill.train.backends.auxk import DeadRows
from saemill.train.backends.base import Slopes, Task, chunks
from saemill.train.backends.cpu.loops.rows import Pairs, gradients, sort_pairs
from saemill.train.backends.cpu.threads import each
from saemill.train.backends.sparse import Forward
from saemill.train.backends.team import Team
from saemill.train.profile import region

BLOCK_BYTES = 1 << 20
"""Bytes of each tensor in a block; about a dozen of them are in use at once."""


def update(task: Task, forward: Forward, slopes: Slopes, dead: DeadRows | None, team: Team) -> Tensor:
    """Take one optimizer step of all parameters, in place.

    Args:
        task: what to step, over T tokens; nothing is changed where it is not healthy.
        forward: of the same batch.
        slopes: gradients at its pre-activations and at further parameters.
        dead: gradients of dead latents, to be added.
        team: where it splits the latents, weights and codes are this process's.

    Returns: bool [F], which latents fired.
    """
    with region("sort"):
        n_latents, groups = len(task.weights.parameters.w_enc_FD), task.architecture.groups
        pairs = sort_pairs(forward, slopes, groups, n_latents, task.rates.grad_scale)
    if task.healthy:
        _update(task, forward, slopes, pairs, dead, team)
    return pairs.fired_F


def _update(
    task: Task, forward: Forward, slopes: Slopes, pairs: Pairs, dead: DeadRows | None, team: Team
) -> None:
    weights, optimizer, rates, unit = task.weights, task.optimizer, task.rates, task.architecture.unit_rows
    w_enc_FD, _, w_dec_FD, b_D, _ = weights.parameters
    dpre_F, db_enc_F = pairs.dpre_F, pairs.dpre_F if slopes.db_enc_F is None else slopes.db_enc_F
    if dead is not None:
        dpre_F = dpre_F.index_add(0, dead.dead_S, dead.b_enc_S)
        db_enc_F = db_enc_F.index_add(0, dead.dead_S, dead.b_enc_S)
    errors_GTD = forward.e_TD[None] if forward.rows_GTD is None else forward.rows_GTD
    per_shard = rates.grad_scale / team.latents.size
    db_D = errors_GTD[0].sum(0, dtype=torch.float32).mul_(per_shard).sub_(dpre_F @ w_enc_FD)
    team.latents.all_reduce(db_D)
    toward_F = -pairs.along_F if unit else slopes.toward_F
    if toward_F is None:
        toward_F = torch.zeros_like(dpre_F)
    every = slice(0, len(dpre_F))
    optimizer.update("b_enc", every, db_enc_F, rates.lr)
    for name, grad_F in slopes.further_F.items():
        optimizer.update(name, every, grad_F, rates.lr)
    error_ND = errors_GTD.flatten(0, 1)

    def step(piece: tuple[slice, slice], _thread: int) -> None:
        block, dead_slice = piece
        with region("backward"):
            grad_enc, grad_dec = gradients(task.batch, error_ND, pairs, block, w_dec_FD, b_D, toward_F)
            if dead is not None:
                places = dead.dead_S[dead_slice] - block.start
                grad_enc.index_add_(0, places, dead.w_enc_SD[dead_slice])
                grad_dec.index_add_(0, places, dead.w_dec_SD[dead_slice])
        with region("optimizer"):
            optimizer.update("w_enc", block, grad_enc, rates.lr, rates.weight_decay)
            optimizer.update("w_dec", block, grad_dec, rates.lr)
            if unit:
                rows = w_dec_FD[block]
                rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))
            weights.refresh(block)

    blocks = list(chunks(len(w_enc_FD), w_enc_FD[0].nbytes, BLOCK_BYTES))
    each(list(zip(blocks, _dead_slices(blocks, dead), strict=True)), step)
    optimizer.update("b", slice(None), db_D, rates.lr)


def _dead_slices(blocks: list[slice], dead: DeadRows | None) -> list[slice]:
    """Find which of the dead latents' rows lie in each block."""
    if dead is None:
        return [slice(0)] * len(blocks)
    stops = torch.tensor([block.stop for block in blocks])
    last = torch.searchsorted(dead.dead_S, stops).tolist()
    return [slice(*edges) for edges in itertools.pairwise([0, *last])]

"""The backward pass and the update of one SAE on a CPU, a block of latents at a time.

The pairs are sorted by latent once. Then a block of rows is taken from its gradient to its renormalised
weights while it is in the cache: only T·K pairs are touched, and each weight and moment is read and written
once.
"""

import itertools

import torch
from torch import Tensor

from saemill.train.backends.auxk import DeadRows
from saemill.train.backends.base import Task, chunks
from saemill.train.backends.cpu.loops.rows import Pairs, gradients, sort_pairs
from saemill.train.backends.cpu.threads import each
from saemill.train.backends.sparse import Forward
from saemill.train.backends.team import Team
from saemill.train.profile import region

BLOCK_BYTES = 1 << 20
"""Bytes of each tensor in a block; about a dozen of them are in use at once."""


def update(task: Task, forward: Forward, dead: DeadRows | None, team: Team) -> Tensor:
    """Take one optimizer step of all parameters, in place.

    Args:
        task: what to step, over T tokens; nothing is changed where it is not healthy.
        forward: of the same batch.
        dead: AuxK's gradients, to be added.
        team: where it splits the latents, weights and codes are this process's.

    Returns: bool [F], which latents fired.
    """
    with region("sort"):
        pairs = sort_pairs(forward, len(task.weights.parameters.w_enc_FD), task.rates.grad_scale)
    if task.healthy:
        _update(task, forward.e_TD, pairs, dead, team)
    return pairs.fired_F


def _update(task: Task, e_TD: Tensor, pairs: Pairs, dead: DeadRows | None, team: Team) -> None:
    weights, optimizer, rates = task.weights, task.optimizer, task.rates
    w_enc_FD, _, w_dec_FD, b_D, _ = weights.parameters
    db_enc_F = pairs.db_enc_F
    if dead is not None:
        db_enc_F = db_enc_F.index_add(0, dead.dead_S, dead.b_enc_S)
    per_shard = rates.grad_scale / team.latents.size
    db_D = e_TD.sum(0, dtype=torch.float32).mul_(per_shard).sub_(db_enc_F @ w_enc_FD)
    team.latents.all_reduce(db_D)
    optimizer.update("b_enc", slice(None), db_enc_F, rates.lr)

    def step(piece: tuple[slice, slice], _thread: int) -> None:
        block, dead_slice = piece
        with region("backward"):
            grad_enc, grad_dec = gradients(task.batch, e_TD, pairs, block, w_dec_FD, b_D)
            if dead is not None:
                places = dead.dead_S[dead_slice] - block.start
                grad_enc.index_add_(0, places, dead.w_enc_SD[dead_slice])
                grad_dec.index_add_(0, places, dead.w_dec_SD[dead_slice])
        with region("optimizer"):
            optimizer.update("w_enc", block, grad_enc, rates.lr, rates.weight_decay)
            optimizer.update("w_dec", block, grad_dec, rates.lr)
            rows = w_dec_FD[block]
            rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))
            weights.refresh(block)

    blocks = list(chunks(len(w_enc_FD), w_enc_FD[0].nbytes, BLOCK_BYTES))
    each(list(zip(blocks, _dead_slices(blocks, dead), strict=True)), step)
    optimizer.update("b", slice(None), db_D, rates.lr)
    if optimizer.end_step():
        with region("optimizer"):
            w_dec_FD.div_(torch.linalg.vector_norm(w_dec_FD, dim=1, keepdim=True))
            weights.refresh()


def _dead_slices(blocks: list[slice], dead: DeadRows | None) -> list[slice]:
    """Find which of the dead latents' rows lie in each block."""
    if dead is None:
        return [slice(0)] * len(blocks)
    stops = torch.tensor([block.stop for block in blocks])
    last = torch.searchsorted(dead.dead_S, stops).tolist()
    return [slice(*edges) for edges in itertools.pairwise([0, *last])]

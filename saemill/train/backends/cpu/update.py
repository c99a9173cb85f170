"""The backward pass and the update of one SAE on a CPU, a block of latents at a time.

The pairs are sorted by latent once. Then a block of rows is taken from its gradient to its renormalised
weights while it is in the cache: only T·K pairs are touched, and each weight and moment is read and written
once.
"""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from saemill.train.backends.architecture import Slopes
from saemill.train.backends.auxk import DeadRows
from saemill.train.backends.base import Task, Weights, chunks
from saemill.train.backends.cpu.loops.rows import Pairs, gradients, sort_pairs
from saemill.train.backends.cpu.threads import each
from saemill.train.backends.parameters import Parameters
from saemill.train.backends.sparse import Forward, gradients_of_whole
from saemill.train.backends.team import Team
from saemill.train.optim.clipping import shrinkage
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
        n_latents = len(task.weights.parameters.w_enc_FD)
        pairs = sort_pairs(forward, slopes, n_latents, task.rates.grad_scale)
    if task.healthy:
        _update(task, forward, slopes, pairs, dead, team)
    return pairs.fired_F


def _update(
    task: Task, forward: Forward, slopes: Slopes, pairs: Pairs, dead: DeadRows | None, team: Team
) -> None:
    weights, optimizer, rates, unit = task.weights, task.optimizer, task.rates, task.architecture.unit_rows
    dpre_F, db_enc_F = pairs.dpre_F, pairs.dpre_F if slopes.db_enc_F is None else slopes.db_enc_F
    if dead is not None:
        dpre_F = dpre_F.index_add(0, dead.dead_S, dead.b_enc_S)
        db_enc_F = db_enc_F.index_add(0, dead.dead_S, dead.b_enc_S)
    errors_GTD = forward.e_TD[None] if forward.rows_GTD is None else forward.rows_GTD
    whole = gradients_of_whole(task, errors_GTD[0], dpre_F, team)
    toward_F, toward_FL = -pairs.along_F if unit else torch.zeros_like(dpre_F), slopes.toward_FL
    if toward_FL is not None and toward_FL.shape[1] == 1:
        toward_F, toward_FL = toward_FL[:, 0].contiguous(), None
    renormed = unit and not task.is_decoder_frozen
    rows = Rows(task, errors_GTD.flatten(0, 1), pairs, toward_F, toward_FL, dead)
    pieces = _pieces(weights.parameters, dead)
    vectors = {"b_enc": db_enc_F, **slopes.further_F}
    shrink = 1.0
    if rates.clip_norm is not None:
        with region("backward"):
            shrink = shrinkage(_squares(rows, pieces, vectors, whole, team), rates.clip_norm)
    for name, grad_F in vectors.items():
        optimizer.update(name, slice(0, len(grad_F)), grad_F * shrink, rates.lr)

    def step(piece: Piece, _thread: int) -> None:
        with region("backward"):
            grad_enc, grad_dec = rows.gradients(piece, shrink)
        with region("optimizer"):
            optimizer.update("w_enc", piece.block, grad_enc, rates.lr, rates.weight_decay)
            if not task.is_decoder_frozen:
                width = weights.parameters.w_dec_FD.shape[1]
                optimizer.update("w_dec", piece.decoders, grad_dec.view(-1, width), rates.lr)
            _renew(weights, piece, renormed)

    each(pieces, step)
    for name, grad in whole.items():
        optimizer.update(name, slice(None), grad * shrink, rates.lr)
    if optimizer.end_step():
        with region("optimizer"):
            for piece in pieces:
                _renew(weights, piece, renormed)


class Piece(NamedTuple):
    """A block of latents of one layer."""

    block: slice
    dead: slice
    """Its share of the dead latents."""
    decoders: slice
    """Rows of w_dec that are theirs: of a cross-layer transcoder several of a latent."""
    layer: int
    n_rows: int
    """Rows of each latent."""


class Rows(NamedTuple):
    """What the gradients of rows of w_enc and w_dec are made of."""

    task: Task
    error_ND: Tensor
    """Errors of all groups, one below the other."""
    pairs: Pairs
    toward_F: Tensor
    """What the gradient of a decoder row has beside the errors, times the row."""
    toward_FL: Tensor | None
    """The same of its parts at several sites; None of one."""
    dead: DeadRows | None

    def gradients(self, piece: Piece, shrink: float) -> tuple[Tensor, Tensor]:
        """Compute those of a block, times a factor."""
        dead, p = self.dead, self.task.weights.parameters
        made = gradients(
            self.task.batch, self.error_ND, self.pairs, piece.block, p, self.toward_F, piece.layer
        )
        if self.toward_FL is not None:
            parts = (
                torch.split(rows_FD, list(p.widths), 1) for rows_FD in (made[1], p.w_dec_FD[piece.block])
            )
            towards = torch.split(self.toward_FL[piece.block], 1, 1)
            for grad_FD, w_dec_FD, toward_F1 in zip(*parts, towards, strict=True):
                grad_FD.addcmul_(toward_F1, w_dec_FD)
        if dead is not None:
            places = dead.dead_S[piece.dead] - piece.block.start
            for grad, dead_SD in zip(made, (dead.w_enc_SD, dead.w_dec_SD), strict=True):
                # A layer's latents write to its site and to all later ones.
                grad.index_add_(0, places, dead_SD[piece.dead, dead_SD.shape[1] - grad.shape[1] :])
        if shrink != 1:
            for grad in made:
                grad.mul_(shrink)
        return made


def _squares(
    rows: Rows,
    pieces: list[Piece],
    vectors: Mapping[str, Tensor],
    whole: Mapping[str, Tensor],
    team: Team,
) -> float:
    """Sum the squares of all gradients, by a pass over the rows that keeps none of them."""
    square_N = torch.zeros(len(pieces), dtype=torch.float64)

    def count(numbered: tuple[int, Piece], _thread: int) -> None:
        i, piece = numbered
        grad_enc, grad_dec = rows.gradients(piece, 1.0)
        trained = [grad_enc] if rows.task.is_decoder_frozen else [grad_enc, grad_dec]
        square_N[i] = sum(float(torch.linalg.vector_norm(grad)) ** 2 for grad in trained)

    each(list(enumerate(pieces)), count)
    total = square_N.sum() + sum(float(torch.linalg.vector_norm(grad_F)) ** 2 for grad_F in vectors.values())
    of_all = sum(float(torch.linalg.vector_norm(grad)) ** 2 for grad in whole.values())
    return float(team.latents.all_reduce(total)) + of_all


def _renew(weights: Weights, piece: Piece, renormed: bool) -> None:
    """Follow rows that were stepped: decoder rows to unit length, where they are renormed; the copies."""
    if renormed:
        rows_FD = weights.parameters.w_dec_FD[piece.decoders]
        rows_FD = rows_FD.view(len(rows_FD) // piece.n_rows, -1)
        rows_FD.div_(torch.linalg.vector_norm(rows_FD, dim=1, keepdim=True))
    weights.refresh(piece.block)


def _pieces(p: Parameters, dead: DeadRows | None) -> list[Piece]:
    """Cut the latents of each layer into blocks."""
    pieces, first, first_decoder = [], 0, 0
    for layer, own in enumerate(p.layers):
        n_rows = own.w_dec_FD.shape[1] // p.w_dec_FD.shape[1]
        row_bytes = max(own.w_enc_FD[0].nbytes, own.w_dec_FD[0].nbytes if p.n_layers > 1 else 0)
        for rows in chunks(len(own.w_enc_FD), row_bytes, BLOCK_BYTES):
            block = slice(first + rows.start, first + rows.stop)
            decoders = slice(first_decoder + rows.start * n_rows, first_decoder + rows.stop * n_rows)
            pieces.append(Piece(block, slice(0), decoders, layer, n_rows))
        first, first_decoder = first + len(own.w_enc_FD), first_decoder + len(own.w_dec_FD) * n_rows
    if dead is None:
        return pieces
    stops = torch.tensor([piece.block.stop for piece in pieces])
    last = torch.searchsorted(dead.dead_S, stops).tolist()
    edges = itertools.pairwise([0, *last])
    return [piece._replace(dead=slice(*own)) for piece, own in zip(pieces, edges, strict=True)]

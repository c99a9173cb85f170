"""The backward pass and the update of one variant, latent by latent.

With g = gs · e, gs = ∂L/∂(½Σe²), and the sums over the pairs (t, k) with idx_tk = f:

    dval_tk   = ⟨g_t, W_dec[f]⟩ where val > 0
    dW_dec[f] = Σ val g_t, less its part along the unit row W_dec[f], which renorming would undo
    dW_enc[f] = Σ dval_tk (x_t − b),   db_enc[f] = Σ dval_tk,   db = Σ_t g_t − db_enc · W_enc

The pairs are sorted by latent once. Then a block of rows at a time is taken from its gradient to
its renormalised weights while it is in the cache: only T·K pairs are touched, no gradient of size
F·D is ever in memory, and each weight and moment is read and written once.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from saemill.train.backends.auxk import DeadRows
from saemill.train.backends.codes import Batch, Forward, Weights, chunks
from saemill.train.backends.team import ALONE, Team
from saemill.train.backends.threads import each
from saemill.train.optim.optimizer import Optimizer
from saemill.train.profile import part

BLOCK_BYTES = 1 << 20
"""Bytes of each tensor in a block; about a dozen of them are in use at once."""
W_ENC, B_ENC, W_DEC, B = range(4)
"""The places of the parameters among an optimizer's leaves."""


class Rates(NamedTuple):
    """The numbers of one step of one variant."""

    gs: float
    """Factor of e in the gradient of the loss."""
    lr: float
    weight_decay: float
    """Decoupled, of w_enc alone."""


class Pairs(NamedTuple):
    """The active (token, latent) pairs of a batch, by latent, then by token; scaled by gs."""

    token_P: Tensor
    """int64."""
    val_P: Tensor
    dval_P: Tensor
    offsets_F: Tensor
    """int64 [F + 1]: latent f has the pairs offsets[f] to offsets[f + 1]."""
    db_enc_F: Tensor
    """Σ dval."""
    along_F: Tensor
    """Σ val · ⟨g, W_dec[f]⟩: the decoder gradient's part along its row."""
    fired_F: Tensor
    """bool: some val > 0."""


class Ways(NamedTuple):
    """How the costly parts of the backward pass are computed."""

    sort_pairs: Callable[[Forward, int, float], Pairs]
    gradients: Callable[[Batch, Tensor, Pairs, slice, Tensor, Tensor], tuple[Tensor, Tensor]]


def sort_pairs(passed: Forward, n_latents: int, gs: float) -> Pairs:
    """Order a batch's pairs by latent, with one stable sort; codes of 0 go behind all latents."""
    (val_TK, idx_TK), dot_TK = passed.codes, passed.dot_TK
    val_P = val_TK.reshape(-1)
    flat_P = torch.where(val_P > 0, idx_TK.reshape(-1), n_latents)
    dot_P = dot_TK.reshape(-1) * gs
    dval_P = torch.where(val_P > 0, dot_P, 0.0)
    order = torch.argsort(flat_P, stable=True)
    offsets_F = flat_P.new_zeros(n_latents + 1)
    offsets_F[1:] = torch.bincount(flat_P, minlength=n_latents + 1)[:n_latents].cumsum(0)

    def per_latent(of_pair_P: Tensor) -> Tensor:
        return of_pair_P.new_zeros(n_latents + 1).index_add_(0, flat_P, of_pair_P)[:n_latents]

    return Pairs(
        token_P=order // idx_TK.shape[1],
        val_P=(val_P * gs)[order],
        dval_P=dval_P[order],
        offsets_F=offsets_F,
        db_enc_F=per_latent(dval_P),
        along_F=per_latent(val_P * dot_P),
        fired_F=per_latent(val_P) > 0,
    )


def backward(
    batch: Batch,
    passed: Forward,
    dead: DeadRows | None,
    weights: Weights,
    optimizer: Optimizer,
    healthy: Tensor,
    rates: Rates,
    team: Team = ALONE,
    ways: Ways | None = None,
) -> Tensor:
    """One optimizer step of all parameters, in place.

    Args:
        batch: T tokens.
        passed: of the same batch.
        dead: AuxK's gradients, to be added.
        weights: changed in place, copies included.
        optimizer: whose leaves are the first four of the weights; its step has begun.
        healthy: bool; where it is false nothing is changed.
        rates: of this step.
        team: where it splits the latents, weights and codes are this process's.
        ways: of computing it, by default the functions of this module.

    Returns: bool [F], which latents fired.
    """
    ways = ways or Ways(sort_pairs, gradients)
    with part("sort"):
        pairs = ways.sort_pairs(passed, len(weights.w_enc_FD), rates.gs)
    if healthy:
        _update(ways, batch, passed.e_TD, pairs, dead, weights, optimizer, rates, team)
    return pairs.fired_F


def _update(
    ways: Ways,
    batch: Batch,
    e_TD: Tensor,
    pairs: Pairs,
    dead: DeadRows | None,
    weights: Weights,
    optimizer: Optimizer,
    rates: Rates,
    team: Team,
) -> None:
    w_enc_FD, w_dec_FD, b_D = weights.w_enc_FD, weights.w_dec_FD, weights.b_D
    db_enc_F = pairs.db_enc_F
    if dead is not None:
        db_enc_F = db_enc_F.index_add(0, dead.dead_S, dead.b_enc_S)
    db_D = e_TD.sum(0, dtype=torch.float32).mul_(rates.gs / team.latents.size).sub_(db_enc_F @ w_enc_FD)
    team.latents.sum_(db_D)
    optimizer.update(B_ENC, slice(None), db_enc_F, rates.lr)

    def step(piece: tuple[slice, slice], _thread: int) -> None:
        block, of_dead = piece
        with part("backward"):
            grad_enc, grad_dec = ways.gradients(batch, e_TD, pairs, block, w_dec_FD, b_D)
            if dead is not None:
                places = dead.dead_S[of_dead] - block.start
                grad_enc.index_add_(0, places, dead.w_enc_SD[of_dead])
                grad_dec.index_add_(0, places, dead.w_dec_SD[of_dead])
        with part("optimizer"):
            optimizer.update(W_ENC, block, grad_enc, rates.lr, rates.weight_decay)
            optimizer.update(W_DEC, block, grad_dec, rates.lr)
            rows = w_dec_FD[block]
            rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))
            weights.refresh(block)

    blocks = list(chunks(len(w_enc_FD), w_enc_FD[0].nbytes, BLOCK_BYTES))
    each(list(zip(blocks, _dead_of(blocks, dead), strict=True)), step)
    optimizer.update(B, slice(None), db_D, rates.lr)


def gradients(
    batch: Batch, e_TD: Tensor, pairs: Pairs, block: slice, w_dec_FD: Tensor, b_D: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of a block of rows of w_enc and of w_dec, the latter without its part along the rows."""
    first, last = int(pairs.offsets_F[block.start]), int(pairs.offsets_F[block.stop])
    token = pairs.token_P[first:last]
    offsets = pairs.offsets_F[block] - first
    grad_enc, grad_dec = (
        embedding_bag(token, rows_TD, offsets, per_sample_weights=of_pair_P[first:last], mode="sum")
        for rows_TD, of_pair_P in ((batch.x_TD, pairs.dval_P), (e_TD, pairs.val_P))
    )
    grad_enc.addr_(pairs.db_enc_F[block], b_D, alpha=-1)
    grad_dec.addcmul_(pairs.along_F[block, None], w_dec_FD[block], value=-1)
    return grad_enc, grad_dec


def _dead_of(blocks: list[slice], dead: DeadRows | None) -> list[slice]:
    """Which of the dead latents' rows lie in each block."""
    if dead is None:
        return [slice(0)] * len(blocks)
    stops = torch.tensor([block.stop for block in blocks], device=dead.dead_S.device)
    last = torch.searchsorted(dead.dead_S, stops).tolist()
    return [slice(*edges) for edges in itertools.pairwise([0, *last])]

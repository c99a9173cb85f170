"""What dead latents learn: AuxK, by which they fit the residual; or a pull up to their thresholds."""

import itertools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from saemill.common.sae.topk import topk
from saemill.train.backends.adding import add_rows
from saemill.train.backends.architecture import Auxiliary, Dead
from saemill.train.backends.base import Batch, Task, Weights, chunks
from saemill.train.backends.codes import Above, Codes
from saemill.train.backends.parameters import Parameters

if TYPE_CHECKING:
    from saemill.train.backends.sparse import Forward, Sparse

CHUNK_BYTES = {"cpu": 1 << 23, "cuda": 1 << 29}
"""Most bytes of pre-activations at once. Larger pieces of a CPU's memory go back to the system in every step,
which then hands out new pages."""
LEAST_TOKENS = 512
"""Fewest tokens of a chunk, whatever its bytes: each adds to gradients of all dead rows."""


class DeadRows(NamedTuple):
    """Gradients of the dead latents' parameters, float32."""

    dead_S: Tensor
    """int64, the dead latents' numbers, ascending."""
    w_enc_SD: Tensor
    b_enc_S: Tensor
    w_dec_SD: Tensor
    """Without its component along each row; of a cross-layer transcoder over all sites, of which those before
    a latent's own are to be left out."""


class Span(NamedTuple):
    """The dead latents of one layer."""

    dead: slice
    """Places among the dead."""
    reads: slice
    """Columns of the inputs that they read."""


def auxk(
    backend: "Sparse",
    batch: Batch,
    forward: "Forward",
    dead: Dead,
    weights: Weights,
    auxiliary: Auxiliary,
    scale: float,
) -> tuple[DeadRows, Tensor]:
    """Let the k most active dead latents fit the residual −e.

    ê = Σ val · W_dec[idx] over the dead latents' top-k, without bias; L_aux = scale · Σ (ê + e)²
    with e detached. Work is dense, on the dead rows alone, in the dtype of the encoder's product.
    The gradient reaches the encoder and the decoder of the dead latents, and b through the encoder.

    Args:
        backend: computes it.
        batch: T tokens; where the team splits them, this process's.
        forward: results of the same tokens.
        dead: at least one in the whole team.
        weights: of the SAE.
        auxiliary: how many latents per token, all of the dead ones if there are fewer; and their signs.
        scale: weight of the squared error.

    Returns: the gradients and L_aux, over all tokens of the team.
    """
    product_TD, dead_S, team = batch.product_TD, dead.latents_S, backend.team
    dtype = product_TD.dtype
    e_TD, bias_S = forward.e_TD, forward.bias_F[dead_S].to(dtype)
    spans = _spans(dead_S, weights.parameters)
    w_enc_SD, w_dec_SD = weights.product_FD[dead_S], _decoders(dead_S, spans, weights.parameters)
    rounded_SD = w_dec_SD.to(dtype)
    grad_enc_SD, grad_dec_SD = torch.zeros_like(w_enc_SD, dtype=torch.float32), torch.zeros_like(w_dec_SD)
    grad_bias_S, squares = torch.zeros_like(w_dec_SD[:, 0]), torch.zeros_like(forward.sse)
    row_bytes = dead.n_in_team * dtype.itemsize  # the same on every process: they exchange in each chunk
    for chunk in chunks(len(e_TD), row_bytes, max(CHUNK_BYTES[e_TD.device.type], LEAST_TOKENS * row_bytes)):
        each = [
            torch.addmm(bias_S[some], product_TD[chunk, reads], w_enc_SD[some].T) for some, reads in spans
        ]
        pre_tS = each[0] if len(each) == 1 else torch.cat(each, 1)
        acts_tS = _activations(backend, pre_tS, auxiliary, dead.n_in_team)
        once_tD = (
            e_TD[chunk].to(dtype) if team.latents.rank == 0 else torch.zeros_like(e_TD[chunk], dtype=dtype)
        )
        difference_tD = team.latents.all_reduce(torch.addmm(once_tD, acts_tS, rounded_SD))
        squares += torch.linalg.vector_norm(difference_tD, dim=1, dtype=torch.float32).square().sum()
        grad_dec_SD += acts_tS.T @ difference_tD
        dpre_tS = difference_tD @ rounded_SD.T
        grad_bias_S += backend.keep_active(dpre_tS, acts_tS)
        for some, reads in spans:
            grad_enc_SD[some] += dpre_tS[:, some].T @ product_TD[chunk, reads]
    for over_tokens in (grad_enc_SD, grad_dec_SD, grad_bias_S, squares):
        team.tokens.all_reduce(over_tokens)
    grad_enc_SD.addr_(grad_bias_S, weights.parameters.offset_D, alpha=-1)
    along_S1 = (grad_dec_SD * w_dec_SD).sum(1, keepdim=True)
    grad_dec_SD.addcmul_(along_S1, w_dec_SD, value=-1)
    twice = 2 * scale
    rows = DeadRows(dead_S, grad_enc_SD.mul_(twice), grad_bias_S.mul_(twice), grad_dec_SD.mul_(twice))
    return rows, squares * scale


def pull(codes: Codes, task: Task, scale: float) -> tuple[DeadRows, Tensor]:
    """Draw dead latents up to their thresholds: scale · √D · Σ ReLU(θ − z), at the pre-activations.

    On a token below the threshold the gradient at z is −scale, whatever z is. So it is that of all tokens,
    less the few that are active, and no product of dead rows is needed. `slopes` has that at θ.

    Args:
        codes: of the whole batch.
        task: with the whole batch, and dead latents.
        scale: weight of the loss.

    Returns: the gradients, and the loss of this process's latents.
    """
    p, dead_S, x_TD = task.weights.parameters, task.dead.latents_S, task.batch.x_TD
    rule, scale = task.architecture.rule(p), scale * len(p.b_D) ** 0.5
    assert isinstance(rule, Above)
    above_TK = codes.active_TK.float()
    n_below_S = len(x_TD) - codes.by_latent(above_TK, len(p.b_enc_F))[dead_S]
    active_F = torch.zeros_like(p.b_enc_F, dtype=torch.bool).index_fill_(0, dead_S, True)
    dead_TK = above_TK * active_F[codes.idx_TK.long()]
    w_enc_SD, n_each = p.w_enc_FD[dead_S], len(p.b_enc_F) // p.n_layers
    x_TLD = x_TD.view(len(x_TD), p.n_layers, -1)
    x_SD = x_TLD.sum(0)[dead_S // n_each]
    tokens_P, slots_P = dead_TK.nonzero(as_tuple=True)
    place_F = torch.zeros_like(p.b_enc_F, dtype=torch.int64).index_copy_(
        0, dead_S, torch.arange(len(dead_S), device=dead_S.device)
    )
    latents_P = codes.idx_TK[tokens_P, slots_P].long()
    add_rows(x_SD, place_F[latents_P], -x_TLD[tokens_P, latents_P // n_each])
    z_S = (x_SD * w_enc_SD).sum(1) + n_below_S * (p.b_enc_F[dead_S] - w_enc_SD @ p.offset_D)
    loss = (n_below_S * rule.threshold_F[dead_S] - z_S).sum() * scale
    grad_SD = (x_SD - n_below_S[:, None] * p.offset_D).mul_(-scale)
    no_decoders_SD = x_TD.new_zeros(len(dead_S), len(p.b_D))
    return DeadRows(dead_S, grad_SD, n_below_S * -scale, no_decoders_SD), loss


def _spans(dead_S: Tensor, p: Parameters) -> list[Span]:
    """List the dead latents of each layer that has some; of one layer all, also where they are none."""
    d = p.w_enc_FD.shape[1]
    if p.n_layers == 1:
        return [Span(slice(0, len(dead_S)), slice(0, d))]
    n_each = len(p.b_enc_F) // p.n_layers
    ends = torch.arange(0, len(p.b_enc_F) + 1, n_each, device=dead_S.device)
    edges = itertools.pairwise(torch.searchsorted(dead_S, ends).tolist())
    return [
        Span(slice(*own), slice(layer * d, (layer + 1) * d))
        for layer, own in enumerate(edges)
        if own[0] < own[1]
    ]


def _decoders(dead_S: Tensor, spans: list[Span], p: Parameters) -> Tensor:
    """Copy the decoder rows of dead latents, over all sites; 0 at those that a latent does not write to."""
    if p.n_layers == 1:
        return p.w_dec_FD[dead_S]
    n_each, d = len(p.b_enc_F) // p.n_layers, p.w_enc_FD.shape[1]
    rows_SE = p.w_dec_FD.new_zeros(len(dead_S), len(p.b_D))
    for some, reads in spans:
        own = p.layers[reads.start // d].w_dec_FD[dead_S[some] % n_each]
        rows_SE[some, len(p.b_D) - own.shape[1] :] = own
    return rows_SE


def _activations(backend: "Sparse", pre_tS: Tensor, auxiliary: Auxiliary, n_dead: int) -> Tensor:
    """Find, of each row, the entries that are among the team's k largest, in place among zeros."""
    if auxiliary.is_signed:
        return _rectified(backend, pre_tS.abs(), auxiliary.k, n_dead).copysign_(pre_tS)
    return _rectified(backend, pre_tS, auxiliary.k, n_dead)


def _rectified(backend: "Sparse", pre_tS: Tensor, k: int, n_dead: int) -> Tensor:
    """Rectify these entries."""
    if n_dead <= k:
        return pre_tS.relu_()
    if backend.team.latents.size == 1:
        return backend.keep_largest(pre_tS, k)
    n_here = pre_tS.shape[1]
    k_here = min(k, n_here)
    values, places = topk(pre_tS, k_here) if k_here < n_here else (pre_tS.relu_(), None)
    chosen, _ = backend.team.among_all(pad(values, (0, k - k_here)))
    values = values.where(chosen[:, :k_here], 0)
    return values if places is None else torch.zeros_like(pre_tS).scatter_(1, places, values)

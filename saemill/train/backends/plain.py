"""`Plain`: a step by autograd of the architecture's `loss`, on any device that torch knows.

It is the definition that the other backends are compared with. It is also what a device without loops or
kernels of its own gets: tokens go in chunks, so that no more than one chunk's [T, F] is in memory.
"""

import torch
from torch import Tensor

from saemill.train.backends.base import (
    Batch,
    Losses,
    Parameters,
    Rates,
    Sums,
    Task,
    Weights,
    chunks,
)
from saemill.train.backends.team import ALONE, Team
from saemill.train.optim.optimizer import Optimizer
from saemill.train.profile import region

CHUNK_BYTES = {"cpu": 1 << 24}
"""Most bytes of a chunk's pre-activations: on a CPU what stays in its last cache."""
MOST_CHUNK_BYTES = 1 << 28
"""The same on other devices; autograd keeps some of them."""


class Plain:
    """Torch's own operations, differentiated by torch.

    Args:
        dtype: of the encoder's product.
        team: the processes that share out a batch's tokens; it splits no latents.
    """

    name = "torch"

    def __init__(self, dtype: torch.dtype, team: Team = ALONE) -> None:
        if team.latents.size > 1:
            raise ValueError("plain splits no latents")
        self.dtype, self.team = dtype, team

    def weights(self, n_latents: int, d: int, device: torch.device) -> Weights:
        """Make the memory of one SAE, all zeros, as `Backend.weights`; there are no copies."""
        parameters = Parameters.zeros(n_latents, d, device)
        return Weights(parameters, parameters.w_enc_FD, parameters.w_dec_FD)

    def prepare(self, x_TD: Tensor) -> Batch:
        """Take a batch as it is: the loss rounds what it multiplies."""
        return Batch(x_TD, x_TD)

    def step(self, task: Task) -> Sums:
        """Differentiate the loss and take an optimizer step, as `Backend.step`."""
        batch, weights, rates = task.batch, task.weights, task.rates
        own = batch.tokens(self.team.tokens.slice_of(len(batch.x_TD)))
        leaves = Parameters(*(weight.detach().requires_grad_() for weight in weights.parameters))
        sums, tokens = _zero_sums(leaves), self.team.tokens
        for chunk in chunks(len(own.x_TD), len(leaves.b_enc_F) * 4, _chunk_bytes(own.x_TD.device)):
            with region("backward"), torch.enable_grad():
                losses = task.architecture.loss(leaves, own.x_TD[chunk], task.dead, self.dtype)
                ((losses.sse + losses.aux) * rates.per_square).backward()  # type: ignore[no-untyped-call]
            sums = _added(sums, losses, rates.per_square)
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        with region("exchange"):
            for over_tokens in (*gradients, sums.sse, sums.aux_loss, sums.n_active):
                tokens.all_reduce(over_tokens)
            fired_F = tokens.all_reduce(sums.fired_F.int()) > 0
        if task.healthy & torch.isfinite(sums.sse):
            with region("optimizer"):
                _update(weights.parameters, Parameters(*gradients), task.optimizer, rates)
        return sums._replace(fired_F=fired_F)


def _chunk_bytes(device: torch.device) -> int:
    return CHUNK_BYTES.get(device.type, MOST_CHUNK_BYTES)


def _zero_sums(p: Parameters) -> Sums:
    zero = torch.zeros((), device=p.b_D.device)
    return Sums(zero, zero.clone(), zero.long(), torch.zeros_like(p.b_enc_F, dtype=torch.bool))


def _added(sums: Sums, losses: Losses, per_square: float) -> Sums:
    """Count a chunk."""
    active_TF = losses.codes_TF.detach() != 0
    return Sums(
        sums.sse + losses.sse.detach(),
        sums.aux_loss + losses.aux.detach() * per_square,
        sums.n_active + active_TF.sum(),
        sums.fired_F | active_TF.any(0),
    )


def _update(p: Parameters, gradients: Parameters, optimizer: Optimizer, rates: Rates) -> None:
    """Step all parameters; the decoder's rows stay of unit length, so their gradient is projected."""
    along_F1 = (gradients.w_dec_FD * p.w_dec_FD).sum(1, keepdim=True)
    gradients.w_dec_FD.addcmul_(along_F1, p.w_dec_FD, value=-1)
    every = slice(0, len(p.b_enc_F))
    optimizer.update("w_enc", every, gradients.w_enc_FD, rates.lr, rates.weight_decay)
    optimizer.update("b_enc", every, gradients.b_enc_F, rates.lr)
    optimizer.update("w_dec", every, gradients.w_dec_FD, rates.lr)
    optimizer.update("b", slice(0, len(p.b_D)), gradients.b_D, rates.lr)
    p.w_dec_FD.div_(torch.linalg.vector_norm(p.w_dec_FD, dim=1, keepdim=True))

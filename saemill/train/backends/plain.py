"""`Plain`: a step by autograd of the architecture's `loss`, on any device that torch knows.

It is the definition that the other backends are compared with. It is also what a device without loops or
kernels of its own gets: tokens go in chunks, so that no more than one chunk's [T, F] is in memory.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from saemill.common.sae import layers
from saemill.train.backends.architecture import Losses, Seen
from saemill.train.backends.base import Batch, Sums, Task, Weights, chunks, described
from saemill.train.backends.codes import Above, BatchLargest
from saemill.train.backends.cutoff import Best
from saemill.train.backends.parameters import Parameters, Shape
from saemill.train.backends.team import ALONE, Team
from saemill.train.objective.at_output import AtOutput, Objective
from saemill.train.optim.clipping import shrinkage
from saemill.train.profile import region

CHUNK_BYTES = {"cpu": 1 << 24}
"""Most bytes of a chunk's pre-activations: on a CPU what stays in its last cache."""
MOST_CHUNK_BYTES = 1 << 28
"""The same on other devices; autograd keeps some of them."""

BELOW = 1 - 1e-6
"""Times the cutoff: computed again, the pre-activation that it is may differ in its last bits."""


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

    def describe(self) -> str:
        """Describe how it multiplies, as `Backend.describe`."""
        return described(self.dtype, self.name)

    def weights(self, shape: Shape, device: torch.device) -> Weights:
        """Make the memory of one SAE, all zeros, as `Backend.weights`; there are no copies."""
        parameters = Parameters.zeros(shape, device)
        return Weights(parameters, parameters.w_enc_FD, parameters.w_dec_FD)

    def prepare(self, x_TD: Tensor, y_TE: Tensor | None = None) -> Batch:
        """Take a batch as it is: the loss rounds what it multiplies."""
        return Batch(x_TD, x_TD, y_TE=y_TE)

    def step(self, task: Task) -> Sums:
        """Differentiate the loss and take an optimizer step, as `Backend.step`."""
        batch, weights, rates = task.batch, task.weights, task.rates
        own = batch.tokens(self.team.tokens.slice_of(len(batch.x_TD)))
        named = {name: p.detach().requires_grad_() for name, p in weights.parameters.named.items()}
        leaves = Parameters.of(named, weights.parameters)
        seen = self._look(task, own.x_TD)
        sums, tokens = _zero_sums(leaves, task), self.team.tokens
        found = None if task.objective is None else self._at_output(task, task.objective, seen)
        for chunk in self._chunks(own.x_TD, leaves):
            with region("backward"), torch.enable_grad():
                some = own.tokens(chunk).less_skip(leaves)
                losses = task.architecture.loss(leaves, some.x_TD, some.target_TE, seen, self.dtype)
                loss = (losses.error + losses.added) * rates.per_square
                if found is not None:
                    xhat_TE = output(leaves, losses.codes_TF, some.x_TD)
                    loss = (losses.error * found.squares + losses.added) * rates.per_square
                    loss = loss + (xhat_TE * found.gradient_TE[chunk]).sum()
                loss.backward()  # type: ignore[no-untyped-call]
            sums = _added(sums, losses, rates.per_square)
        gradients = {
            name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in named.items()
        }
        with region("exchange"):
            for over_tokens in (*gradients.values(), *_numbers(sums)):
                tokens.all_reduce(over_tokens)
            fired_F = tokens.all_reduce(sums.fired_F.int()) > 0
        if found is not None:  # where the model overflows, nothing is changed either
            sums = sums._replace(sse=sums.sse.where(torch.isfinite(found.nats), torch.nan))
        if task.healthy & torch.isfinite(sums.sse):
            with region("optimizer"):
                _update(task, gradients)
        return sums._replace(fired_F=fired_F, cutoff=seen.cutoff, at_output=found)

    def _at_output(self, task: Task, objective: Objective, seen: Seen) -> AtOutput:
        """Let the objective see all reconstructions, by a forward pass before."""
        p, batch, error = (
            task.weights.parameters,
            task.batch,
            torch.zeros_like(task.healthy, dtype=torch.float),
        )
        xhat_TE = torch.empty_like(batch.target_TE)
        for chunk in self._chunks(batch.x_TD, p):
            some = batch.tokens(chunk).less_skip(p)
            losses = task.architecture.loss(p, some.x_TD, some.target_TE, seen, self.dtype)
            xhat_TE[chunk] = output(p, losses.codes_TF, some.x_TD)
            error += losses.error
        with region("model"):
            return objective.at(xhat_TE, error * task.rates.per_square)

    def _chunks(self, x_TD: Tensor, p: Parameters) -> Iterator[slice]:
        chunk_bytes = CHUNK_BYTES.get(x_TD.device.type, MOST_CHUNK_BYTES)
        return chunks(len(x_TD), len(p.b_enc_F) * 4, chunk_bytes)

    def _look(self, task: Task, x_TD: Tensor) -> Seen:
        """Find what the loss of each chunk must know of the whole batch, by a forward pass before."""
        p, n_tokens = task.weights.parameters, len(task.batch.x_TD)
        rule, seen = task.architecture.rule(p), Seen(task.dead, n_tokens)
        if isinstance(rule, BatchLargest):
            best = Best(round(rule.k * n_tokens), x_TD.device)
            for chunk in self._chunks(x_TD, p):
                best.add(pre_activations(p, x_TD[chunk], self.dtype).flatten())
            return seen._replace(cutoff=best.cutoff(self.team)[0] * BELOW)
        if isinstance(rule, Above):
            count_F = torch.zeros_like(p.b_enc_F)
            for chunk in self._chunks(x_TD, p):
                count_F += (pre_activations(p, x_TD[chunk], self.dtype) > rule.threshold_F).sum(0)
            count_F = self.team.tokens.all_reduce(count_F)
            return seen._replace(count_F=count_F, n_active=count_F.sum())
        return seen


def output(p: Parameters, codes_TF: Tensor, x_TD: Tensor) -> Tensor:
    """Compute what codes decode to, with what W_skip adds. [T, E], differentiable."""
    decoded_TE = decode(p, codes_TF)
    if p.w_skip_ED is None:
        return decoded_TE
    return decoded_TE + layers.skipped(x_TD, p.w_skip_ED, p.n_layers)


def decode(p: Parameters, codes_TF: Tensor) -> Tensor:
    """Compute W_decᵀ f + b. [T, E], differentiable."""
    if p.n_layers > 1:
        return layers.decode(codes_TF, p.w_dec_FD, p.n_layers) + p.b_D
    return codes_TF @ p.w_dec_FD + p.b_D


def pre_activations(p: Parameters, x_TD: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute W_enc (x − b) + b_enc, the product rounded to `dtype`; W_enc x + b_enc where nothing is
    subtracted. [T, F], in x's dtype; differentiable."""
    bias_F = p.b_enc_F - p.w_enc_FD @ p.offset_D
    if p.n_layers > 1:
        x, w_enc, bias = x_TD.to(dtype), p.w_enc_FD.to(dtype), bias_F.to(dtype)
        return layers.pre_activations(x, w_enc, bias, p.n_layers).to(x_TD.dtype)
    return torch.addmm(bias_F.to(dtype), x_TD.to(dtype), p.w_enc_FD.to(dtype).T).to(x_TD.dtype)


def _zero_sums(p: Parameters, task: Task) -> Sums:
    zero, groups = torch.zeros((), device=p.b_D.device), task.architecture.groups
    sums = Sums(zero, zero.clone(), zero.long(), torch.zeros_like(p.b_enc_F, dtype=torch.bool))
    if groups is None:
        return sums
    return sums._replace(error=zero.clone(), sse_G=zero.new_zeros(len(groups.ends)))


def _numbers(sums: Sums) -> list[Tensor]:
    """List the sums that processes add up."""
    return [
        s
        for s in (sums.sse, sums.aux_loss, sums.n_active, sums.error, sums.sse_G, sums.penalty)
        if s is not None
    ]


def _added(sums: Sums, losses: Losses, per_square: float) -> Sums:
    """Count a chunk."""
    active_TF = losses.codes_TF.detach() != 0
    shown = losses.error if losses.sse is None else losses.sse
    penalty = None if losses.penalty is None else losses.penalty.detach() * per_square
    return sums._replace(
        sse=sums.sse + shown.detach(),
        aux_loss=sums.aux_loss + losses.aux.detach() * per_square,
        penalty=penalty if penalty is None or sums.penalty is None else sums.penalty + penalty,
        n_active=sums.n_active + active_TF.sum(),
        fired_F=sums.fired_F | active_TF.any(0),
        error=None if sums.error is None else sums.error + losses.error.detach(),
        sse_G=_sum(sums.sse_G, losses.sse_G),
    )


def _sum(so_far: Tensor | None, more: Tensor | None) -> Tensor | None:
    return None if so_far is None or more is None else so_far + more.detach()


def _update(task: Task, gradients: dict[str, Tensor]) -> None:
    """Step all parameters. Where decoder rows stay of unit length, their gradient is projected."""
    p, rates = task.weights.parameters, task.rates
    renormed = task.architecture.unit_rows and not task.is_decoder_frozen
    if task.is_decoder_frozen:
        del gradients["w_dec"]
    if renormed:
        pairs = (layers.blocks(each, p.n_layers) for each in (gradients["w_dec"], p.w_dec_FD))
        for gradient_FD, w_dec_FD in zip(*pairs, strict=True):
            along_F1 = (gradient_FD * w_dec_FD).sum(1, keepdim=True)
            gradient_FD.addcmul_(along_F1, w_dec_FD, value=-1)
    if rates.clip_norm is not None:
        squares = sum(float(torch.linalg.vector_norm(gradient)) ** 2 for gradient in gradients.values())
        for gradient in gradients.values():
            gradient.mul_(shrinkage(squares, rates.clip_norm))
    for name, gradient in gradients.items():
        decay = rates.weight_decay if name == "w_enc" else 0.0
        task.optimizer.update(name, slice(0, len(gradient)), gradient, rates.lr, decay)
    task.optimizer.end_step()
    if renormed:
        for w_dec_FD in layers.blocks(p.w_dec_FD, p.n_layers):
            w_dec_FD.div_(torch.linalg.vector_norm(w_dec_FD, dim=1, keepdim=True))

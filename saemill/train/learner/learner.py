"""One SAE in training: parameters, optimizer, dead latents, sums.

Parameters live in training units (`stream.scaling`). `export` folds these into the biases, so that a saved
SAE takes activations as they are.
"""

from typing import Any

import torch
from torch import Tensor

from saemill.common.sae.parts import Parts, SaeConfig
from saemill.train.arch import initial
from saemill.train.backends.base import Backend, Batch, Dead, Parameters, Rates, Task
from saemill.train.learner.architecture import architecture_of
from saemill.train.learner.totals import CutoffAverage, Totals
from saemill.train.objective.squared_error import per_square
from saemill.train.optim.average import WeightAverage
from saemill.train.optim.muon import Muon
from saemill.train.optim.optimizer import Adam, Optimizer, Sgd
from saemill.train.optim.signum import Signum
from saemill.train.profile import region
from saemill.train.stream.scaling import Scaling
from saemill.train.sweep.variants import Variant


class Learner:
    """A variant in training.

    Args:
        variant: its settings.
        scaling: of its site; `centre_D` on the device.
        backend: computes its steps. Where its team splits the latents, every tensor with an F holds
            the `rows` of this process alone.
        sample_TD: training activations for the initial gain and the geometric median, in training units.
        dead_after_tokens: a latent that has not fired for so many tokens is dead.
    """

    def __init__(
        self,
        variant: Variant,
        scaling: Scaling,
        backend: Backend,
        sample_TD: Tensor,
        dead_after_tokens: int,
    ) -> None:
        self.variant, self.scaling, self.backend = variant, scaling, backend
        self.dead_after_tokens = dead_after_tokens
        d, device = len(scaling.centre_D), scaling.centre_D.device
        self.architecture = architecture_of(variant, d)
        self.per_square = per_square(variant.loss, d, scaling.scale)
        self.rows = backend.team.latents.slice_of(variant.num_latents)
        n_rows = self.rows.stop - self.rows.start
        self.weights = backend.weights(n_rows, d, device, self.architecture.further)
        self.parameters = self.weights.parameters
        if variant.b_dec_init == "geometric_median":
            self.parameters.b_D.copy_(initial.geometric_median(sample_TD))
        self.architecture.initialise(
            self.parameters, variant.num_latents, variant.seed, sample_TD, backend.team
        )
        self.optimizer = self._optimizer()
        decay = variant.weight_average
        self.average = None if decay is None else WeightAverage(self.parameters.named, decay)
        self.idle_tokens_F = torch.zeros(n_rows, dtype=torch.int64, device=device)
        self.dead_F = torch.zeros(n_rows, dtype=torch.bool, device=device)
        self.dead = Dead(torch.zeros(0, dtype=torch.int64, device=device), 0)
        self.diverged_step = torch.full((), -1, dtype=torch.int64, device=device)
        """The step at which the loss was not finite, −1 where it is."""
        self.frozen = False
        """Whether steps are left out, since it has diverged."""
        self.totals = Totals(d, device, self.architecture.groups)
        self.cutoff = CutoffAverage(device)
        self.weights.refresh()

    def _optimizer(self) -> Optimizer:
        named, variant = self.parameters.named, self.variant
        if variant.optimizer == "sgd":
            return Sgd(named)
        if variant.optimizer == "signum":
            return Signum(named)
        if variant.optimizer == "muon":
            return Muon(named, variant.num_latents, self.backend.team.latents)
        return Adam(named, variant.optimizer_state, variant.adam_betas)

    def step(self, batch: Batch, lr_factor: float, step: int) -> None:
        """Take one optimizer step; on a GPU the host waits for nothing with TopK.

        Args:
            batch: from the backend; the loss is the mean over its tokens.
            lr_factor: the schedule's factor on the peak rate.
            step: its number, recorded where the loss is not finite.
        """
        n_tokens, variant = len(batch.x_TD), self.variant
        lr, per_square = variant.lr * lr_factor, self.per_square / n_tokens
        rates = Rates(per_square, lr, variant.weight_decay, variant.clip_grad_norm)
        self.optimizer.begin_step(lr)
        healthy = self.diverged_step < 0
        architecture = self.architecture.at(step)
        task = Task(batch, self.weights, architecture, self.optimizer, self.dead, healthy, rates)
        sums = self.backend.step(task)
        if self.average is not None:
            with region("optimizer"):
                self.average.add(self.optimizer.n_steps)
        with region("count"):
            diverges = healthy & ~torch.isfinite(sums.sse)
            self.diverged_step.copy_(torch.where(diverges, step, self.diverged_step))
            error = sums.sse if sums.error is None else sums.error
            loss = error * rates.per_square + sums.aux_loss
            self.totals.add(n_tokens, sums.sse, loss, sums.aux_loss, sums.n_active, sums.sse_G)
            if sums.cutoff is not None:
                self.cutoff.add(sums.cutoff, healthy)
            self.idle_tokens_F.copy_(torch.where(sums.fired_F, 0, self.idle_tokens_F + n_tokens))

    def find_dead(self) -> None:
        """Find the latents that are dead now; `Bank.count_dead` is to be called next."""
        torch.gt(self.idle_tokens_F, self.dead_after_tokens, out=self.dead_F)

    def dead_fraction(self) -> float:
        """Compute the share of latents that are dead by the trainer's counter."""
        n_dead = (self.idle_tokens_F > self.dead_after_tokens).sum()
        return int(self.backend.team.latents.all_reduce(n_dead)) / self.variant.num_latents

    def score(self, metric: str) -> float | None:
        """Compute a metric over the window of the last steps; None where it diverged."""
        if self.frozen:
            return None
        return self.dead_fraction() if metric == "dead_fraction" else self.totals.window()[metric]

    def trained(self) -> Parameters:
        """Return the weights that the SAE has after training: averages, where there are any."""
        averages = self.optimizer.averages() if self.average is None else self.average.values
        if averages is None:
            return self.parameters
        p = Parameters.of(averages)
        if not self.architecture.unit_rows:
            return p
        return p._replace(w_dec_FD=p.w_dec_FD / torch.linalg.vector_norm(p.w_dec_FD, dim=1, keepdim=True))

    def export(self, provenance: dict[str, Any], *, copied: bool = True) -> Parts | None:
        """Fold the training units into the biases: the SAE in the activations' own.

        Args:
            provenance: what its config tells of its origin.
            copied: whether it stays as it is when training goes on; without, it may share memory with the
                parameters.

        Returns: the SAE on the team's first process, none on others; on the CPU where latents are split.
        """
        team, variant, scaling = self.backend.team, self.variant, self.scaling
        if team.tokens.rank > 0:
            return None
        trained = self.trained()
        form = self.architecture.inference(trained, self.cutoff.value)
        own = {"W_enc": form.w_enc_FD, "b_enc": form.b_enc_F / scaling.scale, "W_dec": form.w_dec_FD}
        if form.threshold_F is not None:
            own["threshold"] = form.threshold_F / scaling.scale
        whole = {name: self._gathered(rows, copied) for name, rows in own.items()}
        weights = {name: tensor for name, tensor in whole.items() if tensor is not None}
        if not weights:
            return None
        is_matryoshka = variant.architecture == "matryoshka"
        config = SaeConfig(
            d_in=len(scaling.centre_D),
            num_latents=variant.num_latents,
            k=form.k,
            provenance=provenance,
            architecture=variant.architecture,
            prefixes=variant.prefixes if is_matryoshka else (),
            ks=form.ks,
        )
        b_dec = (trained.b_D / scaling.scale).to(weights["W_enc"].device)
        return Parts(config, b_dec=b_dec + scaling.centre_D.to(b_dec.device), **weights)

    def _gathered(self, rows: Tensor, copied: bool) -> Tensor | None:
        """Put together what the team has of a tensor with a row per latent, on its first process; on the CPU
        where latents are split."""
        group = self.backend.team.latents
        if group.size == 1:
            return rows.clone() if copied else rows
        return group.gather(rows.cpu(), self.variant.num_latents)

    def checkpoint_tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """List the state for a checkpoint: tensors with a row per latent, and whole ones."""
        by_name, moments = self.parameters.named, self.optimizer.tensors()
        if self.average is not None:
            moments = {name: [*moments[name], value] for name, value in self.average.values.items()}
        b_D, b_moments = by_name.pop("b"), moments.pop("b")
        row_moments = [tensor for name in by_name for tensor in moments[name]]
        rows = [*by_name.values(), self.idle_tokens_F, self.dead_F, *row_moments]
        return rows, [b_D, self.diverged_step, self.totals.values, self.cutoff.sums, *b_moments]

"""One SAE in training: parameters, optimizer, dead latents, sums.

Parameters live in training units (`stream.scaling`). `export` folds these into the weights, so that a saved
SAE takes activations as they are.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saemill.common.sae import layers
from saemill.common.sae.parts import Joined, Parts, SaeConfig
from saemill.common.stores.site_names import parts_of
from saemill.train.arch import initial
from saemill.train.architectures import PENALISED
from saemill.train.backends.architecture import Dead, Sample
from saemill.train.backends.base import Backend, Batch, Rates, Task
from saemill.train.backends.parameters import Parameters, Shape
from saemill.train.learner.architecture import architecture_of
from saemill.train.learner.resampling import resample
from saemill.train.learner.totals import CutoffAverage, Totals
from saemill.train.learner.units import check_joined, fill_whole, form_of, rows_of, whole_of
from saemill.train.losses import IN_MODEL, nats_name
from saemill.train.objective.squared_error import per_square
from saemill.train.optim.average import WeightAverage
from saemill.train.optim.muon import Muon
from saemill.train.optim.optimizer import Adam, Optimizer, Sgd
from saemill.train.optim.signum import Signum
from saemill.train.profile import region
from saemill.train.stream.scaling import Scaling
from saemill.train.sweep.sources import read
from saemill.train.sweep.variant import Variant

if TYPE_CHECKING:
    from saemill.train.objective.model import Passages


class Learner:
    """A variant in training.

    Args:
        variant: its settings.
        scaling: of its site; `centre_D` on the device.
        backend: computes its steps. Where its team splits the latents, every tensor with an F holds
            the `rows` of this process alone.
        sample_TD: training activations for the initial gain and the geometric median, in training units.
        dead_after_tokens: a latent that has not fired for so many tokens is dead.
        target: of a transcoder the units of the site that it predicts, and the same tokens there in these.
    """

    def __init__(
        self,
        variant: Variant,
        scaling: Scaling,
        backend: Backend,
        sample_TD: Tensor,
        dead_after_tokens: int,
        target: tuple[Scaling, Tensor] | None = None,
    ) -> None:
        self.variant, self.scaling, self.backend = variant, scaling, backend
        self.target_scaling = None if target is None else target[0]
        self.dead_after_tokens = dead_after_tokens
        output = self.target_scaling or scaling
        d, d_out, device = len(scaling.centre_D), len(output.centre_D), scaling.centre_D.device
        self.architecture = architecture_of(variant, d)
        self.per_square = per_square(variant.loss, d_out, output.scale)
        self.rows = backend.team.latents.slice_of(variant.num_latents)
        n_rows = self.rows.stop - self.rows.start
        is_centred = target is None and variant.apply_b_dec_to_input
        further, has_skip = self.architecture.further, variant.skip_connection
        widths = tuple(width for width, _ in output.parts)
        shape = Shape(n_rows, d, d_out, further, has_skip, is_centred, variant.n_layers, widths)
        self.weights = backend.weights(shape, device)
        self.parameters = self.weights.parameters
        self.cutoff = CutoffAverage(device)
        if variant.init_from is None:
            self._start(Sample(sample_TD, sample_TD if target is None else target[1]))
        else:
            self._start_from(read(variant.init_from, variant.init_content or ""))
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
        self.totals = Totals(
            d_out,
            device,
            self.architecture.groups,
            nats_name(variant.loss),
            variant.architecture in PENALISED,
        )
        self.weights.refresh()

    def _start(self, sample: Sample) -> None:
        """Fill in where the parameters start: W_skip, and the others for what it leaves."""
        p, variant = self.parameters, self.variant
        if p.w_skip_ED is not None:
            pairs = (rows.chunk(p.n_layers, 1) for rows in sample)
            p.w_skip_ED.copy_(
                torch.cat([initial.regression(Sample(*own)) for own in zip(*pairs, strict=True)])
            )
            sample = sample._replace(y_TE=sample.y_TE - layers.skipped(sample.x_TD, p.w_skip_ED, p.n_layers))
        if variant.b_dec_init == "geometric_median":
            p.b_D.copy_(initial.geometric_median(sample.y_TE))
        self.architecture.initialise(p, variant.num_latents, variant.seed, sample, self.backend.team)

    def _start_from(self, parts: Parts) -> None:
        """Fill in the parameters of a finished SAE, in this run's units."""
        p = self.parameters
        check_joined(parts, self.scaling, self.variant.site)
        fill_whole(p, parts, self.scaling, self.target_scaling)
        form = form_of(p, parts, self.rows, self.scaling, self.target_scaling)
        self.architecture.restore(p, form)
        if form.threshold_F is not None:
            self.cutoff.start(float(form.threshold_F[0]))

    def _optimizer(self) -> Optimizer:
        named, variant = self.parameters.named, self.variant
        if variant.is_frozen:
            del named["w_dec"]
        if variant.optimizer == "sgd":
            return Sgd(named)
        if variant.optimizer == "signum":
            return Signum(named)
        if variant.optimizer == "muon":
            return Muon(named, variant.num_latents, self.backend.team.latents, self.parameters.whole)
        return Adam(named, variant.optimizer_state, variant.adam_betas)

    def step(self, batch: Batch, lr_factor: float, step: int, passages: "Passages | None" = None) -> None:
        """Take one optimizer step; on a GPU the host waits for nothing with TopK.

        Args:
            batch: from the backend; the loss is the mean over its tokens.
            lr_factor: the schedule's factor on the peak rate.
            step: its number, recorded where the loss is not finite.
            passages: the rows of text of the batch; None where no loss is the model's.
        """
        n_tokens, variant = len(batch.x_TD), self.variant
        if step in variant.resample_at and self.diverged_step < 0:
            with region("resample"):
                resample(self, batch, step)
        lr, per_square = variant.lr * lr_factor, self.per_square / n_tokens
        rates = Rates(per_square, lr, variant.weight_decay, variant.clip_grad_norm)
        self.optimizer.begin_step(lr)
        healthy = self.diverged_step < 0
        architecture = self.architecture.at(step)
        task = Task(
            batch, self.weights, architecture, self.optimizer, self.dead, healthy, rates,
            variant.is_frozen,
        )  # fmt: skip
        if passages is not None and variant.loss in IN_MODEL:
            of = self.target_scaling or self.scaling
            task = task._replace(objective=passages.objective(variant.loss, of.scale, of.centre_D))
        sums = self.backend.step(task)
        for name in architecture.never_below_0:
            self.parameters.further_F[name].clamp_(min=0)
        if self.average is not None:
            with region("optimizer"):
                self.average.add(self.optimizer.n_steps)
        with region("count"):
            diverges = healthy & ~torch.isfinite(sums.sse)
            self.diverged_step.copy_(torch.where(diverges, step, self.diverged_step))
            error = sums.sse if sums.error is None else sums.error
            found = sums.at_output
            loss = (error * rates.per_square if found is None else found.loss) + sums.aux_loss
            loss = loss if sums.penalty is None else loss + sums.penalty
            nats = None if found is None else found.nats
            self.totals.add(n_tokens, loss, sums, nats)
            if sums.cutoff is not None:
                self.cutoff.add(sums.cutoff, healthy)
            self.idle_tokens_F.copy_(torch.where(sums.fired_F, 0, self.idle_tokens_F + n_tokens))

    def find_dead(self) -> None:
        """Find the latents that are dead now; `Bank.count_dead` is to be called next."""
        torch.gt(self.idle_tokens_F, self.dead_after_tokens, out=self.dead_F)

    def begin_again(self, rows_S: Tensor) -> None:
        """Follow rows of encoder and decoder that were replaced: copies, optimizer, averages and counters."""
        for name in ("w_enc", "b_enc", "w_dec"):
            self.optimizer.forget(name, rows_S)
            if self.average is not None:
                self.average.forget(name, rows_S)
        self.idle_tokens_F[rows_S] = 0
        self.weights.refresh()

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
        p = Parameters.of(self.parameters.named | dict(averages), self.parameters)
        if not self.architecture.unit_rows or self.variant.is_frozen:
            return p
        return p._replace(w_dec_FD=layers.unit_rows(p.w_dec_FD, p.n_layers))

    def export(self, provenance: dict[str, Any], *, copied: bool = True) -> Parts | None:
        """Fold the training units into the weights: the SAE in the activations' own.

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
        own = rows_of(form, trained, scaling, self.target_scaling)
        whole = {name: self._gathered(rows, copied) for name, rows in own.items()}
        weights = {name: tensor for name, tensor in whole.items() if tensor is not None}
        if not weights:
            return None
        is_matryoshka = variant.architecture == "matryoshka"
        config = SaeConfig(
            d_in=len(scaling.centre_D),
            d_out=None if self.target_scaling is None else len(self.target_scaling.centre_D),
            num_latents=variant.num_latents,
            k=form.k,
            provenance=provenance,
            architecture=variant.architecture,
            prefixes=variant.prefixes if is_matryoshka else (),
            ks=form.ks,
            joined=_joined(variant.site, scaling),
            predicted=() if self.target_scaling is None else _joined(variant.sites[1], self.target_scaling),
        )
        others, device = whole_of(trained, scaling, self.target_scaling), weights["W_enc"].device
        return Parts(config, **weights, **{name: tensor.to(device) for name, tensor in others.items()})

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
            moments = {name: [*moments.get(name, []), value] for name, value in self.average.values.items()}
        whole = self.parameters.whole
        own = [name for name in by_name if name not in whole]
        row_moments, whole_moments = (
            [t for name in names for t in moments.get(name, [])] for names in (own, whole)
        )
        rows = [*(by_name[name] for name in own), self.idle_tokens_F, self.dead_F, *row_moments]
        numbers = [self.diverged_step, self.totals.values, self.cutoff.sums]
        return rows, [*(by_name[name] for name in whole), *numbers, *whole_moments]


def _joined(site: str, scaling: Scaling) -> tuple[Joined, ...]:
    """List the sites that a name joins, in their units; none of one site."""
    return tuple(Joined(name, *part) for name, part in zip(parts_of(site), scaling.parts, strict=False))

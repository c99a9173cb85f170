"""A bank: variants with the same site and width, their parameters stacked, stepped over one batch.

Parameters live in scaled, centred units: x̃ = (x − centre) · scale with E‖x̃‖² = D, one constant per
site. `export` folds both into the biases, so that a saved SAE takes activations as they are.
"""

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saemill.common.sae.parts import SaeConfig
from saemill.common.sae.sae import Sae
from saemill.train.backends import rows
from saemill.train.backends.auxk import DeadRows, auxk
from saemill.train.backends.codes import Batch, Forward, Weights, gather
from saemill.train.backends.passes import choose_kernels, passes_of
from saemill.train.backends.team import ALONE, Team
from saemill.train.graph import Graphs
from saemill.train.learner import initial
from saemill.train.memory import zeros
from saemill.train.optim.optimizer import Adam, Optimizer, Sgd
from saemill.train.profile import part
from saemill.train.sweep.variants import Variant

DEAD_EVERY_STEPS = 4
"""Steps between two looks for dead latents: each makes the host wait for the device."""


@dataclass(frozen=True, slots=True)
class Frame:
    """The units of one site: x̃ = (x − centre_D) · scale."""

    centre_D: Tensor
    scale: float

    def enter(self, x_TD: Tensor) -> Tensor:
        """Stored activations into training units. float32 [T, D]."""
        return (x_TD.float() - self.centre_D).mul_(self.scale)


class Bank:
    """V variants of one site and width.

    Args:
        variants: their settings; all of one site and number of latents.
        frame: the site's units; `centre_D` on the device.
        dtype: of the encoder's product, float32 or bfloat16.
        dead_after_tokens: a latent that has not fired for so many tokens is dead.
        sample_TD: training activations for the initial gain and the geometric median, in training
            units.
        kernels: torch, numba (compiled loops) or triton; by default `choose_kernels`.
        graphs: where each variant's step is captured and replayed; for triton and a team of one. The rows
            of dead latents are then padded to one of few lengths.
        team: the processes that train these variants together. Where it splits the latents, every
            tensor with an F holds this process's rows, `rows` of all.
    """

    def __init__(
        self,
        variants: list[Variant],
        frame: Frame,
        dtype: torch.dtype,
        dead_after_tokens: int,
        sample_TD: Tensor,
        kernels: str | None = None,
        team: Team = ALONE,
        graphs: Graphs | None = None,
    ) -> None:
        self.variants, self.frame, self.dtype, self.team = variants, frame, dtype, team
        self.graphs = graphs
        self._held: Batch | None = None
        self.dead_after_tokens = dead_after_tokens
        device = frame.centre_D.device
        self.kernels = kernels or choose_kernels("auto", device)
        self._passes = passes_of(self.kernels)
        self.rows = team.latents.part(variants[0].num_latents)
        n, f, d = len(variants), self.rows.stop - self.rows.start, len(frame.centre_D)
        self.w_dec_VFD = zeros(n, f, d, device=device)
        self.w_enc_VFD = zeros(n, f, d, device=device)
        self.b_enc_VF = torch.zeros(n, f, device=device)
        self.b_VD = torch.zeros(n, d, device=device)
        for i in range(n):
            self._initialise(i, sample_TD)
        self.product_VFD = self.w_enc_VFD
        if dtype != torch.float32:
            self.product_VFD = zeros(n, f, d, dtype=dtype, device=device)
        self.gathered_VFD = self.w_dec_VFD.to(dtype) if self.kernels == "triton" else self.w_dec_VFD
        self.quantised_V = [self._passes.quantised_weights(f, d) for _ in variants]
        self._room = self._passes.room(f, dtype, device)
        self.idle_tokens_VF = torch.zeros(n, f, dtype=torch.int64, device=device)
        self.dead_VF = torch.zeros(n, f, dtype=torch.bool, device=device)
        self._listed_VF = torch.full((n, f), f, device=device)
        self.auxk_share_V = torch.zeros(n, dtype=torch.float64, device=device)
        self._find_dead()
        self.step_number = torch.zeros((), dtype=torch.int64, device=device)
        self._hyper_VH = torch.zeros(n, 16, device=device)
        self.diverged_step_V = torch.full((n,), -1, dtype=torch.int64, device=device)
        self.frozen = [False] * n
        self.optimizers = [self._optimizer(i) for i in range(n)]
        self.totals_V = [Totals(device) for _ in variants]
        self.refresh_copies()

    @property
    def stacks(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The stacked parameters: w_enc_VFD, b_enc_VF, w_dec_VFD, b_VD."""
        return self.w_enc_VFD, self.b_enc_VF, self.w_dec_VFD, self.b_VD

    def leaves(self, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Variant i's part of them: w_enc_FD, b_enc_F, w_dec_FD, b_D."""
        w_enc_FD, b_enc_F, w_dec_FD, b_D = (stack[i] for stack in self.stacks)
        return w_enc_FD, b_enc_F, w_dec_FD, b_D

    def weights(self, i: int) -> Weights:
        """The same with the copies that products use."""
        return Weights(*self.leaves(i), self.product_VFD[i], self.gathered_VFD[i], self.quantised_V[i])

    def _initialise(self, i: int, sample_TD: Tensor) -> None:
        w_enc_FD, _, w_dec_FD, b_D = self.leaves(i)
        variant = self.variants[i]
        w_dec_FD.copy_(initial.unit_rows(variant.num_latents, len(b_D), variant.seed)[self.rows])
        if variant.b_dec_init == "geometric_median":
            b_D.copy_(initial.geometric_median(sample_TD))
        w_enc_FD.copy_(w_dec_FD)
        w_enc_FD.mul_(initial.best_gain(sample_TD, w_enc_FD, w_dec_FD, b_D, variant.k, self.team))

    def _optimizer(self, i: int) -> Optimizer:
        variant, leaves = self.variants[i], list(self.leaves(i))
        if variant.optimizer == "sgd":
            return Sgd(leaves)
        return Adam(leaves, variant.optimizer_state, variant.adam_betas)

    def step(self, x_TD: Tensor, lr_factor: float, step: int) -> None:
        """One optimizer step of every variant that has not diverged.

        Args:
            x_TD: a batch, in training units; the loss is the mean over its tokens.
            lr_factor: the schedule's factor on each variant's peak rate.
            step: its number, kept for a variant that diverges.
        """
        if step % DEAD_EVERY_STEPS == 0:
            self._find_dead()
        self._set_numbers(len(x_TD), lr_factor, step)
        batch = self._hold(x_TD)
        own = batch.tokens(self.team.tokens.part(len(x_TD)))
        for i in range(len(self.variants)):
            if self.frozen[i]:
                continue
            work = partial(self._step_variant, i, batch, own)
            if self.graphs is None:
                work()
            else:
                n_rows = len(self.dead_V[i]) if self.variants[i].auxk_alpha else 0
                self.graphs.run((self.w_enc_VFD[i].data_ptr(), n_rows), work)

    def _set_numbers(self, n_tokens: int, lr_factor: float, step: int) -> None:
        """Put what a step needs to know beside its batch where it looks for it."""
        self.step_number.fill_(step)
        rates_V = []
        for variant, optimizer in zip(self.variants, self.optimizers, strict=True):
            optimizer.begin_step()
            gs = 2 * self.loss_per_square(variant) / n_tokens
            rates_V.append(rows.Rates(gs, variant.lr * lr_factor, variant.weight_decay))
        self.rates_V = self._passes.place(rates_V, self.optimizers, self._hyper_VH)

    def _hold(self, x_TD: Tensor) -> Batch:
        """The batch; for a captured step always at the same place."""
        if self.graphs is None:
            return self._passes.prepare(x_TD, self.dtype)
        if self._held is None:
            self._held = Batch(torch.empty_like(x_TD), torch.empty_like(x_TD, dtype=self.dtype))
        self._held.x_TD.copy_(x_TD)
        self._held.product_TD.copy_(x_TD)
        return self._held

    def _step_variant(self, i: int, batch: Batch, own: Batch) -> None:
        """Forward over this process's own tokens, backward over the whole batch.

        What changes from step to step is read from tensors that stay where they are, and on a GPU the host
        waits for nothing: so it can be captured.
        """
        variant, weights = self.variants[i], self.weights(i)
        per_square = self.loss_per_square(variant) / len(batch.x_TD)
        passed = self._passes.forward(own, weights, variant.k, self._room, self.team)
        with part("auxk"):
            dead, auxk_loss = self._auxk(i, own, passed, weights, per_square)
        passed = gather(passed, len(batch.x_TD), self.team)
        diverged = self.diverged_step_V[i]
        diverged.copy_(torch.where((diverged < 0) & ~torch.isfinite(passed.sse), self.step_number, diverged))
        healthy, rates = diverged < 0, self.rates_V[i]
        fired_F = self._passes.backward(
            batch, passed, dead, weights, self.optimizers[i], healthy, rates, self.team
        )
        with part("count"):
            loss = passed.sse * per_square + auxk_loss
            self.totals_V[i].add(len(batch.x_TD), passed.sse, loss, auxk_loss, passed.n_active)
            idle_F = self.idle_tokens_VF[i]
            idle_F.copy_(torch.where(fired_F, 0, idle_F + len(batch.x_TD)))

    def _auxk(
        self, i: int, batch: Batch, passed: Forward, weights: Weights, per_square: float
    ) -> tuple[DeadRows | None, Tensor]:
        """Gradients and value of variant i's auxiliary loss."""
        variant, dead_S, n_dead = self.variants[i], self.dead_V[i], self.n_dead_V[i]
        if n_dead == 0 or variant.auxk_alpha == 0:
            return None, torch.zeros((), device=batch.x_TD.device)
        scale = (variant.auxk_alpha * per_square * self.auxk_share_V[i]).float()
        n_rows = max(n_dead, len(dead_S))  # more than are dead where padded, fewer where a team splits them
        k_aux, ways = variant.k_aux, self._passes.auxk
        return auxk(
            batch, passed, dead_S, weights, k_aux=k_aux, scale=scale, n_dead=n_rows, team=self.team, ways=ways
        )

    def _find_dead(self) -> None:
        """Look for the latents that are dead now."""
        torch.gt(self.idle_tokens_VF, self.dead_after_tokens, out=self.dead_VF)
        self._list_dead()

    def _list_dead(self) -> None:
        """Set the numbers of each variant's dead latents, ascending, and how many the team has."""
        self.dead_V = [dead_F.nonzero()[:, 0] for dead_F in self.dead_VF]
        n_dead_V = torch.tensor([len(dead_S) for dead_S in self.dead_V])
        self.n_dead_V: list[int] = self.team.latents.sum_(n_dead_V).tolist()
        shares = [min(1.0, n / v.k_aux) for n, v in zip(self.n_dead_V, self.variants, strict=True)]
        self.auxk_share_V.copy_(torch.tensor(shares, dtype=torch.float64))
        if self.graphs is not None:
            self.dead_V = [self._pad_dead(i, dead_S) for i, dead_S in enumerate(self.dead_V)]

    def _pad_dead(self, i: int, dead_S: Tensor) -> Tensor:
        """Variant i's dead latents where a captured step looks for them, followed by F, which is none.

        There are few lengths: powers of two, F, and k_aux, up to which no choice among them is needed.
        """
        n_dead, n_latents = len(dead_S), self._listed_VF.shape[1]
        power = 1 << (n_dead - 1).bit_length() if n_dead else 0
        length = min(n for n in (power, self.variants[i].k_aux, n_latents) if n >= n_dead)
        padded_S = self._listed_VF[i, :length].fill_(n_latents)
        padded_S[:n_dead] = dead_S
        return padded_S

    def loss_per_square(self, variant: Variant) -> float:
        """What one squared unit of x̃, as a mean over tokens, adds to the loss.

        `fvu` divides by the site's cached variance, which is D in these units; `mse` is the mean
        over dimensions in the activations' own units.
        """
        d = self.b_VD.shape[1]
        return 1 / d if variant.loss == "fvu" else 1 / (d * self.frame.scale**2)

    def freeze_diverged(self) -> list[tuple[Variant, int]]:
        """Stop the variants that diverged since the last call; each with the step at which it did."""
        stopped = []
        for i, step in enumerate(self.diverged_step_V.tolist()):
            if step >= 0 and not self.frozen[i]:
                self.frozen[i] = True
                stopped.append((self.variants[i], step))
        return stopped

    def dead_fraction(self, i: int) -> float:
        """Share of variant i's latents that are dead by the trainer's counter."""
        n_dead = (self.idle_tokens_VF[i] > self.dead_after_tokens).sum()
        return int(self.team.latents.sum_(n_dead)) / self.variants[i].num_latents

    def score(self, i: int, metric: str) -> float | None:
        """A metric of variant i over the window of its last steps; None where it diverged."""
        if self.frozen[i]:
            return None
        if metric == "dead_fraction":
            return self.dead_fraction(i)
        return self.totals_V[i].window(self.b_VD.shape[1])[metric]

    def export(self, i: int, provenance: dict[str, Any]) -> Sae | None:
        """Variant i in the activations' own units: only the biases change.

        Returns: the SAE on the team's first process, none on others; on the CPU where latents are split.
        """
        if self.team.tokens.rank > 0:
            return None
        variant, group = self.variants[i], self.team.latents
        w_enc, b_enc, w_dec, b = (stack[i].clone() for stack in self.stacks)
        if group.size > 1:
            w_enc, b_enc, w_dec, b = w_enc.cpu(), b_enc.cpu(), w_dec.cpu(), b.cpu()
        whole = [
            group.collect(rows, variant.num_latents) for rows in (w_enc, b_enc / self.frame.scale, w_dec)
        ]
        w_enc_FD, b_enc_F, w_dec_FD = whole
        if w_enc_FD is None or b_enc_F is None or w_dec_FD is None:
            return None
        config = SaeConfig(d_in=len(b), num_latents=variant.num_latents, k=variant.k, provenance=provenance)
        b_dec = b / self.frame.scale + self.frame.centre_D.to(b.device)
        return Sae(config, w_enc_FD, b_enc_F, w_dec_FD, b_dec)

    def kept(self, i: int) -> tuple[list[Tensor], list[Tensor]]:
        """Variant i's state for a checkpoint: tensors with a row per latent, and whole ones."""
        optimizer = self.optimizers[i]
        *of_latents, of_b = optimizer.tensors()
        rows = [*self.leaves(i)[:3], self.idle_tokens_VF[i], self.dead_VF[i], *itertools.chain(*of_latents)]
        return rows, [self.leaves(i)[3], self.diverged_step_V[i], self.totals_V[i].values, *of_b]

    def refresh(self) -> None:
        """To be called when the tensors of `kept` were filled from a checkpoint."""
        self.refresh_copies()
        self._list_dead()

    def refresh_copies(self) -> None:
        """To be called when weights were changed other than by `step`."""
        for i in range(len(self.variants)):
            self.weights(i).refresh(slice(0, self.w_enc_VFD.shape[1]))


class Totals:
    """One variant's sums on the device: since the last log line, and over a longer window."""

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(2, 6, dtype=torch.float64, device=device)

    def add(self, n_tokens: int, sse: Tensor, loss: Tensor, auxk: Tensor, n_active: Tensor) -> None:
        """Count one batch."""
        parts = [sse, loss, auxk, n_active]
        self.values[:, :4] += torch.stack([part.double() for part in parts])
        self.values[:, 4] += n_tokens
        self.values[:, 5] += 1

    def take(self, d: int) -> dict[str, float | None]:
        """The means since the last call, and start anew."""
        found = self._means(0, d)
        self.values[0].zero_()
        return found

    def open_window(self) -> None:
        """Start the longer window anew."""
        self.values[1].zero_()

    def window(self, d: int) -> dict[str, float | None]:
        """The means over the longer window."""
        return self._means(1, d)

    def _means(self, row: int, d: int) -> dict[str, float | None]:
        """fvu is the squared error against the site's cached variance (D in training units)."""
        sse, loss, auxk, active, n_tokens, n_steps = self.values[row].tolist()
        if n_tokens == 0:
            return {"fvu": None, "loss": None, "auxk": None, "l0": None}
        return {
            "fvu": sse / (n_tokens * d),
            "loss": loss / n_steps,
            "auxk": auxk / n_steps,
            "l0": active / n_tokens,
        }

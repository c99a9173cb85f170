"""A bank: variants with the same site and width, their parameters stacked, stepped over one batch.

Parameters live in scaled, centred units: x̃ = (x − centre) · scale with E‖x̃‖² = D, one constant per
site. `export` folds both into the biases, so that a saved SAE takes activations as they are.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saemill.common.sae import Sae, SaeConfig
from saemill.train import codes, initial, rows
from saemill.train.auxk import DeadRows, auxk
from saemill.train.codes import Batch, Forward, Weights
from saemill.train.optimizer import Adam, Optimizer, Sgd
from saemill.train.profile import part
from saemill.train.variants import Variant

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
        fused: whether to use the Triton kernels; by default on a GPU.
    """

    def __init__(
        self,
        variants: list[Variant],
        frame: Frame,
        dtype: torch.dtype,
        dead_after_tokens: int,
        sample_TD: Tensor,
        fused: bool | None = None,
    ) -> None:
        self.variants, self.frame, self.dtype = variants, frame, dtype
        self.dead_after_tokens = dead_after_tokens
        device = frame.centre_D.device
        fused = device.type == "cuda" if fused is None else fused
        self._forward, self._backward = _passes(fused)
        n, f, d = len(variants), variants[0].num_latents, len(frame.centre_D)
        self.w_dec_VFD = torch.empty(n, f, d, device=device)
        self.w_enc_VFD = torch.empty(n, f, d, device=device)
        self.b_enc_VF = torch.zeros(n, f, device=device)
        self.b_VD = torch.zeros(n, d, device=device)
        for i in range(n):
            self._initialise(i, sample_TD)
        self.product_VFD = self.w_enc_VFD.to(dtype)
        self.gathered_VFD = self.w_dec_VFD.to(dtype) if fused else self.w_dec_VFD
        self._room_TF = codes.room(f, dtype, device)
        self.idle_tokens_VF = torch.zeros(n, f, dtype=torch.int64, device=device)
        self.dead_V = self._find_dead()
        self.diverged_step_V = torch.full((n,), -1, dtype=torch.int64, device=device)
        self.frozen = [False] * n
        self.optimizers = [self._optimizer(i) for i in range(n)]
        self.totals_V = [Totals(device) for _ in variants]

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
        return Weights(*self.leaves(i), self.product_VFD[i], self.gathered_VFD[i])

    def _initialise(self, i: int, sample_TD: Tensor) -> None:
        w_enc_FD, _, w_dec_FD, b_D = self.leaves(i)
        variant = self.variants[i]
        w_dec_FD.copy_(initial.unit_rows(len(w_dec_FD), len(b_D), variant.seed))
        if variant.b_dec_init == "geometric_median":
            b_D.copy_(initial.geometric_median(sample_TD))
        w_enc_FD.copy_(w_dec_FD)
        w_enc_FD.mul_(initial.best_gain(sample_TD, w_enc_FD, w_dec_FD, b_D, variant.k))

    def _optimizer(self, i: int) -> Optimizer:
        variant, leaves = self.variants[i], list(self.leaves(i))
        return Adam(leaves, variant.optimizer_state) if variant.optimizer == "adam" else Sgd(leaves)

    def step(self, x_TD: Tensor, lr_factor: float, step: int) -> None:
        """One optimizer step of every variant that has not diverged.

        Args:
            x_TD: a batch, in training units; the loss is the mean over its tokens.
            lr_factor: the schedule's factor on each variant's peak rate.
            step: its number, kept for a variant that diverges.
        """
        batch = Batch(x_TD, x_TD.to(self.dtype))
        if step % DEAD_EVERY_STEPS == 0:
            self.dead_V = self._find_dead()
        for i in range(len(self.variants)):
            if not self.frozen[i]:
                self._step_variant(i, batch, lr_factor, step)

    def _step_variant(self, i: int, batch: Batch, lr_factor: float, step: int) -> None:
        variant, weights = self.variants[i], self.weights(i)
        per_square = self.loss_per_square(variant) / len(batch.x_TD)
        passed = self._forward(batch, weights, variant.k, self._room_TF)
        with part("auxk"):
            dead, auxk_loss = self._auxk(i, batch, passed, weights, per_square)
        diverged = self.diverged_step_V[i]
        diverged.copy_(torch.where((diverged < 0) & ~torch.isfinite(passed.sse), step, diverged))
        rates = rows.Rates(2 * per_square, variant.lr * lr_factor, variant.weight_decay)
        fired_F = self._backward(batch, passed, dead, weights, self.optimizers[i], diverged < 0, rates)
        with part("count"):
            loss = passed.sse * per_square + auxk_loss
            self.totals_V[i].add(len(batch.x_TD), passed.sse, loss, auxk_loss, passed.codes.val_TK)
            idle_F = self.idle_tokens_VF[i]
            idle_F.copy_(torch.where(fired_F, 0, idle_F + len(batch.x_TD)))

    def _auxk(
        self, i: int, batch: Batch, passed: Forward, weights: Weights, per_square: float
    ) -> tuple[DeadRows | None, Tensor]:
        """Gradients and value of variant i's auxiliary loss."""
        variant, dead_S = self.variants[i], self.dead_V[i]
        if len(dead_S) == 0 or variant.auxk_alpha == 0:
            return None, torch.zeros((), device=batch.x_TD.device)
        scale = variant.auxk_alpha * per_square * min(1.0, len(dead_S) / variant.k_aux)
        return auxk(batch, passed, dead_S, weights, k_aux=variant.k_aux, scale=scale)

    def _find_dead(self) -> list[Tensor]:
        """Numbers of the dead latents of each variant, ascending. int64 [n_dead]."""
        return [(idle_F > self.dead_after_tokens).nonzero()[:, 0] for idle_F in self.idle_tokens_VF]

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
        return float((self.idle_tokens_VF[i] > self.dead_after_tokens).float().mean())

    def export(self, i: int, provenance: dict[str, Any]) -> Sae:
        """Variant i in the activations' own units: only the biases change."""
        w_enc, b_enc, w_dec, b = (stack[i].clone() for stack in self.stacks)
        scale, centre_D = self.frame.scale, self.frame.centre_D
        f, d = w_enc.shape
        config = SaeConfig(d_in=d, num_latents=f, k=self.variants[i].k, provenance=provenance)
        return Sae(config, w_enc, b_enc / scale, w_dec, b / scale + centre_D)

    def state(self) -> dict[str, Any]:
        """All that a checkpoint needs."""
        return {
            "stacks": self.stacks,
            "optimizers": [optimizer.state() for optimizer in self.optimizers],
            "idle_tokens_VF": self.idle_tokens_VF,
            "dead_V": self.dead_V,
            "diverged_step_V": self.diverged_step_V,
            "frozen": self.frozen,
            "totals_V": [totals.values for totals in self.totals_V],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        for mine, saved in zip(self.stacks, state["stacks"], strict=True):
            mine.copy_(saved)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state(saved)
        self.product_VFD.copy_(self.w_enc_VFD)
        self.idle_tokens_VF.copy_(state["idle_tokens_VF"])
        self.diverged_step_V.copy_(state["diverged_step_V"])
        self.dead_V = list(state["dead_V"])
        self.frozen = list(state["frozen"])
        for totals, saved in zip(self.totals_V, state["totals_V"], strict=True):
            totals.values.copy_(saved)


class Totals:
    """One variant's sums since the last log line, on the device."""

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(6, dtype=torch.float64, device=device)

    def add(self, n_tokens: int, sse: Tensor, loss: Tensor, auxk: Tensor, val_TK: Tensor) -> None:
        """Count one micro-batch."""
        active = (val_TK > 0).sum()
        parts = [sse, loss, auxk, active]
        self.values[:4] += torch.stack([part.double() for part in parts])
        self.values[4] += n_tokens

    def take(self, d: int, n_steps: int) -> dict[str, float | None]:
        """The means since the last call, and start anew.

        fvu is the squared error against the site's cached variance (D in training units).
        """
        sse, loss, auxk, active, n_tokens, _ = self.values.tolist()
        self.values.zero_()
        if n_tokens == 0:
            return {"fvu": None, "loss": None, "auxk": None, "l0": None}
        return {
            "fvu": sse / (n_tokens * d),
            "loss": loss / n_steps,
            "auxk": auxk / n_steps,
            "l0": active / n_tokens,
        }


def _passes(fused: bool) -> tuple[Any, Any]:
    """The two passes of a step: in torch, or with kernels, which need Triton."""
    if not fused:
        return codes.forward, rows.backward
    from saemill.train import fused as kernels

    return kernels.forward, kernels.backward

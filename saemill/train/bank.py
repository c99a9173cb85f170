"""A bank: variants with the same site and width, their parameters stacked, stepped over one batch.

Parameters live in scaled, centred units: x̃ = (x − centre) · scale with E‖x̃‖² = D, one constant per
site. `export` folds both into the biases, so that a saved SAE takes activations as they are.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saemill.common.sae import Sae, SaeConfig
from saemill.train import ops
from saemill.train.variants import Variant

ADAM_EPS = 1e-10
"""The loss is a mean over tokens and dimensions, so its gradients are small: torch's default of
1e-8 would slow rare latents."""


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
    """

    def __init__(
        self,
        variants: list[Variant],
        frame: Frame,
        dtype: torch.dtype,
        dead_after_tokens: int,
        sample_TD: Tensor,
    ) -> None:
        self.variants, self.frame, self.dtype = variants, frame, dtype
        self.dead_after_tokens = dead_after_tokens
        device = frame.centre_D.device
        n, f, d = len(variants), variants[0].num_latents, len(frame.centre_D)
        self.w_dec_VFD = torch.stack([_initial_rows(f, d, v.seed) for v in variants]).to(device)
        self.w_enc_VFD = self.w_dec_VFD.clone()
        self.b_enc_VF = torch.zeros(n, f, device=device)
        self.b_VD = torch.zeros(n, d, device=device)
        for i, variant in enumerate(variants):
            if variant.b_dec_init == "geometric_median":
                self.b_VD[i] = ops.geometric_median(sample_TD)
            self.w_enc_VFD[i] *= self._initial_gain(i, sample_TD)
        self.idle_tokens_VF = torch.zeros(n, f, dtype=torch.int64, device=device)
        self.diverged_step_V = torch.full((n,), -1, dtype=torch.int64, device=device)
        self.frozen = [False] * n
        self.optimizers = [self._optimizer(i) for i in range(n)]
        self.totals_V = [Totals(device) for _ in variants]

    @property
    def stacks(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The stacked parameters: w_enc_VFD, b_enc_VF, w_dec_VFD, b_VD."""
        return self.w_enc_VFD, self.b_enc_VF, self.w_dec_VFD, self.b_VD

    def _initial_gain(self, i: int, sample_TD: Tensor) -> Tensor:
        """The factor on the encoder with which the first reconstructions fit best.

        Without it k unit directions, each with its full projection, overshoot the more the larger
        k is, and the first steps only undo that.
        """
        w_enc, b_enc, w_dec, b = (stack[i] for stack in self.stacks)
        codes = ops.encode(sample_TD, w_enc, b_enc, b, self.variants[i].k, torch.float32)
        raw_TD = ops.decode(codes, w_dec, b) - b
        return ((sample_TD - b) * raw_TD).sum() / raw_TD.square().sum().clamp(min=1e-12)

    def _optimizer(self, i: int) -> torch.optim.Optimizer:
        """torch's own fused optimizer over variant i's slices of the stacks."""
        variant = self.variants[i]
        leaves = [torch.nn.Parameter(stack[i]) for stack in self.stacks]
        decayed = {"params": leaves[:1], "weight_decay": variant.weight_decay}
        groups = [decayed, {"params": leaves[1:], "weight_decay": 0.0}]
        if variant.optimizer == "adam":
            return torch.optim.AdamW(groups, lr=variant.lr, eps=ADAM_EPS, fused=True)
        return torch.optim.SGD(groups, lr=variant.lr, momentum=0.9, fused=True)

    def step(self, micro_batches: list[Tensor], lr_factor: float, step: int) -> None:
        """One optimizer step of every variant that has not diverged.

        Args:
            micro_batches: x_TD each, in training units; the loss is the mean over all their tokens.
            lr_factor: the schedule's factor on each variant's peak rate.
            step: its number, kept for a variant that diverges.
        """
        for i in range(len(self.variants)):
            if not self.frozen[i]:
                self._step_variant(i, micro_batches, lr_factor, step)

    def _step_variant(self, i: int, micro_batches: list[Tensor], lr_factor: float, step: int) -> None:
        w_enc, b_enc, w_dec, b = (stack[i] for stack in self.stacks)
        n_tokens = sum(map(len, micro_batches))
        dead = self._dead(i)
        total: ops.Gradients | None = None
        finite = torch.ones((), dtype=torch.bool, device=w_enc.device)
        fired = torch.zeros_like(self.idle_tokens_VF[i], dtype=torch.bool)
        for x_TD in micro_batches:
            codes = ops.encode(x_TD, w_enc, b_enc, b, self.variants[i].k, self.dtype)
            grads, sse = self._backward(i, x_TD, codes, dead, n_tokens)
            total = (
                grads if total is None else ops.Gradients(*(a + g for a, g in zip(total, grads, strict=True)))
            )
            finite &= torch.isfinite(sse)
            fired[codes.idx_TK[codes.val_TK > 0]] = True
        assert total is not None
        total = total._replace(w_dec_FD=ops.project(total.w_dec_FD, w_dec))
        self.idle_tokens_VF[i] = torch.where(fired, 0, self.idle_tokens_VF[i] + n_tokens)
        self._update(i, total, lr_factor, finite, step)
        healthy = self.diverged_step_V[i] < 0
        w_dec.div_(torch.where(healthy, ops.row_lengths(w_dec), 1.0))

    def _backward(
        self, i: int, x_TD: Tensor, codes: ops.Codes, dead: Tensor, n_tokens: int
    ) -> tuple[ops.Gradients, Tensor]:
        """Gradients of one micro-batch's share of the loss, and its sum of squared errors."""
        variant = self.variants[i]
        w_enc, b_enc, w_dec, b = (stack[i] for stack in self.stacks)
        per_square = self.loss_per_square(variant) / n_tokens
        e_TD = ops.decode(codes, w_dec, b).sub_(x_TD)
        sse = e_TD.square().sum()
        grads = ops.gradients(x_TD, e_TD * (2 * per_square), codes, w_enc, w_dec, b)
        auxk = torch.zeros((), device=x_TD.device)
        if len(dead) and variant.auxk_alpha > 0:
            scale = variant.auxk_alpha * per_square * min(1.0, len(dead) / variant.k_aux)
            grads, auxk = ops.add_auxk(
                grads, x_TD, e_TD, dead, w_enc, b_enc, w_dec, b, k_aux=variant.k_aux, scale=scale
            )
        self.totals_V[i].add(len(x_TD), sse, sse * per_square + auxk, auxk, codes.val_TK)
        return grads, sse

    def loss_per_square(self, variant: Variant) -> float:
        """What one squared unit of x̃, as a mean over tokens, adds to the loss.

        `fvu` divides by the site's cached variance, which is D in these units; `mse` is the mean
        over dimensions in the activations' own units.
        """
        d = self.b_VD.shape[1]
        return 1 / d if variant.loss == "fvu" else 1 / (d * self.frame.scale**2)

    def _dead(self, i: int) -> Tensor:
        """Numbers of the latents idle for too long. int64 [n_dead]."""
        return (self.idle_tokens_VF[i] > self.dead_after_tokens).nonzero()[:, 0]

    def _update(self, i: int, grads: ops.Gradients, lr_factor: float, finite: Tensor, step: int) -> None:
        """The optimizer's step, skipped on the device for a variant whose error is not finite."""
        optimizer: Any = self.optimizers[i]
        diverged = self.diverged_step_V[i]
        self.diverged_step_V[i] = torch.where((diverged < 0) & ~finite, step, diverged)
        leaves = [p for group in optimizer.param_groups for p in group["params"]]
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad
        for group in optimizer.param_groups:
            group["lr"] = self.variants[i].lr * lr_factor
        optimizer.grad_scale = None
        optimizer.found_inf = (self.diverged_step_V[i] >= 0).float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

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
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "idle_tokens_VF": self.idle_tokens_VF,
            "diverged_step_V": self.diverged_step_V,
            "frozen": self.frozen,
            "totals_V": [totals.values for totals in self.totals_V],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        for mine, saved in zip(self.stacks, state["stacks"], strict=True):
            mine.copy_(saved)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.idle_tokens_VF.copy_(state["idle_tokens_VF"])
        self.diverged_step_V.copy_(state["diverged_step_V"])
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


def _initial_rows(n_latents: int, d: int, seed: int) -> Tensor:
    """Random directions; the encoder starts as their transpose (Gao et al. 2024). [F, D]."""
    rows = torch.randn(n_latents, d, generator=torch.Generator().manual_seed(seed))
    return rows / ops.row_lengths(rows)

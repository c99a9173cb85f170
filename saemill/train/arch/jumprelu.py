"""JumpReLU (Rajamanoharan et al. 2024, arXiv 2407.14435): a latent is active above its own threshold.

f = z · 1[z > θ],   z = W_enc (x − b) + b_enc,   θ ≥ 0 learnt by straight-through gradients of width ε:

    ∂f/∂θ = −θ/ε · K((z − θ)/ε),   ∂1[z > θ]/∂θ = −1/ε · K((z − θ)/ε),   K(u) = 1[|u| < 1/2]

The loss is FVU plus a penalty: λ · L0; or (L0/L0* − 1)², which leads to a target L0* and acts as a λ of
2 (L0/L0* − 1)/L0* on this batch (as in dictionary_learning); or λ · Σ tanh(4 f) (Anthropic, January 2025).
In it codes, θ and ε are in units in which E‖x‖² = 1, and λ means the same at every width. θ is kept in these
units too, since the size of Adam's step does not follow a parameter's unit. Below 0 it would let negative
codes through, which no saved SAE has, so each step puts it back to 0.

ε is a share of each latent's own θ, unless it is given. Thresholds fall with the width D and with L0, and so
does the spacing of pre-activations near them; one share fits all. A band too narrow holds too few tokens to
learn from: a threshold walks at random then, and a latent whose threshold gets beyond all tokens is dead.
"""

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from saemill.train.arch import dense, initial
from saemill.train.backends.architecture import Auxiliary, Inference, Losses, Pull, Sample, Seen, Slopes
from saemill.train.backends.codes import Above, Codes, Largest
from saemill.train.backends.parameters import Parameters
from saemill.train.backends.plain import decode, pre_activations
from saemill.train.backends.team import Team

BANDWIDTH_SHARE = 0.5
"""ε over a latent's threshold, where no number is given: docs/recipes.md."""
LEAST_BANDWIDTH = 0.001
"""Its least value then, at which a threshold of 0 still learns (that of arXiv 2408.05147)."""


@dataclass(frozen=True, slots=True)
class JumpRelu:
    """One SAE's settings and its definition."""

    bandwidth: float | None
    """ε, where E‖x‖² = 1; None for a share of each threshold."""
    target_l0: float | None
    """Active latents per token to be reached; None with a coefficient."""
    coefficient: float
    """Weight of the penalty, in the units of FVU; with a target of its square."""
    penalty: Literal["step", "tanh"] = "step"
    auxiliary: Auxiliary | Pull | None = None
    """What dead latents learn; None where they learn nothing."""
    most_density: float | None = None
    """Share of tokens above which a latent's firing is penalised; None without bound."""
    warmup_steps: int = 0
    """Steps over which the penalty rises."""

    further = ("threshold",)
    never_below_0 = ("threshold",)
    has_gate = False
    unit_rows = True
    groups = None

    def at(self, step: int) -> Self:
        """Return it with the penalty's weight of a step."""
        return replace(self, coefficient=initial.warmed(self.coefficient, step, self.warmup_steps))

    def rule(self, p: Parameters) -> Above:
        """Return the rule by which pre-activations become codes."""
        theta_F, unit = p.further_F["threshold"], len(p.b_D) ** 0.5
        return Above(theta_F * unit, self._bandwidth_F(theta_F) * unit)

    def _bandwidth_F(self, theta_F: Tensor) -> Tensor:
        """Choose each latent's ε, where E‖x‖² = 1."""
        if self.bandwidth is not None:
            return torch.full_like(theta_F, self.bandwidth)
        return (BANDWIDTH_SHARE * theta_F).clamp(min=LEAST_BANDWIDTH)

    def initialise(self, p: Parameters, n_latents: int, seed: int, sample: Sample, team: Team) -> None:
        """Start as TopK does, with one threshold for all that `initial.start_l0` latents per token pass."""
        n_active = round(self.target_l0 or initial.start_l0(n_latents))
        initial.tied(p, n_latents, seed, sample, Largest(n_active), team)
        threshold = initial.cutoff(sample, p, n_active, team)
        p.further_F["threshold"].fill_(threshold / len(p.b_D) ** 0.5)

    def weights_F(self, seen: Seen, d: int) -> Tensor:
        """Compute what one more token on which a latent is active adds to the loss."""
        assert seen.count_F is not None
        assert seen.n_active is not None
        weight_F = torch.full_like(seen.count_F, self.coefficient * d)
        if self.target_l0 is not None:
            l0 = seen.n_active / seen.n_tokens
            weight_F *= 2 * (l0 / self.target_l0 - 1) / self.target_l0
        if self.most_density is not None:
            weight_F += self.coefficient * d * (seen.count_F > self.most_density * seen.n_tokens)
        return weight_F

    def _penalty(self, own_count_F: Tensor, seen: Seen, d: int) -> Tensor:
        """Compute the penalty of some latents on some tokens, their part of the batch's, in squared units."""
        assert seen.count_F is not None
        assert seen.n_active is not None
        n_own, penalty = own_count_F.sum(), self.coefficient * d
        if self.target_l0 is None:
            total = penalty * n_own
        else:
            distance = seen.n_active / seen.n_tokens / self.target_l0 - 1
            total = penalty * seen.n_tokens * distance.square() * n_own / seen.n_active.clamp(min=1)
        if self.most_density is not None:
            total = total + penalty * own_count_F[seen.count_F > self.most_density * seen.n_tokens].sum()
        return total

    def loss(self, p: Parameters, x_TD: Tensor, y_TE: Tensor, seen: Seen, dtype: torch.dtype) -> Losses:
        """Compute the loss densely: the definition; `seen` has how often latents are active in the batch."""
        d, pre_TF = y_TE.shape[1], pre_activations(p, x_TD, dtype)
        theta_F, width_F = p.further_F["threshold"] * d**0.5, self.rule(p).bandwidth_F.detach()
        active_TF = (pre_TF > theta_F).to(pre_TF.dtype).detach()
        near_TF = ((pre_TF - theta_F).abs() < width_F / 2).to(pre_TF.dtype).detach() / width_F
        moved_F = theta_F - theta_F.detach()  # 0, with the gradient of θ
        codes_TF = pre_TF * active_TF - theta_F.detach() * near_TF * moved_F
        e_TD = decode(p, codes_TF) - y_TE
        if self.penalty == "tanh":
            penalty = self.coefficient * d * torch.tanh(4 * codes_TF / d**0.5).sum()
        else:
            step_TF = active_TF - near_TF * moved_F
            linear = (step_TF * self.weights_F(seen, d)).sum()
            penalty = linear - linear.detach() + self._penalty(active_TF.sum(0), seen, d)
        if isinstance(self.auxiliary, Pull):
            dead_S = seen.dead.latents_S
            below_TS = torch.relu(theta_F[dead_S] - pre_TF[:, dead_S])
            aux = self.auxiliary.weight * d**0.5 * below_TS.sum()
        else:
            aux = dense.auxk(self.auxiliary, p, pre_TF, e_TD, seen)
        return Losses(e_TD.square().sum(), aux, codes_TF, penalty=penalty)

    def codes(self, p: Parameters, found: Codes) -> Codes:
        """Keep what is above its threshold, of all within the bandwidth."""
        pre_TK = found.val_TK
        active_TK = (pre_TK > self.rule(p).threshold_F[found.idx_TK]) & found.used_TK
        return found._replace(val_TK=pre_TK.where(active_TK, 0), pre_TK=pre_TK)

    def slopes(
        self,
        p: Parameters,
        codes: Codes,
        seen: Seen,
        dot_TK: Tensor,
        held_dot_TK: Tensor | None,
        per_square: float,
    ) -> Slopes:
        """Compute the gradients at pre-activations and thresholds, as `loss` has them."""
        rule, unit = self.rule(p), len(p.b_D) ** 0.5
        assert codes.pre_TK is not None
        theta_TK, active_TK = rule.threshold_F[codes.idx_TK], codes.active_TK
        width_TK = rule.bandwidth_F[codes.idx_TK]
        near_TK = ((codes.pre_TK - theta_TK).abs() < width_TK / 2) & codes.used_TK
        n_latents, dcode_TK = len(p.b_enc_F), dot_TK * (2 * per_square)
        count_F = codes.by_latent(active_TK.float(), n_latents)
        at_theta_TK = torch.zeros_like(dcode_TK)
        if self.penalty == "tanh":
            tanh_TK, weight = torch.tanh(4 * codes.val_TK / unit), self.coefficient * unit * per_square
            dcode_TK = dcode_TK + 4 * weight * (1 - tanh_TK.square())
            penalty = weight * unit * tanh_TK.sum()
        else:
            counted, d = seen._replace(count_F=count_F), len(p.b_D)
            at_theta_TK = (self.weights_F(counted, d) * per_square)[codes.idx_TK]
            penalty = self._penalty(count_F, counted, d) * per_square
        dtheta_TK = (theta_TK * dcode_TK + at_theta_TK).where(near_TK, 0) / -width_TK
        dtheta_F = codes.by_latent(dtheta_TK, n_latents)
        if isinstance(self.auxiliary, Pull):
            dead_S, scale = seen.dead.latents_S, self.auxiliary.weight * unit * per_square
            dtheta_F[dead_S] += scale * (seen.n_tokens - count_F[dead_S])
        return Slopes(dcode_TK.where(active_TK, 0), {"threshold": dtheta_F * unit}, penalty=penalty)

    def inference(self, p: Parameters, cutoff: float) -> Inference:
        """Return the form in which the SAE is used: itself."""
        threshold_F = self.rule(p).threshold_F.clamp(min=0)
        return Inference(None, threshold_F, p.w_enc_FD, p.b_enc_F, p.w_dec_FD)

    def restore(self, p: Parameters, form: Inference) -> None:
        """Start as a finished SAE with thresholds."""
        assert form.threshold_F is not None
        initial.restored(p, form)
        p.further_F["threshold"].copy_(form.threshold_F / len(p.b_D) ** 0.5)

"""ReLU with an L1 penalty (Bricken et al. 2023; Anthropic, April 2024).

f = ReLU(W_enc (x − b) + b_enc),   loss = FVU + λ · Σ f^p

Decoder rows are of unit length, or free with their norms in the penalty, Σ (f · ‖W_dec‖)^p; of a crosscoder
those of its parts at each site, Σ (f · Σ_l ‖W_dec,l‖)^p (Lindsey et al. 2024), so that a latent of one site
alone costs less than one of all. Codes in the penalty are in units in which E‖x‖² = 1, so that λ means the
same at every width.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from saemill.common.sae import layers
from saemill.train.arch import initial
from saemill.train.backends.architecture import Inference, Losses, Sample, Seen, Slopes
from saemill.train.backends.codes import Above, Codes
from saemill.train.backends.parameters import Parameters
from saemill.train.backends.plain import decode, pre_activations
from saemill.train.backends.team import Team


@dataclass(frozen=True, slots=True)
class Relu:
    """One SAE's settings and its definition."""

    coefficient: float
    """Weight of the penalty, in the units of FVU."""
    power: float = 1.0
    """p, of each code in the penalty."""
    unit_rows: bool = True
    """Whether decoder rows are kept at unit length."""
    warmup_steps: int = 0
    """Steps over which the penalty rises."""

    further = ()
    never_below_0 = ()
    has_gate = False
    auxiliary = None
    groups = None

    def at(self, step: int) -> Self:
        """Return it with the penalty's weight of a step."""
        return replace(self, coefficient=initial.warmed(self.coefficient, step, self.warmup_steps))

    def rule(self, p: Parameters) -> Above:
        """Return the rule by which pre-activations become codes."""
        zeros_F = torch.zeros_like(p.b_enc_F)
        return Above(zeros_F, zeros_F)

    def initialise(self, p: Parameters, n_latents: int, seed: int, sample: Sample, team: Team) -> None:
        """Start as TopK does, with a bias that `initial.start_l0` latents per token pass."""
        initial.tied_with_bias(p, n_latents, seed, sample, team)

    def loss(self, p: Parameters, x_TD: Tensor, y_TE: Tensor, seen: Seen, dtype: torch.dtype) -> Losses:
        """Compute the loss densely: the definition."""
        d, codes_TF = y_TE.shape[1], torch.relu(pre_activations(p, x_TD, dtype))
        e_TD = decode(p, codes_TF) - y_TE
        size_F = self._norms_FL(p).sum(1) / d**0.5
        active_TF = codes_TF > 0  # x^p has no slope at 0
        sizes_TF = torch.where(active_TF, codes_TF, 1) * size_F
        penalty = torch.where(active_TF, sizes_TF**self.power, 0).sum()
        error = e_TD.square().sum()
        return Losses(error, error.new_zeros(()), codes_TF, penalty=self.coefficient * d * penalty)

    def _norms_FL(self, p: Parameters) -> Tensor:
        """Compute the lengths of decoder rows that the penalty counts: of free rows those at each site."""
        return layers.lengths(p.w_dec_FD, (1.0,) * p.n_layers)[:, None] if self.unit_rows else p.norms_FL

    def codes(self, p: Parameters, found: Codes) -> Codes:
        """Return what the rule found: the codes themselves."""
        return found

    def slopes(
        self,
        p: Parameters,
        codes: Codes,
        seen: Seen,
        dot_TK: Tensor,
        held_dot_TK: Tensor | None,
        per_square: float,
    ) -> Slopes:
        """Compute the gradient at the pre-activations, and on the norms of free rows, as `loss` has them."""
        val_TK, n_latents, d = codes.val_TK, len(p.b_enc_F), len(p.b_D)
        norms_FL, active_TK = self._norms_FL(p), codes.active_TK
        norm_F = norms_FL.sum(1)
        weight, norm_TK = self.coefficient * d * per_square, norm_F[codes.idx_TK] / d**0.5
        size_TK = (val_TK * norm_TK).where(active_TK, 1)
        penalty_TK = weight * (size_TK**self.power).where(active_TK, 0)
        dval_TK = dot_TK * (2 * per_square) + self.power * penalty_TK / val_TK.where(active_TK, 1)
        toward_FL = None
        if not self.unit_rows:
            of_norm_F1 = (self.power * codes.by_latent(penalty_TK, n_latents))[:, None]
            # A part of length 0 stays so, as its norm's gradient there is 0.
            toward_FL = (of_norm_F1 / (norm_F[:, None] * norms_FL)).where(norms_FL > 0, 0)
        return Slopes(dval_TK.where(active_TK, 0), toward_FL=toward_FL, penalty=penalty_TK.sum())

    def inference(self, p: Parameters, cutoff: float) -> Inference:
        """Return the form in which the SAE is used: thresholds of 0, and rows of unit length."""
        if self.unit_rows:
            return Inference(None, torch.zeros_like(p.b_enc_F), p.w_enc_FD, p.b_enc_F, p.w_dec_FD)
        norm_F = p.w_dec_FD.norm(dim=1).clamp(min=1e-12)
        w_enc_FD, w_dec_FD = p.w_enc_FD * norm_F[:, None], p.w_dec_FD / norm_F[:, None]
        return Inference(None, torch.zeros_like(norm_F), w_enc_FD, p.b_enc_F * norm_F, w_dec_FD)

    def restore(self, p: Parameters, form: Inference) -> None:
        """Start as a finished SAE."""
        initial.restored(p, form)

"""Gated (Rajamanoharan et al. 2024, arXiv 2404.16014): one path says which latents are active, one how much.

π = W_enc (x − b) + b_enc,   f = 1[π > 0] · ReLU(exp(r) · W_enc (x − b) + b_mag)
loss = FVU + λ · Σ ReLU(π) + ‖x − x̂(ReLU(π))‖²/D,   the last with the decoder detached

Codes in the penalty are in units in which E‖x‖² = 1.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from saemill.train.arch import initial
from saemill.train.backends.architecture import Inference, Losses, Sample, Seen, Slopes
from saemill.train.backends.codes import Above, Codes
from saemill.train.backends.parameters import Parameters
from saemill.train.backends.plain import decode, pre_activations
from saemill.train.backends.team import Team


@dataclass(frozen=True, slots=True)
class Gated:
    """One SAE's settings and its definition."""

    coefficient: float
    """Weight of the penalty, in the units of FVU."""
    warmup_steps: int = 0
    """Steps over which the penalty rises."""

    further = ("r_mag", "b_mag")
    never_below_0 = ()
    has_gate = True
    unit_rows = True
    auxiliary = None
    groups = None

    def at(self, step: int) -> Self:
        """Return it with the penalty's weight of a step."""
        return replace(self, coefficient=initial.warmed(self.coefficient, step, self.warmup_steps))

    def rule(self, p: Parameters) -> Above:
        """Return the rule by which pre-activations, those of the gate, become codes."""
        zeros_F = torch.zeros_like(p.b_enc_F)
        return Above(zeros_F, zeros_F)

    def initialise(self, p: Parameters, n_latents: int, seed: int, sample: Sample, team: Team) -> None:
        """Start as TopK does, with a bias of the gate that `initial.start_l0` latents per token pass."""
        initial.tied_with_bias(p, n_latents, seed, sample, team)

    def loss(self, p: Parameters, x_TD: Tensor, y_TE: Tensor, seen: Seen, dtype: torch.dtype) -> Losses:
        """Compute the loss densely: the definition."""
        d, gate_TF = y_TE.shape[1], pre_activations(p, x_TD, dtype)
        linear_TF = gate_TF - p.b_enc_F
        r_F, b_mag_F = p.further_F["r_mag"], p.further_F["b_mag"]
        codes_TF = torch.where(gate_TF > 0, torch.relu(r_F.exp() * linear_TF + b_mag_F), 0)
        e_TD = decode(p, codes_TF) - y_TE
        open_TF = torch.relu(gate_TF)
        held = p._replace(w_dec_FD=p.w_dec_FD.detach(), b_D=p.b_D.detach())
        gate_e_TD = decode(held, open_TF) - y_TE.detach()
        penalty = self.coefficient * d**0.5 * open_TF.sum()
        return Losses(e_TD.square().sum(), gate_e_TD.square().sum(), codes_TF, penalty=penalty)

    def codes(self, p: Parameters, found: Codes) -> Codes:
        """Compute the magnitudes where the gate is open."""
        magnitude_TK = self._magnitude(p, found.val_TK, found.idx_TK)
        return found._replace(val_TK=magnitude_TK.relu().where(found.used_TK, 0), pre_TK=found.val_TK)

    def _magnitude(self, p: Parameters, gate_TK: Tensor, idx_TK: Tensor) -> Tensor:
        r_F, b_mag_F = p.further_F["r_mag"], p.further_F["b_mag"]
        return r_F.exp()[idx_TK] * (gate_TK - p.b_enc_F[idx_TK]) + b_mag_F[idx_TK]

    def slopes(
        self,
        p: Parameters,
        codes: Codes,
        seen: Seen,
        dot_TK: Tensor,
        held_dot_TK: Tensor | None,
        per_square: float,
    ) -> Slopes:
        """Compute the gradients of both paths, as `loss` has them."""
        assert codes.pre_TK is not None
        assert held_dot_TK is not None
        idx_TK, gate_TK, n_latents = codes.idx_TK, codes.pre_TK, len(p.b_enc_F)
        weight = self.coefficient * len(p.b_D) ** 0.5 * per_square
        dgate_TK = (held_dot_TK * (2 * per_square) + weight).where(codes.used_TK, 0)
        dmag_TK = (dot_TK * (2 * per_square)).where(codes.active_TK, 0)
        dlinear_TK = dmag_TK * p.further_F["r_mag"].exp()[idx_TK]
        dr_TK = dlinear_TK * (gate_TK - p.b_enc_F[idx_TK])
        further_F = {
            "r_mag": codes.by_latent(dr_TK, n_latents),
            "b_mag": codes.by_latent(dmag_TK, n_latents),
        }
        db_enc_F = codes.by_latent(dgate_TK, n_latents)
        return Slopes(dlinear_TK + dgate_TK, further_F, db_enc_F, penalty=weight * gate_TK.sum())

    def inference(self, p: Parameters, cutoff: float) -> Inference:
        """Return the form in which the SAE is used: the gate is a threshold on the magnitude."""
        factor_F, b_mag_F = p.further_F["r_mag"].exp(), p.further_F["b_mag"]
        threshold_F = (b_mag_F - factor_F * p.b_enc_F).clamp(min=0)
        return Inference(None, threshold_F, p.w_enc_FD * factor_F[:, None], b_mag_F, p.w_dec_FD)

    def restore(self, p: Parameters, form: Inference) -> None:
        """Start as a finished SAE with thresholds: with r = 0 the gate is open where z − θ > 0. Which r its
        training ended with is not known afterwards; none changes what it computes."""
        assert form.threshold_F is not None
        initial.restored(p, form)
        p.b_enc_F.copy_(form.b_enc_F - form.threshold_F)
        p.further_F["b_mag"].copy_(form.b_enc_F)

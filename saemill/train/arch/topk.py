"""TopK (Gao et al. 2024): of each token the k largest pre-activations, rectified; AuxK for dead latents.

f = ReLU(TopK_k(W_enc (x − b) + b_enc)),   x̂ = W_decᵀ f + b,   the rows of W_dec of unit length
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from saemill.common.sae.topk import topk
from saemill.train.arch import initial
from saemill.train.backends.base import Auxiliary, Dead, Largest, Losses, Parameters
from saemill.train.backends.team import Team


@dataclass(frozen=True, slots=True)
class TopK:
    """One SAE's settings and its definition."""

    k: int
    """Active latents per token."""
    auxk_alpha: float
    """Weight of AuxK; 0 turns it off."""
    k_aux: int
    """Dead latents that reconstruct the residual of each token."""

    @property
    def rule(self) -> Largest:
        """Return the rule by which pre-activations become codes."""
        return Largest(self.k)

    @property
    def auxiliary(self) -> Auxiliary | None:
        """Return what dead latents learn; None where AuxK is off."""
        return Auxiliary(self.k_aux, self.auxk_alpha) if self.auxk_alpha else None

    def initialise(self, p: Parameters, n_latents: int, seed: int, sample_TD: Tensor, team: Team) -> None:
        """Start from random unit rows, the encoder as their transpose times the gain that fits best.

        Args:
            p: filled, but for `b_D`, which is there already; where the team splits the latents, its share.
            n_latents: F of the whole SAE.
            seed: of the rows.
            sample_TD: training activations in training units.
            team: the processes that share the SAE.
        """
        rows_FD = initial.unit_rows(n_latents, len(p.b_D), seed)[team.latents.slice_of(n_latents)]
        p.w_dec_FD.copy_(rows_FD)
        p.w_enc_FD.copy_(p.w_dec_FD)
        p.w_enc_FD.mul_(initial.best_gain(sample_TD, p, self.k, team))

    def loss(self, p: Parameters, x_TD: Tensor, dead: Dead, dtype: torch.dtype) -> Losses:
        """Compute the loss densely: the definition.

        Args:
            p: leaves of autograd, float32 or float64.
            x_TD: tokens, of the same dtype.
            dead: the latents that are dead.
            dtype: the encoder's product is rounded to it.
        """
        bias_F = p.b_enc_F - p.w_enc_FD @ p.b_D
        pre_TF = torch.addmm(bias_F.to(dtype), x_TD.to(dtype), p.w_enc_FD.to(dtype).T).to(x_TD.dtype)
        codes_TF = _keep_largest(pre_TF, self.k)
        e_TD = codes_TF @ p.w_dec_FD + p.b_D - x_TD
        aux = x_TD.new_zeros(())
        if (auxiliary := self.auxiliary) is not None and dead.n_in_team > 0:
            codes_TS = _keep_largest(pre_TF[:, dead.latents_S], min(auxiliary.k, dead.n_in_team))
            difference_TD = codes_TS @ p.w_dec_FD[dead.latents_S] + e_TD.detach()
            aux = auxiliary.alpha * auxiliary.share(dead) * difference_TD.square().sum()
        return Losses(e_TD.square().sum(), aux, codes_TF)


def _keep_largest(pre_TF: Tensor, k: int) -> Tensor:
    """Rectify the k largest entries of each row, in their places among zeros."""
    values, places = topk(pre_TF, k)
    return torch.zeros_like(pre_TF).scatter(1, places, values)

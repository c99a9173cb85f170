"""GroupMax (sparsify's activation of the name): of each of k groups of latents the largest, rectified.

f_i = ReLU(z_i) if z_i is the largest of its group, else 0,   z = W_enc (x − b) + b_enc

The groups are F/k consecutive latents each. So a token has one active latent of each group, or none where all
of the group are below 0; finding them is a pass over the pre-activations, without a search for the k largest.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from saemill.common.sae.groupmax import groupmax
from saemill.train.arch import dense, initial
from saemill.train.backends.architecture import Auxiliary, Inference, Losses, Sample, Seen, Slopes
from saemill.train.backends.codes import Codes, Largest, LargestOfGroups
from saemill.train.backends.parameters import Parameters
from saemill.train.backends.plain import pre_activations
from saemill.train.backends.team import Team


@dataclass(frozen=True, slots=True)
class GroupMax:
    """One SAE's settings and its definition."""

    k: int
    """Groups, and most active latents per token."""
    auxiliary: Auxiliary | None = None
    """AuxK; None where dead latents learn nothing."""

    further = ()
    never_below_0 = ()
    has_gate = False
    unit_rows = True
    groups = None

    def at(self, step: int) -> Self:
        """Return itself: nothing of it changes."""
        return self

    def rule(self, p: Parameters) -> LargestOfGroups:
        """Return the rule by which pre-activations become codes."""
        return LargestOfGroups(self.k)

    def initialise(self, p: Parameters, n_latents: int, seed: int, sample: Sample, team: Team) -> None:
        """Start as TopK does."""
        initial.tied(p, n_latents, seed, sample, Largest(self.k), team)

    def restore(self, p: Parameters, form: Inference) -> None:
        """Start as a finished SAE."""
        initial.restored(p, form)

    def loss(self, p: Parameters, x_TD: Tensor, y_TE: Tensor, seen: Seen, dtype: torch.dtype) -> Losses:
        """Compute the loss densely: the definition."""
        pre_TF = pre_activations(p, x_TD, dtype)
        values_TK, places_TK = groupmax(pre_TF, self.k)
        codes_TF = torch.zeros_like(pre_TF).scatter(1, places_TK, values_TK)
        return dense.grouped(None, self.auxiliary, p, pre_TF, codes_TF, y_TE, seen)

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
        """Compute the gradient at the pre-activations: that of the codes where they are not 0."""
        return Slopes((dot_TK * (2 * per_square)).where(codes.active_TK, 0))

    def inference(self, p: Parameters, cutoff: float) -> Inference:
        """Return the form in which the SAE is used: itself."""
        return Inference(self.k, None, p.w_enc_FD, p.b_enc_F, p.w_dec_FD)

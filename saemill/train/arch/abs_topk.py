"""AbsTopK (Zhu et al. 2025): of each token the k pre-activations largest by absolute value, with their signs.

f_i = z_i if |z_i| is among the k largest of its token, else 0,   z = W_enc (x − b) + b_enc

One latent serves both ends of its direction: x̂ may have W_dec[i] added or taken away. AuxK is by absolute
value as well.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from saemill.train.arch import dense, initial
from saemill.train.backends.architecture import Auxiliary, Inference, Losses, Sample, Seen, Slopes
from saemill.train.backends.codes import Codes, Largest
from saemill.train.backends.parameters import Parameters
from saemill.train.backends.plain import pre_activations
from saemill.train.backends.team import Team


@dataclass(frozen=True, slots=True)
class AbsTopK:
    """One SAE's settings and its definition."""

    k: int
    """Active latents per token."""
    auxiliary: Auxiliary | None = None
    """AuxK, of either sign; None where dead latents learn nothing."""

    further = ()
    never_below_0 = ()
    has_gate = False
    unit_rows = True
    groups = None

    def at(self, step: int) -> Self:
        """Return itself: nothing of it changes."""
        return self

    def rule(self, p: Parameters) -> Largest:
        """Return the rule by which pre-activations become codes."""
        return Largest(self.k, is_signed=True)

    def initialise(self, p: Parameters, n_latents: int, seed: int, sample: Sample, team: Team) -> None:
        """Start as TopK does, with the gain that fits codes of either sign."""
        initial.tied(p, n_latents, seed, sample, self.rule(p), team)

    def restore(self, p: Parameters, form: Inference) -> None:
        """Start as a finished SAE."""
        initial.restored(p, form)

    def loss(self, p: Parameters, x_TD: Tensor, y_TE: Tensor, seen: Seen, dtype: torch.dtype) -> Losses:
        """Compute the loss densely: the definition."""
        pre_TF = pre_activations(p, x_TD, dtype)
        codes_TF = dense.keep_largest_by_size(pre_TF, self.k)
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

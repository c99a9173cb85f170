"""BatchTopK (Bussmann et al. 2024) and Matryoshka (Bussmann et al. 2025).

BatchTopK keeps of a batch of T tokens the k · T largest pre-activations above 0; of equal ones all or none:

    f = z · 1[z ≥ c],   c the (k · T)-th largest z of the batch,   z = W_enc (x − b) + b_enc

For use c is one threshold, the moving average of those of training. Matryoshka fits every prefix of the
latents alone, with the mean of the squared errors; its codes are chosen once, over all latents.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from saemill.train.arch import dense, initial
from saemill.train.backends.architecture import Auxiliary, Inference, Losses, Sample, Seen, Slopes
from saemill.train.backends.codes import BatchLargest, Codes, Groups, Largest, Rule
from saemill.train.backends.parameters import Parameters
from saemill.train.backends.plain import pre_activations
from saemill.train.backends.team import Team


@dataclass(frozen=True, slots=True)
class BatchTopK:
    """One SAE's settings and its definition."""

    k: float
    """Active latents per token, on the average of a batch."""
    auxiliary: Auxiliary | None = None
    """AuxK; None where dead latents learn nothing."""
    prefixes: tuple[int, ...] = ()
    """Matryoshka's numbers of latents, ascending, all of them last; empty without."""
    of_each_token: bool = False
    """Whether each token keeps its k largest, as in TopK."""
    k_start: float = 0
    """k at step 0, beyond k where it is annealed."""
    anneal_steps: int = 0
    """Steps until it is k."""

    further = ()
    never_below_0 = ()
    has_gate = False
    unit_rows = True

    @property
    def groups(self) -> Groups | None:
        """Return the prefixes that are to fit."""
        n = len(self.prefixes)
        return Groups(self.prefixes, (1 / n,) * n, by_rank=False, shown=n - 1) if n else None

    def at(self, step: int) -> Self:
        """Return it with the k of a step."""
        k = initial.annealed(self.k_start, self.k, step, self.anneal_steps)
        return self if k == self.k else replace(self, k=k)

    def rule(self, p: Parameters) -> Rule:
        """Return the rule by which pre-activations become codes."""
        return Largest(round(self.k)) if self.of_each_token else BatchLargest(self.k)

    def initialise(self, p: Parameters, n_latents: int, seed: int, sample: Sample, team: Team) -> None:
        """Start as TopK does."""
        initial.tied(p, n_latents, seed, sample, Largest(max(1, round(self.k))), team)

    def loss(self, p: Parameters, x_TD: Tensor, y_TE: Tensor, seen: Seen, dtype: torch.dtype) -> Losses:
        """Compute the loss densely: the definition; `seen` has the batch's cutoff."""
        pre_TF = pre_activations(p, x_TD, dtype)
        if seen.cutoff is None:
            codes_TF = dense.keep_largest(pre_TF, round(self.k))
        else:
            codes_TF = dense.keep_from(pre_TF, seen.cutoff)
        return dense.grouped(self.groups, self.auxiliary, p, pre_TF, codes_TF, y_TE, seen)

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
        """Return the form in which the SAE is used: with one threshold, or as TopK."""
        if self.of_each_token:
            return Inference(round(self.k), None, p.w_enc_FD, p.b_enc_F, p.w_dec_FD)
        threshold_F = torch.full_like(p.b_enc_F, cutoff)
        return Inference(None, threshold_F, p.w_enc_FD, p.b_enc_F, p.w_dec_FD)

    def restore(self, p: Parameters, form: Inference) -> None:
        """Start as a finished SAE. Its threshold is where the cutoff's average starts."""
        initial.restored(p, form)

"""TopK (Gao et al. 2024): of each token the k largest pre-activations, rectified; AuxK for dead latents.

f = ReLU(TopK_k(W_enc (x − b) + b_enc)),   x̂ = W_decᵀ f + b,   the rows of W_dec of unit length

Two further losses are of the same codes. Multi-TopK fits the 4k largest as well, with weight 1/8 (sparsify).
HierarchicalTopK fits the largest of several k alike, so that one SAE serves for all of them.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from saemill.train.arch import dense, initial
from saemill.train.backends.architecture import Auxiliary, Inference, Losses, Sample, Seen, Slopes
from saemill.train.backends.codes import Codes, Groups, Largest
from saemill.train.backends.parameters import Parameters
from saemill.train.backends.plain import pre_activations
from saemill.train.backends.team import Team

MULTI = 4
"""Times k that multi-TopK fits as well."""
MULTI_WEIGHT = 1 / 8


@dataclass(frozen=True, slots=True)
class TopK:
    """One SAE's settings and its definition."""

    k: int
    """Active latents per token."""
    auxiliary: Auxiliary | None = None
    """AuxK; None where dead latents learn nothing."""
    nested_k: tuple[int, ...] = ()
    """Smaller numbers of codes that fit as well, ascending."""
    multi: bool = False
    """Whether the 4 k largest fit as well."""
    k_start: int = 0
    """k at step 0, beyond k where it is annealed."""
    anneal_steps: int = 0
    """Steps until it is k."""

    further = ()
    never_below_0 = ()
    has_gate = False
    unit_rows = True

    @property
    def groups(self) -> Groups | None:
        """Return the numbers of codes that are to fit."""
        if self.multi:
            return Groups((self.k, MULTI * self.k), (1.0, MULTI_WEIGHT), by_rank=True, shown=0)
        if not self.nested_k:
            return None
        ends = (*(k for k in self.nested_k if k < self.k), self.k)
        return Groups(ends, (1 / len(ends),) * len(ends), by_rank=True, shown=len(ends) - 1)

    def at(self, step: int) -> Self:
        """Return it with the k of a step."""
        k = initial.annealed(self.k_start, self.k, step, self.anneal_steps)
        return self if k == self.k else replace(self, k=round(k))

    def rule(self, p: Parameters) -> Largest:
        """Return the rule by which pre-activations become codes."""
        return Largest(self.groups.ends[-1] if self.groups else self.k)

    def initialise(self, p: Parameters, n_latents: int, seed: int, sample: Sample, team: Team) -> None:
        """Start from random unit rows, the encoder as their transpose times the gain that fits best.

        Args:
            p: filled, but for `b_D`, which is there already; where the team splits the latents, its share.
            n_latents: F of the whole SAE.
            seed: of the rows.
            sample: training activations in training units.
            team: the processes that share the SAE.
        """
        initial.tied(p, n_latents, seed, sample, Largest(self.k), team)

    def loss(self, p: Parameters, x_TD: Tensor, y_TE: Tensor, seen: Seen, dtype: torch.dtype) -> Losses:
        """Compute the loss densely: the definition.

        Args:
            p: leaves of autograd, float32 or float64.
            x_TD: tokens, of the same dtype.
            y_TE: what their latents are to predict; x itself of an SAE.
            seen: the latents that are dead.
            dtype: the encoder's product is rounded to it.
        """
        pre_TF = pre_activations(p, x_TD, dtype)
        codes_TF = dense.keep_largest(pre_TF, self.rule(p).k, p.n_layers)
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
        """Return the form in which the SAE is used: itself."""
        ks = self.groups.ends if self.groups and not self.multi else ()
        return Inference(self.k, None, p.w_enc_FD, p.b_enc_F, p.w_dec_FD, ks)

    def restore(self, p: Parameters, form: Inference) -> None:
        """Start as a finished SAE."""
        initial.restored(p, form)

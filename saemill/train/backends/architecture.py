"""What a backend asks of an architecture, and what the two hand each other."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from saemill.train.backends.codes import Codes, Groups, Rule
from saemill.train.backends.parameters import NONE, Parameters
from saemill.train.backends.team import Team


class Sample(NamedTuple):
    """Some tokens by which parameters start, in training units, float32."""

    x_TD: Tensor
    y_TE: Tensor
    """What is to be predicted; x itself of an SAE."""


class Dead(NamedTuple):
    """One SAE's latents that have not fired for long."""

    latents_S: Tensor
    """int64, their numbers, ascending; where a team splits the latents, this process's, perhaps none."""
    n_in_team: int
    """How many the whole team has."""


class Auxiliary(NamedTuple):
    """AuxK (Gao et al. 2024, A.2): the `k` most active dead latents of each token fit the residual."""

    k: int
    alpha: float
    """Weight of its squared error beside the reconstruction's."""
    is_signed: bool = False
    """Whether these are the largest by absolute value, with their signs, and not rectified."""

    def share(self, dead: Dead) -> float:
        """Compute how much of the weight counts: less where fewer latents are dead than could be active."""
        return min(1.0, dead.n_in_team / self.k)


class Pull(NamedTuple):
    """The pre-activation loss (Anthropic, January 2025): dead latents are drawn up to their thresholds θ."""

    weight: float
    """Of √D · Σ ReLU(θ − z) beside the squared error: θ and z are in units in which E‖x‖² = D."""


class Seen(NamedTuple):
    """What a loss must know of the whole batch, of which it sees some tokens."""

    dead: Dead
    n_tokens: int
    """Tokens of the batch."""
    n_active: Tensor | None = None
    """Of `Above`: codes that are active, of all latents."""
    cutoff: Tensor | None = None
    """Of `BatchLargest`: the smallest pre-activation that is kept, float32 []."""
    count_F: Tensor | None = None
    """Of `Above`: on how many tokens each latent is active, float32."""


class Losses(NamedTuple):
    """What an architecture's `loss` computes of some tokens. Gradients flow through `error`, `aux` and
    `penalty`."""

    error: Tensor
    """The squared error that is minimised: Σ e², of prefixes their weighted sum."""
    aux: Tensor
    """What dead latents are to fit beside it, or a gate: AuxK."""
    codes_TF: Tensor
    """The codes, 0 where a latent is not active."""
    sse: Tensor | None = None
    """Σ e² that is reported; None where it is `error`."""
    sse_G: Tensor | None = None
    """Σ e² of each group; None where there is one."""
    penalty: Tensor | None = None
    """What is added to keep codes few or small; None without."""

    @property
    def added(self) -> Tensor:
        """All that is added to the error."""
        return self.aux if self.penalty is None else self.aux + self.penalty


class Slopes(NamedTuple):
    """The gradient of the loss at the codes, seen from the parameters; scaled as the loss is."""

    dpre_TK: Tensor
    """At the pre-activations, of slots."""
    further_F: Mapping[str, Tensor] = NONE
    """Of the further parameters."""
    db_enc_F: Tensor | None = None
    """Of b_enc; None where it is the sum of dpre."""
    toward_FL: Tensor | None = None
    """What a penalty adds to the gradient of a free decoder row's part at each of its sites, times the part;
    None without."""
    penalty: Tensor | None = None
    """What penalties add to the loss, of this process's latents; None without."""


class Inference(NamedTuple):
    """The form in which an SAE is used after training, in training units."""

    k: int | None
    """Largest pre-activations that are kept; None where thresholds say which."""
    threshold_F: Tensor | None
    """Pre-activations above these are kept; None with k."""
    w_enc_FD: Tensor
    b_enc_F: Tensor
    w_dec_FD: Tensor
    ks: tuple[int, ...] = ()
    """Numbers of codes, ascending, k last, that it serves for; empty where k is the only one."""


class Architecture(Protocol):
    """What a backend knows of an SAE's architecture: its definition, and the rules that have fast passes."""

    @property
    def further(self) -> tuple[str, ...]:
        """Return the names of its further parameters."""

    @property
    def never_below_0(self) -> tuple[str, ...]:
        """Return the names of those of them that each step puts back to 0 where it took them below."""

    @property
    def has_gate(self) -> bool:
        """Tell whether the squared error of its pre-activations as codes, with the decoder held fixed, is a
        further loss."""

    @property
    def unit_rows(self) -> bool:
        """Tell whether decoder rows are kept at unit length."""

    @property
    def auxiliary(self) -> Auxiliary | Pull | None:
        """Return what dead latents learn; None where they learn nothing."""

    @property
    def groups(self) -> Groups | None:
        """Return the groups of codes that are to fit alone; None where there is one."""

    def at(self, step: int) -> Self:
        """Return it with the values of a step: what is annealed or warms up."""

    def rule(self, p: Parameters) -> Rule:
        """Return the rule by which pre-activations become codes."""

    def initialise(self, p: Parameters, n_latents: int, seed: int, sample: Sample, team: Team) -> None:
        """Fill in where the parameters start; `b_D` and `w_skip_ED` are there already."""

    def loss(self, p: Parameters, x_TD: Tensor, y_TE: Tensor, seen: Seen, dtype: torch.dtype) -> Losses:
        """Compute the loss densely: the definition, which `plain` differentiates and tests compare with.

        y is what the latents are to predict: x itself of an SAE; with W_skip what that leaves.
        """

    def codes(self, p: Parameters, found: Codes) -> Codes:
        """Turn pre-activations that the rule found into codes; `Above` finds those within its bandwidth."""

    def slopes(
        self,
        p: Parameters,
        codes: Codes,
        seen: Seen,
        dot_TK: Tensor,
        held_dot_TK: Tensor | None,
        per_square: float,
    ) -> Slopes:
        """Compute the gradient at the pre-activations and at further parameters: what fast passes need of
        `loss`.

        Args:
            p: parameters.
            codes: of the whole batch.
            seen: of the whole batch.
            dot_TK: ⟨e_t, W_dec[f]⟩ of each slot.
            held_dot_TK: the same of the gate's pre-activations as codes; None without a gate.
            per_square: what one squared unit of e adds to the loss.
        """

    def inference(self, p: Parameters, cutoff: float) -> Inference:
        """Return the form in which the SAE is used; `cutoff` is the moving average of `BatchLargest`'s."""

    def restore(self, p: Parameters, form: Inference) -> None:
        """Fill in parameters of which `inference` makes this form, with rows of unit length."""

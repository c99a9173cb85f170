"""The inputs and results of a step, and the protocol of a backend.

A backend has one `step`: one SAE, one batch, one optimizer step in place. Notation: x_TD inputs (centred and
scaled), b_D = b_dec − centre, pre = (x − b) W_encᵀ + b_enc, codes val_TK of latents idx_TK,
x̂ = val · W_dec[idx] + b, e = x̂ − x.

A transcoder predicts y_TE, activations of another site in units of their own: pre = x W_encᵀ + b_enc,
ŷ = val · W_dec[idx] + b + W_skip x, e = ŷ − y. Where D and E differ, what is called D of a decoder is E.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from saemill.train.backends.adding import sum_by_place
from saemill.train.backends.parameters import NONE, Parameters, Shape
from saemill.train.backends.team import Team
from saemill.train.optim.optimizer import Optimizer

if TYPE_CHECKING:
    from saemill.train.backends.cpu.loops.quantise import Quantised


class Weights(NamedTuple):
    """Parameters, with the copies that a backend's products read."""

    parameters: Parameters
    product_FD: Tensor
    """w_enc in the product's dtype; w_enc itself where that is float32."""
    gathered_FD: Tensor
    """w_dec as it is decoded with: w_dec itself on a CPU, in the product's dtype on a GPU."""
    quantised_FD: "Quantised | None" = None
    """product_FD in 8 bits, where those choose the candidates."""

    def refresh(self, rows: slice = slice(None)) -> None:
        """Make some latents' copies anew."""
        w_enc_FD, w_dec_FD = self.parameters.w_enc_FD, self.parameters.w_dec_FD
        for copy_FD, master_FD in ((self.product_FD, w_enc_FD), (self.gathered_FD, w_dec_FD)):
            if copy_FD.dtype != master_FD.dtype:
                copy_FD[rows].copy_(master_FD[rows])
        if self.quantised_FD is not None:
            self.quantised_FD.rows(rows).fill(self.product_FD[rows])


class Batch(NamedTuple):
    """Activations in training units."""

    x_TD: Tensor
    """float32."""
    product_TD: Tensor
    """The same in the product's dtype."""
    quantised_TD: "Quantised | None" = None
    """The same in 8 bits, where those choose the candidates."""
    y_TE: Tensor | None = None
    """What a transcoder predicts, float32; None of an SAE, which reconstructs x."""

    @property
    def target_TE(self) -> Tensor:
        """Return what is to be reconstructed or predicted."""
        return self.x_TD if self.y_TE is None else self.y_TE

    def tokens(self, some: slice) -> "Batch":
        """Select some of the tokens."""
        quantised = None if self.quantised_TD is None else self.quantised_TD.rows(some)
        y_TE = None if self.y_TE is None else self.y_TE[some]
        return Batch(self.x_TD[some], self.product_TD[some], quantised, y_TE)

    def less_skip(self, p: Parameters) -> "Batch":
        """Take what W_skip predicts off the target: what is left is for the latents to predict."""
        if p.w_skip_ED is None:
            return self
        return self._replace(y_TE=torch.addmm(self.target_TE, self.x_TD, p.w_skip_ED.T, alpha=-1))


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


class Largest(NamedTuple):
    """The rule of TopK: the k largest pre-activations of each token, rectified."""

    k: int


class BatchLargest(NamedTuple):
    """The rule of BatchTopK: the k · T largest pre-activations of a batch, rectified."""

    k: float
    """Mean number per token."""


class Above(NamedTuple):
    """The rule of thresholds: pre-activations above those of their latents."""

    threshold_F: Tensor
    bandwidth: float = 0.0
    """Width around a threshold in which pre-activations count for its gradient."""


Rule = Largest | BatchLargest | Above
"""How pre-activations become codes."""


class Groups(NamedTuple):
    """Codes in nested groups: each reconstructs alone, and the squared errors are summed with weights."""

    ends: tuple[int, ...]
    """Ascending: group g holds what lies below ends[g]."""
    weights: tuple[float, ...]
    by_rank: bool
    """Whether ends count a token's codes by size, and not latents by number."""
    shown: int
    """The group whose error is reported as the SAE's."""


class Auxiliary(NamedTuple):
    """AuxK (Gao et al. 2024, A.2): the `k` most active dead latents of each token fit the residual."""

    k: int
    alpha: float
    """Weight of its squared error beside the reconstruction's."""

    def share(self, dead: Dead) -> float:
        """Compute how much of the weight counts: less where fewer latents are dead than could be active."""
        return min(1.0, dead.n_in_team / self.k)


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


class Pull(NamedTuple):
    """The pre-activation loss (Anthropic, January 2025): dead latents are drawn up to their thresholds θ."""

    weight: float
    """Of √D · Σ ReLU(θ − z) beside the squared error: θ and z are in units in which E‖x‖² = D."""


class Losses(NamedTuple):
    """What an architecture's `loss` computes of some tokens. Gradients flow through the first two."""

    error: Tensor
    """The squared error that is minimised: Σ e², of prefixes their weighted sum."""
    aux: Tensor
    """What is added to it: AuxK, penalties."""
    codes_TF: Tensor
    """The codes, 0 where a latent is not active."""
    sse: Tensor | None = None
    """Σ e² that is reported; None where it is `error`."""
    sse_G: Tensor | None = None
    """Σ e² of each group; None where there is one."""


class Codes(NamedTuple):
    """The active latents of some tokens, in slots."""

    val_TK: Tensor
    """float32, 0 or more; 0 is an unused slot, or a latent that is not active."""
    idx_TK: Tensor
    """int64, or int32 on a GPU: latents' numbers."""
    pre_TK: Tensor | None = None
    """float32, the pre-activations of the slots; None where they are the codes."""
    n_T: Tensor | None = None
    """int64, slots in use; None where all are."""

    @property
    def used_TK(self) -> Tensor:
        """Tell which slots are in use."""
        places_K = torch.arange(self.val_TK.shape[1], device=self.val_TK.device)
        every = torch.ones_like(self.val_TK, dtype=torch.bool)
        return every if self.n_T is None else places_K < self.n_T[:, None]

    def where(self, kept_TK: Tensor) -> "Codes":
        """Keep some slots; the others are 0 at latent 0."""
        return self._replace(val_TK=self.val_TK.where(kept_TK, 0), idx_TK=self.idx_TK.where(kept_TK, 0))

    def reaching(self, cutoff: Tensor) -> "Codes":
        """Keep the codes that reach a cutoff, at the front, in their order."""
        kept_TK = (self.val_TK >= cutoff) & (self.val_TK > 0)
        n_T = kept_TK.sum(1)
        n_slots = slots(int(n_T.max()))
        order_TK = (~kept_TK).to(torch.int8).argsort(dim=1, stable=True)[:, :n_slots]
        gathered = Codes(self.val_TK.gather(1, order_TK), self.idx_TK.gather(1, order_TK), n_T=n_T)
        return gathered.where(gathered.used_TK)

    def by_group(self, groups: "Groups") -> "Codes":
        """Put the codes in the order of their groups: by size, or by latent."""
        key_TK = -self.val_TK if groups.by_rank else self.idx_TK.where(self.val_TK > 0, LAST)
        order_TK = key_TK.argsort(dim=1, stable=True)
        return self._replace(val_TK=self.val_TK.gather(1, order_TK), idx_TK=self.idx_TK.gather(1, order_TK))

    def group_TK(self, groups: "Groups") -> Tensor:
        """Find the group of each slot, the smallest that holds it. int64."""
        ends_G = torch.tensor(groups.ends, device=self.val_TK.device)
        if not groups.by_rank:
            return torch.bucketize(self.idx_TK.long(), ends_G, right=True)
        places_K = torch.arange(self.val_TK.shape[1], device=self.val_TK.device)
        return torch.bucketize(places_K, ends_G, right=True).expand_as(self.val_TK)

    def by_latent(self, numbers_TK: Tensor, n_latents: int) -> Tensor:
        """Sum numbers of slots, 0 where unused, over the tokens of each latent. float32 [F]."""
        return sum_by_place(numbers_TK.flatten(), self.idx_TK.flatten().long(), n_latents)


LAST = 2**31 - 1
"""Behind all latents."""


def slots(n: int) -> int:
    """Round a number of slots up: loops take four at a time, and must not sum in another order for more."""
    return max(4, -(-n // 4) * 4)


class Slopes(NamedTuple):
    """The gradient of the loss at the codes, seen from the parameters; scaled as the loss is."""

    dpre_TK: Tensor
    """At the pre-activations, of slots."""
    further_F: Mapping[str, Tensor] = NONE
    """Of the further parameters."""
    db_enc_F: Tensor | None = None
    """Of b_enc; None where it is the sum of dpre."""
    toward_F: Tensor | None = None
    """What a penalty adds to the gradient of a free decoder row, times the row; None without."""
    aux_loss: Tensor | None = None
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


class Rates(NamedTuple):
    """The numbers of one step of one SAE."""

    per_square: float
    """What one squared unit of e adds to the loss."""
    lr: float
    weight_decay: float
    """Decoupled, of w_enc alone."""
    clip_norm: float | None = None
    """Largest norm of the gradient of all parameters; None without bound."""

    @property
    def grad_scale(self) -> float:
        """Return gs = ∂L/∂(½ e²): the factor of e in the gradient at x̂."""
        return 2 * self.per_square


class Task(NamedTuple):
    """One optimizer step of one SAE."""

    batch: Batch
    """From the backend's `prepare`; the loss is the mean over its tokens."""
    weights: Weights
    """Those of the SAE, changed in place, copies included."""
    architecture: Architecture
    """Definition and rules of the SAE."""
    optimizer: Optimizer
    """That of its parameters; its step has begun."""
    dead: Dead
    """Its latents that have not fired for long."""
    healthy: Tensor
    """bool []; where it is false, or the squared error is not finite, nothing is changed."""
    rates: Rates
    """Numbers of this step."""


class Sums(NamedTuple):
    """What a step did, over all tokens of the team."""

    sse: Tensor
    """Σ e², float32; not finite where the SAE has diverged."""
    aux_loss: Tensor
    """What AuxK and penalties add to the loss, float32."""
    n_active: Tensor
    """Number of codes that are not 0."""
    fired_F: Tensor
    """bool, which latents had one."""
    error: Tensor | None = None
    """The weighted sum of the groups' Σ e², float32; None where there is one group, of which it is `sse`."""
    sse_G: Tensor | None = None
    """Σ e² of each group, float32; None where there is one."""
    cutoff: Tensor | None = None
    """The smallest pre-activation that was kept, float32 []; None where the rule has none."""


class Backend(Protocol):
    """Computes steps. It has scratch memory, and a team: the processes that share the work."""

    name: str
    """Name, as `--kernels` takes it."""
    dtype: torch.dtype
    """Dtype of the encoder's product."""
    team: Team

    def weights(self, shape: Shape, device: torch.device) -> Weights:
        """Make the memory of one SAE, all zeros."""

    def prepare(self, x_TD: Tensor, y_TE: Tensor | None = None) -> Batch:
        """Make the copies of a batch, once for all SAEs of its site; `y_TE` as `Batch` has it."""

    def step(self, task: Task) -> Sums:
        """Take one optimizer step of one SAE, in place."""


def chunks(n_rows: int, row_bytes: int, chunk_bytes: int) -> Iterator[slice]:
    """Cut `n_rows` rows into slices of like size, each of no more than `chunk_bytes`, or of one row."""
    n_chunks = max(1, -(-n_rows // max(1, chunk_bytes // row_bytes)))
    step = max(1, -(-n_rows // n_chunks))
    return (slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step))

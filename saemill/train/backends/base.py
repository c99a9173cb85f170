"""The inputs and results of a step, and the protocol of a backend.

A backend has one `step`: one SAE, one batch, one optimizer step in place. Notation: x_TD inputs (centred and
scaled), b_D = b_dec − centre, pre = (x − b) W_encᵀ + b_enc, codes val_TK of latents idx_TK,
x̂ = val · W_dec[idx] + b, e = x̂ − x.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from saemill.train.backends.team import Team
from saemill.train.optim.optimizer import Optimizer

if TYPE_CHECKING:
    from saemill.train.backends.cpu.loops.quantise import Quantised


class Parameters(NamedTuple):
    """One SAE's parameters in training units, float32. Where a team splits the latents, this process's."""

    w_enc_FD: Tensor
    b_enc_F: Tensor
    w_dec_FD: Tensor
    """Rows of unit length."""
    b_D: Tensor
    """b_dec − centre."""

    @classmethod
    def zeros(cls, n_latents: int, d: int, device: torch.device) -> "Parameters":
        """Make their memory in torch's own allocator."""
        shapes = (n_latents, d), (n_latents,), (n_latents, d), (d,)
        return cls(*(torch.zeros(shape, device=device) for shape in shapes))


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
        w_enc_FD, _, w_dec_FD, _ = self.parameters
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

    def tokens(self, some: slice) -> "Batch":
        """Select some of the tokens."""
        quantised = None if self.quantised_TD is None else self.quantised_TD.rows(some)
        return Batch(self.x_TD[some], self.product_TD[some], quantised)


class Dead(NamedTuple):
    """One SAE's latents that have not fired for long."""

    latents_S: Tensor
    """int64, their numbers, ascending; where a team splits the latents, this process's, perhaps none."""
    n_in_team: int
    """How many the whole team has."""


class Largest(NamedTuple):
    """The rule of TopK: the k largest pre-activations of each token, rectified."""

    k: int


class Auxiliary(NamedTuple):
    """AuxK (Gao et al. 2024, A.2): the `k` most active dead latents of each token fit the residual."""

    k: int
    alpha: float
    """Weight of its squared error beside the reconstruction's."""

    def share(self, dead: Dead) -> float:
        """Compute how much of the weight counts: less where fewer latents are dead than could be active."""
        return min(1.0, dead.n_in_team / self.k)


class Losses(NamedTuple):
    """What an architecture's `loss` computes of some tokens. Gradients flow through the first two."""

    sse: Tensor
    """Σ e²."""
    aux: Tensor
    """AuxK's Σ (ê + e)², times alpha and share."""
    codes_TF: Tensor
    """The codes, 0 where a latent is not active."""


class Architecture(Protocol):
    """What a backend knows of an SAE's architecture: its definition, and the rules that have fast passes."""

    @property
    def rule(self) -> Largest:
        """Return the rule by which pre-activations become codes."""

    @property
    def auxiliary(self) -> Auxiliary | None:
        """Return what dead latents learn; None where they learn nothing."""

    def initialise(self, p: Parameters, n_latents: int, seed: int, sample_TD: Tensor, team: Team) -> None:
        """Fill in where the parameters start; `b_D` is there already."""

    def loss(self, p: Parameters, x_TD: Tensor, dead: Dead, dtype: torch.dtype) -> Losses:
        """Compute the loss densely: the definition, which `plain` differentiates and tests compare with."""


class Rates(NamedTuple):
    """The numbers of one step of one SAE."""

    per_square: float
    """What one squared unit of e adds to the loss."""
    lr: float
    weight_decay: float
    """Decoupled, of w_enc alone."""

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
    """AuxK's term of the loss, float32."""
    n_active: Tensor
    """Number of codes that are not 0."""
    fired_F: Tensor
    """bool, which latents had one."""


class Backend(Protocol):
    """Computes steps. It has scratch memory, and a team: the processes that share the work."""

    name: str
    """Name, as `--kernels` takes it."""
    dtype: torch.dtype
    """Dtype of the encoder's product."""
    team: Team

    def weights(self, n_latents: int, d: int, device: torch.device) -> Weights:
        """Make the memory of one SAE, all zeros."""

    def prepare(self, x_TD: Tensor) -> Batch:
        """Make the copies of a batch, once for all SAEs of its site."""

    def step(self, task: Task) -> Sums:
        """Take one optimizer step of one SAE, in place."""


def chunks(n_rows: int, row_bytes: int, chunk_bytes: int) -> Iterator[slice]:
    """Cut `n_rows` rows into slices of like size, each of no more than `chunk_bytes`, or of one row."""
    n_chunks = max(1, -(-n_rows // max(1, chunk_bytes // row_bytes)))
    step = max(1, -(-n_rows // n_chunks))
    return (slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step))

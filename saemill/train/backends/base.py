"""The inputs and results of a step, and the protocol of a backend.

A backend has one `step`: one SAE, one batch, one optimizer step in place. Notation: x_TD inputs (centred and
scaled), b_D = b_dec − centre, pre = (x − b) W_encᵀ + b_enc, codes val_TK of latents idx_TK,
x̂ = val · W_dec[idx] + b, e = x̂ − x.

A transcoder predicts y_TE, activations of another site in units of their own: pre = x W_encᵀ + b_enc,
ŷ = val · W_dec[idx] + b + W_skip x, e = ŷ − y. Where D and E differ, what is called D of a decoder is E.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from saemill.common.sae import layers
from saemill.train.backends.architecture import Architecture, Dead
from saemill.train.backends.parameters import Parameters, Shape
from saemill.train.backends.team import Team
from saemill.train.objective.at_output import AtOutput, Objective
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

    @property
    def layers(self) -> "list[Weights]":
        """Return those of each layer, as `Parameters.layers`; decoders have no copies."""
        found, first = [], 0
        for p in self.parameters.layers:
            rows = slice(first, first := first + len(p.w_enc_FD))
            quantised = None if self.quantised_FD is None else self.quantised_FD.rows(rows)
            found.append(Weights(p, self.product_FD[rows], p.w_dec_FD, quantised))
        return found

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
        if p.n_layers > 1:
            return self._replace(y_TE=self.target_TE - layers.skipped(self.x_TD, p.w_skip_ED, p.n_layers))
        return self._replace(y_TE=torch.addmm(self.target_TE, self.x_TD, p.w_skip_ED.T, alpha=-1))


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
    is_decoder_frozen: bool = False
    """Whether w_dec stays as it is."""
    objective: Objective | None = None
    """What the loss is beside or in place of the squared error; None where that is all. It sees whole
    batches: a team does not share out their tokens."""


class Sums(NamedTuple):
    """What a step did, over all tokens of the team."""

    sse: Tensor
    """Σ e², float32; not finite where the SAE has diverged."""
    aux_loss: Tensor
    """What AuxK, or a gate, adds to the loss, float32."""
    n_active: Tensor
    """Number of codes that are not 0."""
    fired_F: Tensor
    """bool, which latents had one."""
    error: Tensor | None = None
    """The weighted sum of the groups' Σ e², float32; None where there is one group, of which it is `sse`."""
    sse_G: Tensor | None = None
    """Σ e² of each group, float32; None where there is one."""
    penalty: Tensor | None = None
    """What penalties add to the loss, float32; None without."""
    cutoff: Tensor | None = None
    """The smallest pre-activation that was kept, float32 []; None where the rule has none."""
    at_output: AtOutput | None = None
    """What the objective found; None without one."""


class Backend(Protocol):
    """Computes steps. It has scratch memory, and a team: the processes that share the work."""

    name: str
    """Name, as `--kernels` takes it."""
    dtype: torch.dtype
    """Dtype of the encoder's product."""
    team: Team

    def describe(self) -> str:
        """Describe how it multiplies, once it has made weights: "products in float32 by numba"."""

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


def described(dtype: torch.dtype, name: str) -> str:
    """Describe products by their dtype and the name of the backend, as `Backend.describe` begins."""
    return f"products in {str(dtype).removeprefix('torch.')} by {name}"

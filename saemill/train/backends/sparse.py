"""A step that touches active pairs (token, latent) alone, as loops for CPUs and kernels for GPUs compute it.

It has two passes. The first goes over tokens: the encoder's product in chunks, the k largest pre-activations,
then reconstruction, error e = x̂ − x, and ⟨e, decoder row⟩ of each active latent. The second goes over
latents, each from its gradient to its new weights:

    dval_tk   = gs ⟨e_t, W_dec[f]⟩ where val > 0,   gs = ∂L/∂(½ e²)
    dW_dec[f] = gs Σ val e_t, less its component along the unit row W_dec[f], which renorming would undo
    dW_enc[f] = Σ dval_tk (x_t − b),   db_enc[f] = Σ dval_tk,   db = gs Σ_t e_t − db_enc · W_enc

Nothing of size tokens × latents and no gradient of size latents × D is ever in memory.
"""

import warnings
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from saemill.common.sae.topk import topk
from saemill.train.backends.auxk import DeadRows, auxk
from saemill.train.backends.base import Batch, Largest, Sums, Task, Weights
from saemill.train.backends.plain import Plain
from saemill.train.backends.team import ALONE, Team
from saemill.train.profile import region

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)


class Codes(NamedTuple):
    """The active latents of some tokens."""

    val_TK: Tensor
    """float32, 0 or more."""
    idx_TK: Tensor
    """int64, or int32 on a GPU: latents' numbers."""


class Forward(NamedTuple):
    """A batch seen by one SAE: all that its gradients need."""

    codes: Codes
    """0 where another process of the team has the latent."""
    e_TD: Tensor
    """x̂ − x, in the product's dtype."""
    dot_TK: Tensor
    """⟨e_t, W_dec[idx_tk]⟩, float32."""
    sse: Tensor
    """Σ e², float32."""
    n_active: Tensor
    """Codes above 0, those on other processes included."""
    bias_F: Tensor
    """From `fold_bias`."""


class Sparse(ABC):
    """The order of a step's passes; `Cpu` and `Gpu` say how each is computed."""

    def __init__(self, dtype: torch.dtype, team: Team = ALONE) -> None:
        self.dtype, self.team = dtype, team

    @abstractmethod
    def forward(self, batch: Batch, weights: Weights, k: int) -> Forward:
        """Encode some tokens and reconstruct them. T tokens, k active latents per token."""

    @abstractmethod
    def keep_largest(self, pre_TS: Tensor, k: int) -> Tensor:
        """Rectify the k largest entries of each row, in their places among zeros."""

    @abstractmethod
    def keep_active(self, dpre_TS: Tensor, acts_TS: Tensor) -> Tensor:
        """Set, in place, the gradients of inactive latents to 0; sum them over tokens, float32 [S]."""

    @abstractmethod
    def update(self, task: Task, forward: Forward, dead: DeadRows | None) -> Tensor:
        """Take the task's optimizer step, in place, with AuxK's gradients added.

        Returns: bool [F], which latents fired.
        """

    def step(self, task: Task) -> Sums:
        """Go forward over this process's own tokens, backward over the whole batch, as `Backend.step`."""
        batch, weights, architecture = task.batch, task.weights, task.architecture
        rule = architecture.rule(weights.parameters)
        if not isinstance(rule, Largest) or architecture.groups:
            return self._dense_step(task)
        n_tokens = len(batch.x_TD)
        own = batch.tokens(self.team.tokens.slice_of(n_tokens))
        forward = self.forward(own, weights, rule.k)
        dead_rows, aux_loss = None, torch.zeros((), device=batch.x_TD.device)
        if (aux := architecture.auxiliary) is not None and task.dead.n_in_team > 0:
            scale = aux.alpha * task.rates.per_square * aux.share(task.dead)
            with region("auxk"):
                dead_rows, aux_loss = auxk(self, own, forward, task.dead, weights, aux.k, scale)
        forward = gather(forward, n_tokens, self.team)
        task = task._replace(healthy=task.healthy & torch.isfinite(forward.sse))
        fired_F = self.update(task, forward, dead_rows)
        return Sums(forward.sse, aux_loss, forward.n_active, fired_F)

    def _dense_step(self, task: Task) -> Sums:
        """Take a step by autograd of the definition: where codes are so dense that passes over pairs would be
        slower."""
        sums = Plain(self.dtype, self.team).step(task)
        task.weights.refresh()
        return sums


def fold_bias(w_enc_FD: Tensor, b_enc_F: Tensor, b_D: Tensor) -> Tensor:
    """Compute b_enc − W_enc b: what the product with x misses. float32 [F].

    `w_enc_FD` holds the same rounded weights as the product uses; with others the error of each
    latent would be systematic.
    """
    return b_enc_F - torch.mv(w_enc_FD, b_D.to(w_enc_FD.dtype)).float()


def encode(x_TD: Tensor, w_enc_FD: Tensor, bias_F: Tensor, k: int, scratch_TF: Tensor) -> Codes:
    """Find the codes of some tokens, by a dense product and an exact top-k.

    Args:
        x_TD, w_enc_FD: of the same dtype, the product's.
        bias_F: from `fold_bias`.
        k: active latents per token.
        scratch_TF: where the pre-activations go, for no fewer tokens.
    """
    with region("encode"):
        pre_TF = torch.addmm(bias_F.to(x_TD.dtype), x_TD, w_enc_FD.T, out=scratch_TF[: len(x_TD)])
    with region("top-k"):
        values, indices = topk(pre_TF, k)
        return Codes(values.float(), indices)


def decode(codes: Codes, w_dec_FD: Tensor) -> Tensor:
    """Sum val · W_dec[idx] over K. float32 [T, D]."""
    return embedding_bag(codes.idx_TK, w_dec_FD, per_sample_weights=codes.val_TK, mode="sum")


def own_codes(codes: Codes, team: Team) -> tuple[Codes, Tensor]:
    """Keep, of this process's best latents, those that are among the team's; the others are 0 at latent 0.

    Returns: the codes, and how many are above 0 in the whole team.
    """
    if team.latents.size == 1:
        return codes, (codes.val_TK > 0).sum()
    with region("exchange"):
        chosen_TK, n_active = team.among_all(codes.val_TK)
    return Codes(codes.val_TK.where(chosen_TK, 0), codes.idx_TK.where(chosen_TK, 0)), n_active


def residual_of_team(codes: Codes, batch: Batch, weights: Weights, team: Team) -> tuple[Tensor, Tensor]:
    """Compute e and ⟨e_t, W_dec[idx_tk]⟩, float32, where latents are split: x̂ is one sum over the team."""
    w_dec_FD, b_D = weights.parameters.w_dec_FD, weights.parameters.b_D
    e_TD = team.latents.all_reduce(decode(codes, w_dec_FD)).add_(b_D).sub_(batch.x_TD)
    return e_TD, row_dots(e_TD, codes.idx_TK, w_dec_FD)


def row_dots(e_TD: Tensor, idx_TK: Tensor, w_dec_FD: Tensor) -> Tensor:
    """Compute ⟨e_t, W_dec[idx_tk]⟩, float32 [T, K]: of a product, these entries alone."""
    n_tokens, k = idx_TK.shape
    starts = torch.arange(0, n_tokens * k + 1, k, device=e_TD.device)
    wanted = torch.sparse_csr_tensor(
        starts,
        idx_TK.reshape(-1),
        e_TD.new_zeros(n_tokens * k),
        (n_tokens, len(w_dec_FD)),
        check_invariants=False,
    )
    dots: Tensor = torch.sparse.sampled_addmm(wanted, e_TD, w_dec_FD.T, beta=0.0)
    return dots.values().view(n_tokens, k)


def gather(forward: Forward, n_tokens: int, team: Team) -> Forward:
    """Put together what every replica saw of its share of a batch of T tokens."""
    if team.tokens.size == 1:
        return forward
    (val_TK, idx_TK), e_TD, dot_TK, sse, n_active, bias_F = forward
    with region("exchange"):
        val_TK, idx_TK, e_TD, dot_TK = (
            team.tokens.all_gather(share_T, n_tokens) for share_T in (val_TK, idx_TK, e_TD, dot_TK)
        )
        sse, n_active = team.tokens.all_reduce(sse), team.tokens.all_reduce(n_active)
    return Forward(Codes(val_TK, idx_TK), e_TD, dot_TK, sse, n_active, bias_F)

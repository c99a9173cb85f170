"""A step that touches active pairs (token, latent) alone, as loops for CPUs and kernels for GPUs compute it.

It has two passes. The first goes over tokens: the encoder's product in chunks, the pre-activations that the
rule keeps, then reconstruction, error e = x̂ − x, and ⟨e, decoder row⟩ of each pair. The second goes over
latents, each from its gradient to its new weights:

    dval_tk   = gs ⟨e_t, W_dec[f]⟩,   gs = ∂L/∂(½ e²);   dpre_tk from it by the architecture's `slopes`
    dW_dec[f] = gs Σ val e_t, less its component along a unit row W_dec[f], which renorming would undo
    dW_enc[f] = Σ dpre_tk (x_t − b),   db_enc[f] = Σ dpre_tk,   db = gs Σ_t e_t − Σ_f (Σ dpre_tk) W_enc[f]

Where the encoder subtracts no b, the terms of b in the last line but one and in db are missing. W_skip, whose
part of the prediction is taken off the target before the first pass, has the dense gradient gs Σ_t e_t x_tᵀ.

The latents of a cross-layer transcoder are scored layer by layer, each layer's as a transcoder's from its
site. To them e_t and x_t are the parts that they write to and read.

Where codes are in groups that fit alone, e_t is for each pair the weighted sum of the errors of all groups
that hold it. Nothing of size tokens × latents and no gradient of size latents × D is ever in memory.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from saemill.common.sae import layers
from saemill.common.sae.abs_topk import abs_topk
from saemill.common.sae.topk import topk
from saemill.train.backends import by_layer
from saemill.train.backends.architecture import Auxiliary, Pull, Seen, Slopes
from saemill.train.backends.auxk import DeadRows, auxk, pull
from saemill.train.backends.base import Batch, Sums, Task, Weights, described
from saemill.train.backends.codes import Above, Codes, Groups, Largest, LargestOfGroups, Rule
from saemill.train.backends.cutoff import Best
from saemill.train.backends.from_output import row_dots, with_objective
from saemill.train.backends.parameters import SKIP
from saemill.train.backends.plain import Plain
from saemill.train.backends.team import ALONE, Team
from saemill.train.profile import region

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)

DENSE_SHARE = 1 / 12
"""Share of the latents, active on a token on average, from which a step is dense."""
SAMPLE_TOKENS = 64
"""Tokens of a batch on which its cutoff is guessed."""
SAMPLE_RANKS = 2
"""Times k that the guess lets through."""
LEAST_FLOOR = 1e-3
"""A guess that is no larger is lowered to 0."""


class Forward(NamedTuple):
    """A batch seen by one SAE: all that its gradients need."""

    codes: Codes
    """0 where another process of the team has the latent."""
    e_TD: Tensor
    """x̂ − x of all codes, or of the group that is shown, in the product's dtype."""
    dot_TK: Tensor
    """⟨e_t, W_dec[idx_tk]⟩, float32; with the row of `rows_GTD` where there are groups."""
    sse: Tensor
    """Σ e², float32."""
    n_active: Tensor
    """Active latents, those on other processes included."""
    bias_F: Tensor
    """From `fold_bias`."""
    cutoff: Tensor | None = None
    """The smallest pre-activation that is kept, float32 []; None where the rule has none."""
    rows_GTD: Tensor | None = None
    """The weighted errors of each group and of those that hold it, summed; None without groups."""
    sse_G: Tensor | None = None
    """Σ e² of each group, float32; None without groups."""
    groups: Groups | None = None
    """The groups, by numbers of this process's latents; None without."""
    held_dot_TK: Tensor | None = None
    """As dot_TK, of the reconstruction from a gate's pre-activations; None without."""
    held_sse: Tensor | None = None
    """Its Σ e², float32."""


class Sparse(ABC):
    """The order of a step's passes; `Cpu` and `Gpu` say how each is computed."""

    name: str

    def __init__(self, dtype: torch.dtype, team: Team = ALONE) -> None:
        self.dtype, self.team = dtype, team

    @abstractmethod
    def prepare(self, x_TD: Tensor, y_TE: Tensor | None = None) -> Batch:
        """Make the copies of a batch, as `Backend.prepare`."""

    @abstractmethod
    def bias(self, weights: Weights) -> Tensor:
        """Compute `fold_bias` of the weights that the product uses; not finite where a weight is not."""

    @abstractmethod
    def largest(self, batch: Batch, weights: Weights, bias_F: Tensor, rule: Largest) -> Codes:
        """Find the k largest pre-activations of each token, as the rule has them."""

    @abstractmethod
    def largest_of_groups(self, batch: Batch, weights: Weights, bias_F: Tensor, k: int) -> Codes:
        """Find the largest pre-activation of each of k groups of latents, rectified."""

    @abstractmethod
    def above(
        self, batch: Batch, weights: Weights, bias_F: Tensor, floor_F: Tensor, most_codes: float
    ) -> Codes | None:
        """Find pre-activations above the floors of their latents; None where they are more than so many."""

    @abstractmethod
    def reconstruct(self, codes: Codes, batch: Batch, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
        """Decode codes. Returns: e_TD, dot_TK and sse, as `Forward` has them."""

    @abstractmethod
    def reconstruct_groups(
        self, codes: Codes, groups: Groups, batch: Batch, weights: Weights
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Decode codes group by group. Returns: e_TD, dot_TK, sse_G and rows_GTD, as `Forward` has them."""

    @abstractmethod
    def keep_largest(self, pre_TS: Tensor, k: int) -> Tensor:
        """Rectify the k largest entries of each row, in their places among zeros."""

    @abstractmethod
    def keep_active(self, dpre_TS: Tensor, acts_TS: Tensor) -> Tensor:
        """Set, in place, the gradients of inactive latents to 0; sum them over tokens, float32 [S]."""

    @abstractmethod
    def update(self, task: Task, forward: Forward, slopes: Slopes, dead: DeadRows | None) -> Tensor:
        """Take the task's optimizer step, in place, with the gradients of dead latents added.

        Returns: bool [F], which latents fired.
        """

    def describe(self) -> str:
        """Describe how it multiplies, as `Backend.describe`."""
        return described(self.dtype, self.name)

    def step(self, task: Task) -> Sums:
        """Go forward over this process's own tokens, backward over the whole batch, as `Backend.step`."""
        architecture, p, n_tokens = task.architecture, task.weights.parameters, len(task.batch.x_TD)
        own = task.batch.tokens(self.team.tokens.slice_of(n_tokens)).less_skip(p)
        forward = self._forward(own, task)
        if forward is None:
            return self._dense_step(task)
        dead_rows, aux_loss = None, torch.zeros((), device=own.x_TD.device)
        if isinstance(aux := architecture.auxiliary, Auxiliary) and task.dead.n_in_team > 0:
            scale = aux.alpha * task.rates.per_square * aux.share(task.dead)
            with region("auxk"):
                dead_rows, aux_loss = auxk(self, own, forward, task.dead, task.weights, aux, scale)
        found = None
        if task.objective is not None:
            with region("model"):
                forward, found = with_objective(forward, task, task.objective)
        forward = self._nan_unless_finite(gather(forward, n_tokens, self.team))
        if isinstance(aux, Pull) and task.dead.n_in_team > 0:
            dead_rows, own_loss = pull(forward.codes, task, aux.weight * task.rates.per_square)
            aux_loss = self.team.latents.all_reduce(own_loss)
        seen = Seen(task.dead, n_tokens, forward.n_active, forward.cutoff)
        with region("slopes"):
            slopes = architecture.slopes(
                p, forward.codes, seen, forward.dot_TK, forward.held_dot_TK, task.rates.per_square
            )
        task = task._replace(healthy=task.healthy & torch.isfinite(forward.sse))
        fired_F = self.update(task, forward, slopes, dead_rows)
        if forward.held_sse is not None:
            aux_loss = aux_loss + forward.held_sse * task.rates.per_square
        penalty = None if slopes.penalty is None else self.team.latents.all_reduce(slopes.penalty)
        sums = Sums(
            *(forward.sse, aux_loss, forward.n_active, fired_F),
            penalty=penalty,
            cutoff=forward.cutoff,
            at_output=found,
        )
        if architecture.groups is None or forward.sse_G is None:
            return sums
        error = forward.sse_G @ forward.sse_G.new_tensor(architecture.groups.weights)
        return sums._replace(error=error, sse_G=forward.sse_G)

    def _forward(self, own: Batch, task: Task) -> Forward | None:
        """Encode and reconstruct this process's tokens; None where that had better be dense."""
        weights, architecture, p = task.weights, task.architecture, task.weights.parameters
        bias_F, rule, cutoff = self.bias(weights), architecture.rule(p), None
        if isinstance(rule, Largest):
            found: Codes | None = by_layer.largest(self, own, weights, bias_F, rule)
        elif isinstance(rule, LargestOfGroups):
            found = self.largest_of_groups(own, weights, bias_F, rule.k)
        elif isinstance(rule, Above):
            found = self._above(own, weights, bias_F, rule.floor_F)
        else:
            found, cutoff = self._batch_largest(own, weights, bias_F, round(rule.k * len(task.batch.x_TD)))
        if found is None:
            return None
        codes, n_active = self._own_codes(architecture.codes(p, found), rule)
        if (groups := self._own_groups(architecture.groups)) is None:
            e_TD, dot_TK, sse = self.reconstruct(codes, own, weights)
            forward = Forward(codes, e_TD, dot_TK, sse, n_active, bias_F, cutoff)
        else:
            codes = codes.by_group(groups)
            e_TD, dot_TK, sse_G, rows_GTD = self.reconstruct_groups(codes, groups, own, weights)
            # A copy, since processes add both up in place.
            sse, n_active = sse_G[groups.shown].clone(), self._n_shown(codes, groups, n_active)
            forward = Forward(codes, e_TD, dot_TK, sse, n_active, bias_F, cutoff, rows_GTD, sse_G, groups)
        if not architecture.has_gate or codes.pre_TK is None:
            return forward
        held = codes._replace(val_TK=codes.pre_TK)
        _, held_dot_TK, held_sse = self.reconstruct(held, own, weights)
        return forward._replace(held_dot_TK=held_dot_TK, held_sse=held_sse)

    def _nan_unless_finite(self, forward: Forward) -> Forward:
        """Make the error NaN where a weight is not finite: no comparison finds its latent."""
        n_infinite = self.team.latents.all_reduce((~torch.isfinite(forward.bias_F)).sum())
        return forward._replace(sse=forward.sse.where(n_infinite == 0, torch.nan))

    def _own_codes(self, codes: Codes, rule: Rule) -> tuple[Codes, Tensor]:
        """Keep what is among the team's k largest, where those are asked for; count the codes of the team."""
        if isinstance(rule, Largest):
            return own_codes(codes, self.team)
        return codes, self.team.latents.all_reduce(codes.active_TK.sum())

    def _own_groups(self, groups: Groups | None) -> Groups | None:
        """Count where groups of latents end among those of this process."""
        if groups is None or groups.by_rank:
            return groups
        own = self.team.latents.slice_of(groups.ends[-1])
        return groups._replace(
            ends=tuple(min(max(end, own.start), own.stop) - own.start for end in groups.ends)
        )

    def _n_shown(self, codes: Codes, groups: Groups, n_active: Tensor) -> Tensor:
        """Count the active latents in the group that is shown."""
        return n_active if not groups.by_rank else codes.active_TK[:, : groups.ends[groups.shown]].sum()

    def _above(self, own: Batch, weights: Weights, bias_F: Tensor, floor_F: Tensor) -> Codes | None:
        """Find pre-activations above floors; None where all processes had better take a dense step."""
        may_be_dense = self.team.latents.size == 1
        most = DENSE_SHARE * len(bias_F) * len(own.x_TD) if may_be_dense else float("inf")
        codes = by_layer.above(self, own, weights, bias_F, floor_F, most)
        return None if self.team.tokens.any(codes is None) else codes

    def _batch_largest(
        self, own: Batch, weights: Weights, bias_F: Tensor, n_kept: int
    ) -> tuple[Codes | None, Tensor]:
        """Find the pre-activations among the n largest of the whole batch, and the smallest of them.

        Those above a guess are found first; a guess that lets fewer through is lowered, so the result does
        not depend on it.
        """
        floor = self._guess(own, weights, bias_F, n_kept)
        while True:
            codes = self._above(own, weights, bias_F, torch.full_like(bias_F, floor))
            if codes is None:
                return None, bias_F.new_zeros(())
            best = Best(n_kept, bias_F.device)
            best.add(codes.val_TK.flatten())
            cutoff, n_best = best.cutoff(self.team)
            if n_best == n_kept or floor == 0:
                return codes.reaching(cutoff), cutoff
            floor = floor / 2 if floor > LEAST_FLOOR else 0.0

    def _guess(self, own: Batch, weights: Weights, bias_F: Tensor, n_kept: int) -> float:
        """Guess a floor that more than n pre-activations of the batch pass, from some of its tokens."""
        rows_TD = own.product_TD[:: max(1, len(own.x_TD) // SAMPLE_TOKENS)]
        n = weights.parameters.n_layers
        pre_TF = layers.pre_activations(rows_TD, weights.product_FD, bias_F.to(self.dtype), n).float()
        n_tokens = len(own.x_TD) * self.team.tokens.size
        n_sampled = max(1, round(SAMPLE_RANKS * n_kept * len(rows_TD) / n_tokens / self.team.latents.size))
        floor = pre_TF.flatten().topk(min(n_sampled, pre_TF.numel())).values[-1].clamp(min=0)
        floors = floor[None]
        for group in (self.team.latents, self.team.tokens):
            floors = group.all_gather(floors, len(floors) * group.size)
        return float(floors.min())

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


def encode(x_TD: Tensor, w_enc_FD: Tensor, bias_F: Tensor, rule: Largest, scratch_TF: Tensor) -> Codes:
    """Find the codes of some tokens, by a dense product and an exact top-k.

    Args:
        x_TD, w_enc_FD: of the same dtype, the product's.
        bias_F: from `fold_bias`.
        rule: which pre-activations are codes.
        scratch_TF: where the pre-activations go, for no fewer tokens.
    """
    with region("encode"):
        pre_TF = torch.addmm(bias_F.to(x_TD.dtype), x_TD, w_enc_FD.T, out=scratch_TF[: len(x_TD)])
    with region("top-k"):
        values, indices = (abs_topk if rule.is_signed else topk)(pre_TF, rule.k)
        return Codes(values.float(), indices)


def decode(codes: Codes, w_dec_FD: Tensor) -> Tensor:
    """Sum val · W_dec[idx] over K. float32 [T, D]."""
    return embedding_bag(codes.idx_TK, w_dec_FD, per_sample_weights=codes.val_TK, mode="sum")


def own_codes(codes: Codes, team: Team) -> tuple[Codes, Tensor]:
    """Keep, of this process's best latents, those that are among the team's; the others are 0 at latent 0.

    Returns: the codes, and how many are active in the whole team.
    """
    if team.latents.size == 1:
        return codes, codes.active_TK.sum()
    with region("exchange"):
        chosen_TK, n_active = team.among_all(codes.val_TK.abs())
    return codes.where(chosen_TK), n_active


def residual_of_team(codes: Codes, batch: Batch, weights: Weights, team: Team) -> tuple[Tensor, Tensor]:
    """Compute e and ⟨e_t, W_dec[idx_tk]⟩, float32, where latents are split: x̂ is one sum over the team."""
    w_dec_FD, b_D = weights.parameters.w_dec_FD, weights.parameters.b_D
    e_TD = team.latents.all_reduce(decode(codes, w_dec_FD)).add_(b_D).sub_(batch.target_TE)
    return e_TD, row_dots(e_TD, codes.idx_TK, w_dec_FD)


def groups_of_team(
    codes: Codes, groups: Groups, batch: Batch, weights: Weights, team: Team
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `Sparse.reconstruct_groups` in float32, where latents are split."""
    w_dec_FD, b_D = weights.parameters.w_dec_FD, weights.parameters.b_D
    group_TK = codes.group_TK(groups)
    errors = [
        team.latents.all_reduce(decode(codes.where(group_TK <= g), w_dec_FD)).add_(b_D).sub_(batch.target_TE)
        for g in range(len(groups.ends))
    ]
    sse_G = torch.stack([e_TD.square().sum() for e_TD in errors])
    weighted = torch.stack([w * e_TD for w, e_TD in zip(groups.weights, errors, strict=True)])
    rows_GTD = weighted.flip(0).cumsum(0).flip(0)
    dot_TK = codes.val_TK.new_zeros(codes.val_TK.shape)
    for g, rows_TD in enumerate(rows_GTD):
        dot_TK += row_dots(rows_TD, codes.idx_TK, w_dec_FD).where(group_TK == g, 0)
    return errors[groups.shown], dot_TK, sse_G, rows_GTD


def gradients_of_whole(task: Task, e_TD: Tensor, dpre_F: Tensor, team: Team) -> dict[str, Tensor]:
    """Compute the gradients of the parameters without a row per latent: of b, and of W_skip where it is.

    Args:
        task: with the whole batch; w_enc is as it was in the forward pass.
        e_TD: errors of the whole batch, with groups the weighted sums of all of them.
        dpre_F: Σ dpre of this process's latents, float32, that of dead ones included.
        team: where it splits the latents, each part of b's gradient is summed over it.
    """
    p, scale = task.weights.parameters, task.rates.grad_scale
    db_D = e_TD.sum(0, dtype=torch.float32).mul_(scale)
    if p.is_centred:
        db_D.div_(team.latents.size).sub_(dpre_F @ p.w_enc_FD)
        team.latents.all_reduce(db_D)
    if p.w_skip_ED is None:
        return {"b": db_D}
    pairs = (rows.chunk(p.n_layers, 1) for rows in (e_TD, task.batch.product_TD.to(e_TD.dtype)))
    dskip = [(e.T @ x).float().mul_(scale) for e, x in zip(*pairs, strict=True)]
    return {"b": db_D, SKIP: torch.cat(dskip)}


def gather(forward: Forward, n_tokens: int, team: Team) -> Forward:
    """Put together what every replica saw of its share of a batch of T tokens."""
    group = team.tokens
    if group.size == 1:
        return forward

    def joined(share_T: Tensor) -> Tensor:
        return group.all_gather(share_T, n_tokens)

    def slotted(share_TK: Tensor) -> Tensor:
        return joined(pad(share_TK, (0, n_slots - share_TK.shape[1])))

    def if_any(work: Callable[[Tensor], Tensor], share: Tensor | None) -> Tensor | None:
        return None if share is None else work(share)

    with region("exchange"):
        val_TK, idx_TK, pre_TK, n_T = forward.codes
        n_slots = val_TK.shape[1]
        if n_T is not None:  # as many as the token with the most codes has
            n_slots = int(group.all_gather(torch.tensor([n_slots]), group.size).max())
        codes = Codes(slotted(val_TK), slotted(idx_TK), if_any(slotted, pre_TK), if_any(joined, n_T))
        rows_GTD = forward.rows_GTD
        return forward._replace(
            codes=codes,
            e_TD=joined(forward.e_TD),
            dot_TK=slotted(forward.dot_TK),
            sse=group.all_reduce(forward.sse),
            n_active=group.all_reduce(forward.n_active),
            rows_GTD=None if rows_GTD is None else torch.stack([joined(rows_TD) for rows_TD in rows_GTD]),
            sse_G=if_any(group.all_reduce, forward.sse_G),
            held_dot_TK=if_any(slotted, forward.held_dot_TK),
            held_sse=if_any(group.all_reduce, forward.held_sse),
        )

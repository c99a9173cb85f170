"""From a gradient at x̂ to that of the codes: the error's, and what an objective finds in the model."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saemill.train.backends.base import Task
from saemill.train.objective.at_output import AtOutput, Objective

if TYPE_CHECKING:
    from saemill.train.backends.sparse import Forward


def with_objective(forward: "Forward", task: Task, objective: Objective) -> tuple["Forward", AtOutput]:
    """Put what the objective finds at x̂ in the place of the error: all that follows takes gradients from it.

    Where ∂L/∂x̂ is g beside the weight w of the squared error, the step is that of an error w e + g/gs.
    """
    error = forward.sse
    if forward.groups is not None and forward.sse_G is not None:
        error = forward.sse_G @ forward.sse_G.new_tensor(forward.groups.weights)
    xhat_TE = forward.e_TD.float() + task.batch.target_TE
    found = objective.at(xhat_TE, error * task.rates.per_square)
    own_TE, w_dec_FD = found.gradient_TE / task.rates.grad_scale, task.weights.parameters.w_dec_FD
    dot_TK, rows_GTD = row_dots(own_TE, forward.codes.idx_TK.long(), w_dec_FD), forward.rows_GTD
    if forward.groups is not None and rows_GTD is not None:
        dot_TK = dot_TK.where(forward.codes.group_TK(forward.groups) <= forward.groups.shown, 0)
        rows_GTD = rows_GTD * found.squares
        rows_GTD[: forward.groups.shown + 1] += own_TE.to(rows_GTD.dtype)
    return forward._replace(
        e_TD=(forward.e_TD * found.squares).add_(own_TE.to(forward.e_TD.dtype)),
        dot_TK=forward.dot_TK * found.squares + dot_TK,
        sse=forward.sse.where(torch.isfinite(found.nats), torch.nan),
        rows_GTD=rows_GTD,
    ), found


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

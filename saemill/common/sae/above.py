"""The pre-activations above a threshold of each latent, as slots per token."""

import torch
from torch import Tensor


def above(pre_TF: Tensor, threshold_F: Tensor) -> tuple[Tensor, Tensor]:
    """Select the entries of each row that are above their column's threshold: z · 1[z > θ].

    A NaN counts as above, so that it is seen in the result.

    Args:
        pre_TF: pre-activations.
        threshold_F: 0 or more.

    Returns: values [T, K] in the dtype of pre_TF, differentiable; indices int64 [T, K]. K is the largest
    number of active entries in a row, at least 1; an unused slot is 0, of latent 0.
    """
    active_TF = ~(pre_TF <= threshold_F)
    n_active_T = active_TF.sum(1)
    n_slots = max(1, int(n_active_T.max())) if len(pre_TF) else 1
    token, latent = active_TF.nonzero(as_tuple=True)
    # nonzero goes row by row, so a row's entries follow each other from where the rows before it end.
    first_T = n_active_T.cumsum(0) - n_active_T
    slot = torch.arange(len(token), device=token.device) - first_T[token]
    values_TK = pre_TF.new_zeros(len(pre_TF), n_slots).index_put((token, slot), pre_TF[token, latent])
    indices_TK = torch.zeros(len(pre_TF), n_slots, dtype=torch.int64, device=pre_TF.device)
    return values_TK, indices_TK.index_put((token, slot), latent)

"""The pre-activations above a threshold of each latent, as slots per token."""

import numpy as np
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
    n_tokens, n_latents = pre_TF.shape
    places = _places(torch.le(pre_TF, threshold_F).logical_not_())
    token, latent = places // n_latents, places % n_latents
    n_active_T = torch.bincount(token, minlength=n_tokens)
    n_slots = max(1, int(n_active_T.max())) if n_tokens else 1
    # A row's places follow each other, from where those of the rows before it end.
    first_T = n_active_T.cumsum(0) - n_active_T
    slot = torch.arange(len(places), device=places.device) - first_T[token]
    values_TK = pre_TF.new_zeros(n_tokens, n_slots).index_put((token, slot), pre_TF[token, latent])
    indices_TK = torch.zeros(n_tokens, n_slots, dtype=torch.int64, device=pre_TF.device)
    return values_TK, indices_TK.index_put((token, slot), latent)


def _places(active_TF: Tensor) -> Tensor:
    """Find where entries are true, counted row by row. int64, ascending."""
    if active_TF.is_cpu:  # numpy is several times as fast
        return torch.from_numpy(np.flatnonzero(active_TF.numpy()))
    return active_TF.flatten().nonzero()[:, 0]

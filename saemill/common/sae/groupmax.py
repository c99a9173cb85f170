"""The largest pre-activation of each group of latents, as slots per token."""

import torch
from torch import Tensor


def groupmax(pre_TF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Select the largest entry of each of k groups of F/k consecutive latents, after ReLU.

    Args:
        pre_TF: pre-activations; k divides F.
        k: number of groups.

    Returns: values [T, k] in the same dtype, 0 or more, differentiable; indices int64 [T, k]. Of equal
    entries one is taken, always the same. A NaN is the largest of its group, so that it is seen.
    """
    n_latents = pre_TF.shape[1]
    values_TK, places_TK = pre_TF.reshape(-1, k, n_latents // k).max(2)
    return values_TK.relu(), places_TK + torch.arange(0, n_latents, n_latents // k, device=pre_TF.device)

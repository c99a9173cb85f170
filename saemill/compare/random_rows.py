"""What would match by chance: random dictionaries in place of one of the two."""

import torch
from torch import Tensor


def isotropic(rows_FD: Tensor, seed: int) -> Tensor:
    """As many unit rows in directions drawn evenly. fp32 [F, D]."""
    drawn_FD = torch.randn(rows_FD.shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn_FD, dim=1).to(rows_FD.device)


def same_covariance(rows_FD: Tensor, seed: int) -> Tensor:
    """As many unit rows, drawn from a Gaussian with the second moments Σ r rᵀ / F of these. fp32 [F, D].

    A dictionary whose rows keep to few directions is matched by chance more often; so is this one.
    """
    values_D, vectors_DD = torch.linalg.eigh((rows_FD.T @ rows_FD).double() / len(rows_FD))
    root_DD = (vectors_DD * values_D.clamp(min=0).sqrt()) @ vectors_DD.T
    drawn_FD = torch.randn(rows_FD.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(drawn_FD.to(rows_FD.device) @ root_DD, dim=1).float()

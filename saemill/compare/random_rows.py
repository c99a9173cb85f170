"""What would match by chance: random dictionaries in place of one of the two."""

import torch
from torch import Tensor

from saemill.common.stores.permutation import combine


def isotropic(rows_FD: Tensor, seed: int) -> Tensor:
    """Draw as many unit rows in directions drawn evenly. fp32 [F, D]."""
    return torch.nn.functional.normalize(_drawn(rows_FD, seed), dim=1).float()


def same_covariance(rows_FD: Tensor, seed: int) -> Tensor:
    """Draw as many unit rows from a Gaussian with the second moments Σ r rᵀ / F of these. fp32 [F, D].

    A dictionary whose rows keep to few directions is matched by chance more often; so is this one.
    """
    values_D, vectors_DD = torch.linalg.eigh((rows_FD.T @ rows_FD).double() / len(rows_FD))
    root_DD = (vectors_DD * values_D.clamp(min=0).sqrt()) @ vectors_DD.T
    return torch.nn.functional.normalize(_drawn(rows_FD, seed) @ root_DD, dim=1).float()


def _drawn(rows_FD: Tensor, seed: int) -> Tensor:
    """Draw Gaussian numbers, float64, of a stream that no dictionary begins with."""
    generator = torch.Generator().manual_seed(combine(seed, 0xC0FFEE) >> 1)
    return torch.randn(rows_FD.shape, generator=generator, dtype=torch.float64).to(rows_FD.device)

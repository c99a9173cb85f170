"""Training units: x̃ = (x − centre) · scale with E‖x̃‖² = D, one centre and one scale per site.

A transcoder has two: its input's, and those of the site that it predicts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from saemill.common.errors import StoreError
from saemill.train.stream.rows import TrainingRows

MOST_SCALE = 1e37
"""Largest factor between activations and training units, and largest inverse of it."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """The units of one site."""

    centre_D: Tensor
    """float32, on the device that trains."""
    scale: float
    """Training units per unit of the activations."""

    def standardise(self, x_TD: Tensor) -> Tensor:
        """Turn stored activations into training units. float32 [T, D]."""
        return (x_TD.float() - self.centre_D).mul_(self.scale)


def scaling_of(rows: TrainingRows, site: str, device: torch.device) -> Scaling:
    """Take centre and scale from the statistics of a site's rows that are trained on.

    Raises:
        StoreError: the activations are all alike, or at a scale that float32 does not reach.
    """
    statistics = rows.statistics(site)
    if not statistics.total_variance > 0:
        raise StoreError(f"the activations at {site} are all alike: nothing to train on")
    scale = (len(statistics.mean_D) / statistics.total_variance) ** 0.5
    if not 1 / MOST_SCALE < scale < MOST_SCALE:
        raise StoreError(
            f"the activations at {site} are about {1 / scale:.0e} from their mean in each dimension, where "
            f"float32 computes with none; multiply them by {scale:.0e} before they are stored"
        )
    return Scaling(statistics.mean_D.float().to(device), scale)

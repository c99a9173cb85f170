"""Training units: x̃ = (x − centre) · scale with E‖x̃‖² = D, one centre and one scale per site.

A transcoder has two: its input's, and those of the site that it predicts. A crosscoder has as many as it
joins sites, side by side: so that each is E‖x̃‖² = its D, none counts for more since its activations are long.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saemill.common.errors import StoreError
from saemill.common.stores.site_names import parts_of
from saemill.common.stores.statistics import Statistics
from saemill.train.stream.rows import Rows

MOST_SCALE = 1e37
"""Largest factor between activations and training units, and largest inverse of it."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """The units of one site, or of several that are joined, each in its own."""

    centre_D: Tensor
    """float32, on the device that trains."""
    scale: float
    """Training units per unit of the activations; of joined sites of all dimensions together."""
    parts: tuple[tuple[int, float], ...] = ()
    """Width and scale of each of the sites that are joined; empty of one site."""

    @property
    def gain_D(self) -> Tensor | None:
        """Factors by which the sites' own scales differ from `scale`, float32; None of one site."""
        if not self.parts:
            return None
        gains = [self.centre_D.new_full((width,), own / self.scale) for width, own in self.parts]
        return torch.cat(gains)

    def standardise(self, x_TD: Tensor) -> Tensor:
        """Turn stored activations into training units. float32 [T, D]."""
        standard_TD = (x_TD.float() - self.centre_D).mul_(self.scale)
        return standard_TD if self.gain_D is None else standard_TD.mul_(self.gain_D)


def scaling_of(rows: Rows, site: str, device: torch.device) -> Scaling:
    """Take centre and scale from the statistics of a site's rows that are trained on; of joined sites from
    those of each.

    Raises:
        StoreError: the activations are all alike, or at a scale that float32 does not reach.
    """
    every = [rows.statistics(part) for part in parts_of(site)]
    centre_D = torch.cat([each.mean_D for each in every]).float().to(device)
    scales = [_scale(part, each) for part, each in zip(parts_of(site), every, strict=True)]
    if len(every) == 1:
        return Scaling(centre_D, scales[0])
    widths = [len(each.mean_D) for each in every]
    scale = math.sqrt(sum(widths) / sum(each.total_variance for each in every))
    return Scaling(centre_D, scale, tuple(zip(widths, scales, strict=True)))


def _scale(site: str, statistics: Statistics) -> float:
    """Compute the scale with which a site's squared distance from its mean is D on the average."""
    if not statistics.total_variance > 0:
        raise StoreError(f"the activations at {site} are all alike: nothing to train on")
    scale = math.sqrt(len(statistics.mean_D) / statistics.total_variance)
    if not 1 / MOST_SCALE < scale < MOST_SCALE:
        raise StoreError(
            f"the activations at {site} are about {1 / scale:.0e} from their mean in each dimension, where "
            f"float32 computes with none; multiply them by {scale:.0e} before they are stored"
        )
    return scale

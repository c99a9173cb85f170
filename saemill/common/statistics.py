"""Moments of a site's activations, summed part by part while they are written."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saemill.common.errors import StoreError


@dataclass(frozen=True, slots=True)
class Statistics:
    """First and second moments of a site's activations over the training positions."""

    n_tokens: int
    """Positions counted: not masked, not held out."""
    mean_D: Tensor
    """float64 [D]."""
    variance_D: Tensor
    """float64 [D], with divisor n_tokens."""
    mean_squared_norm: float
    """Mean of the squared Euclidean length, mean not removed."""
    distances: Mapping[int, int]
    """How many of them are how far from the mean: step → count, as `Moments.distances`."""

    @property
    def total_variance(self) -> float:
        """Mean squared distance from the mean: the sum of `variance_D`."""
        return float(self.variance_D.sum())

    @property
    def median_distance(self) -> float:
        """Of the positions from the mean, to within a tenth; 0 where there are none."""
        below, half = 0, sum(self.distances.values()) / 2
        for step in sorted(self.distances):
            below += self.distances[step]
            if below >= half:
                return middle_of(step)
        return 0.0

    @property
    def largest_distance(self) -> float:
        """Of the positions from the mean, to within a tenth; 0 where there are none."""
        return middle_of(max(self.distances)) if self.distances else 0.0

    def share_beyond(self, factor: float) -> float:
        """Share of the positions that are further from the mean than `factor` medians."""
        limit = factor * self.median_distance
        far = sum(count for step, count in self.distances.items() if middle_of(step) > limit)
        return far / self.n_tokens


class Moments:
    """Count, mean and squared deviations of chosen rows, in float64; parts merge exactly enough
    for any mean (Chan, Golub and LeVeque 1979)."""

    def __init__(self, width: int) -> None:
        self.n = 0
        self.mean_D = np.zeros(width)
        self.deviations_D = np.zeros(width)
        self.distances: Counter[int] = Counter()
        """Rows by their distance from the mean of those added with them: step s counts the distances in
        [2^(s/4), 2^((s+1)/4)); distances of 0 are left out."""

    def add(self, x_TD: Tensor) -> None:
        """Count the rows of x_TD."""
        for part in torch.split(x_TD, 8192):
            if len(part) == 0:
                continue
            rows = part.double().numpy()
            mean = rows.mean(0)
            squares = np.square(rows - mean)
            self.merge(len(rows), mean, squares.sum(0), _steps(squares.sum(1)))

    def merge(
        self,
        n: int,
        mean_D: NDArray[np.float64],
        deviations_D: NDArray[np.float64],
        distances: Mapping[int, int],
    ) -> None:
        """Add `n` rows counted elsewhere: their mean, summed squared deviations from it, and distances."""
        if n == 0:
            return
        self.distances.update(distances)
        total = self.n + n
        delta = mean_D - self.mean_D
        self.deviations_D = self.deviations_D + deviations_D + delta**2 * (self.n * n / total)
        self.mean_D = self.mean_D + delta * (n / total)
        self.n = total

    def statistics(self) -> Statistics:
        """The moments as statistics.

        Raises:
            StoreError: no row was counted.
        """
        if self.n == 0:
            raise StoreError("every position is masked or held out: no statistics, nothing to train on")
        variance = self.deviations_D / self.n
        return Statistics(
            n_tokens=self.n,
            mean_D=torch.from_numpy(self.mean_D),
            variance_D=torch.from_numpy(variance),
            mean_squared_norm=float(np.sum(variance + self.mean_D**2)),
            distances=dict(sorted(self.distances.items())),
        )


STEPS_PER_OCTAVE = 4


def _steps(squares_T: NDArray[np.float64]) -> dict[int, int]:
    """How many of some squared distances fall into each step."""
    positive = squares_T[squares_T > 0]
    steps = np.floor(np.log2(positive) * (STEPS_PER_OCTAVE / 2)).astype(np.int64)
    return dict(zip(*(part.tolist() for part in np.unique(steps, return_counts=True)), strict=True))


def middle_of(step: int) -> float:
    """The distance that stands for those of a step."""
    return float(2 ** ((step + 0.5) / STEPS_PER_OCTAVE))

"""Moments of a site's activations, summed shard by shard as they are written, and warnings from them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saemill.common.errors import StoreError
from saemill.common.log import counted

FAR = 10.0
"""Number of medians away from the mean beyond which a row counts as far."""
UNHELD = 0.01
"""Share of a dimension's variance made by rounding from which on the dimension is not held."""
MOST_NAMED = 8
"""Number of dimensions named in a message, at most."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """First and second moments of a site's activations over the training positions."""

    n_tokens: int
    """Number of positions counted: not masked, not held out."""
    mean_D: Tensor
    """Mean, float64 [D]."""
    variance_D: Tensor
    """Variance, float64 [D], with divisor n_tokens."""
    mean_squared_norm: float
    """Mean of the squared Euclidean length, mean not removed."""
    distances: Mapping[int, int]
    """Counts of positions by their distance from the mean: step → count, as in `Moments.distances`."""

    @property
    def total_variance(self) -> float:
        """Mean squared distance from the mean: the sum of `variance_D`."""
        return float(self.variance_D.sum())

    @property
    def median_distance(self) -> float:
        """Median distance of the positions from the mean, to within a tenth; 0 where there are none."""
        below, half = 0, sum(self.distances.values()) / 2
        for step in sorted(self.distances):
            below += self.distances[step]
            if below >= half:
                return middle_of(step)
        return 0.0

    @property
    def largest_distance(self) -> float:
        """Largest distance of a position from the mean, to within a tenth; 0 where there are none."""
        return middle_of(max(self.distances)) if self.distances else 0.0

    def without(self, left_out: "Statistics") -> "Statistics":
        """Compute the statistics of these positions without some of them. How far the others are from their
        mean is not known then: `distances` is empty."""
        n = self.n_tokens - left_out.n_tokens
        shift_D = left_out.mean_D - self.mean_D
        mean_D = self.mean_D - shift_D * (left_out.n_tokens / n)
        deviations_D = self.variance_D * self.n_tokens - left_out.variance_D * left_out.n_tokens
        deviations_D -= shift_D.square() * (left_out.n_tokens * self.n_tokens / n)
        variance_D = (deviations_D / n).clamp(min=0)
        return Statistics(n, mean_D, variance_D, float((variance_D + mean_D.square()).sum()), {})

    def share_beyond(self, factor: float) -> float:
        """Compute the share of the positions that are further from the mean than `factor` medians."""
        limit = factor * self.median_distance
        far = sum(count for step, count in self.distances.items() if middle_of(step) > limit)
        return far / self.n_tokens


class Moments:
    """Count, mean and squared deviations of chosen rows, in float64. Moments of several sets merge exactly
    enough for any mean (Chan, Golub and LeVeque 1979)."""

    def __init__(self, width: int) -> None:
        self.n = 0
        self.mean_D = np.zeros(width)
        self.deviations_D = np.zeros(width)
        self.distances: Counter[int] = Counter()
        """Counts of rows by their distance from the mean of the rows added with them: step s counts the
        distances in [2^(s/4), 2^((s+1)/4)). Distances of 0 are left out."""

    def add(self, x_TD: Tensor, chosen_N: NDArray[np.int64] | None = None) -> None:
        """Count the rows of x_TD, or those of them with these numbers."""
        from saemill.common.loops import moments  # numba is loaded where it is used

        chosen_N = np.arange(len(x_TD)) if chosen_N is None else chosen_N
        for start in range(0, len(chosen_N), ROWS_PER_MEAN):
            some_N = chosen_N[start : start + ROWS_PER_MEAN]
            mean_D = moments.mean(x_TD, some_N)
            deviations_D, squares_N = moments.deviations(x_TD, some_N, mean_D)
            self.merge(len(some_N), mean_D, deviations_D, _steps(squares_N))

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
        """Compute statistics from the moments.

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
ROWS_PER_MEAN = 8192
"""Number of rows whose distances are from their own mean."""


def _steps(squares_T: NDArray[np.float64]) -> dict[int, int]:
    """Count how many of some squared distances fall into each step."""
    positive = squares_T[squares_T > 0]
    steps = np.floor(np.log2(positive) * (STEPS_PER_OCTAVE / 2)).astype(np.int64)
    return dict(zip(*(values.tolist() for values in np.unique(steps, return_counts=True)), strict=True))


def middle_of(step: int) -> float:
    """Compute the distance that represents a step."""
    return float(2 ** ((step + 0.5) / STEPS_PER_OCTAVE))


def rounding_shares(statistics: Statistics, dtype: torch.dtype) -> Tensor:
    """Compute the share of each dimension's stored variance that its rounding to `dtype` makes. float64 [D],
    0 to 1.

    Near a value m the numbers of a type with p significant bits lie u = 2^(⌊log2 m⌋ + 1 − p) apart. Values
    that spread over some of those steps have a rounding error that is uniform in ±u/2, of the variance u²/12
    (Widrow and Kollár 2008, chapter 4): the share is u²/12 over the stored variance. Values that spread over
    less than a step fall on one or two numbers; the variance that is stored is then anything from 0 to u²/4,
    whatever it was, so that the share is never less than a third: what was lost is seen in what is left.
    m is the root of the dimension's mean square. A dimension that is constant, at a value other than 0, looks
    like one whose variance was lost, and has the share 1.
    """
    kind = torch.finfo(dtype)
    mean_square_D = statistics.mean_D.square() + statistics.variance_D
    # frexp gives ⌊log2 m⌋ + 1; below the smallest normal number the steps are no smaller than above it.
    exponent_D = torch.frexp(mean_square_D.sqrt().clamp(min=kind.smallest_normal)).exponent
    step_D = torch.ldexp(torch.full_like(mean_square_D, kind.eps / 2), exponent_D)
    share_D = step_D.square() / 12 / statistics.variance_D
    return torch.where(mean_square_D > 0, share_D, 0.0).clamp(max=1.0)


def unheld(statistics: Statistics, dtype: torch.dtype) -> list[int]:
    """List the dimensions that a stored type cannot hold: those whose `rounding_shares` reach `UNHELD`."""
    if statistics.n_tokens < 2:
        return []  # one row has no variance
    return (rounding_shares(statistics, dtype) >= UNHELD).nonzero().flatten().tolist()


def unheld_warning(site: str, statistics: Statistics, dtype: torch.dtype) -> str | None:
    """Write a sentence on the dimensions that the stored type cannot hold, and the cure; None if there are
    none."""
    lost = unheld(statistics, dtype)
    if not lost:
        return None
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    worst = float(rounding_shares(statistics, dtype).max())
    more = ", …" if len(lost) > MOST_NAMED else ""
    constant = " (or some are constant, which looks the same)" if worst == 1 else ""
    cure = (
        f"make the store with --dtype fp32, of values that were not in {kind} before (of a model: also with "
        "--model-dtype fp32)"
        if dtype is not torch.float32
        else "take each dimension's mean off the vectors before they are imported"
    )
    return (
        f"{site}: {kind} cannot hold {counted(len(lost), 'dimension')} of {len(statistics.mean_D):,} "
        f"({', '.join(map(str, lost[:MOST_NAMED]))}{more}): they are so far from zero that its rounding "
        f"makes {UNHELD:.0%} or more of their stored variance (up to {worst:.0%}), and FVU does not show "
        f"it{constant}; {cure}"
    )


def far_warning(site: str, statistics: Statistics, unit: str) -> str | None:
    """Write a sentence on rows that are much further from the mean than the others; None where there are
    none.

    Args:
        site: what the rows belong to.
        statistics: of the rows.
        unit: what a row is: a token, a passage.
    """
    share = statistics.share_beyond(FAR)
    if not share:
        return None
    largest = statistics.largest_distance / statistics.median_distance
    cure = "; import them with --normalize, or leave them out" if unit == "passage" else ""
    return (
        f"{site}: {100 * share:.2g}% of the {unit}s are more than {FAR:g} times as far from the mean as the "
        f"median {unit}, up to {largest:,.0f} times: squared errors, and so SAEs that are trained on "
        f"them, are mostly about them{cure}"
    )


def warnings(site: str, statistics: Statistics, dtype: torch.dtype, unit: str) -> list[str]:
    """List the sentences for whoever trains on a site: on dimensions that are not held and on far rows."""
    sentences = unheld_warning(site, statistics, dtype), far_warning(site, statistics, unit)
    return [sentence for sentence in sentences if sentence]

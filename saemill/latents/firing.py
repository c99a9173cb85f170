"""Where one latent fires: its strongest places, and samples of the intervals of its activations.

SAEDashboard divides [0, largest] into intervals of one width, and counts the tokens in each. Its lowest one
has the zeros of all tokens on which the latent is not active, so that most of its samples show nothing. Here
it begins above 0: what is counted and shown are activations. At most one place of a row is shown in a group.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

N_BARS = 50
N_INTERVALS = 5
N_TOP = 20
N_SAMPLES = 5
"""Numbers of bars, intervals, strongest places, and samples of an interval, as by SAEDashboard's defaults."""
SEED = 11


@dataclass(frozen=True, slots=True)
class Group:
    """Some places of a latent that are shown together."""

    low: float
    high: float
    share: float
    """Share of the tokens with an activation in (low, high]."""
    chosen: NDArray[np.int64]
    """Indices of the latent's activations."""


@dataclass(frozen=True, slots=True)
class Firing:
    """Activations of one latent, by ascending place."""

    latent: int
    place_N: NDArray[np.int64]
    act_N: NDArray[np.float64]
    ctx: int
    """Tokens per row."""
    n_tokens: int
    """Unmasked tokens, those on which it is not active included."""

    @property
    def largest(self) -> float:
        """The largest activation; 0 of a latent that is never active."""
        return float(self.act_N.max(initial=0.0))

    def strongest(self) -> Group:
        """Choose the strongest activation of each row, of the rows where it is largest."""
        order = np.lexsort((self.place_N, -self.act_N))
        return Group(-1.0, self.largest, -1.0, self._one_per_row(order)[:N_TOP])

    def intervals(self) -> Iterator[Group]:
        """Draw activations of each interval, the highest first."""
        edges = np.linspace(0, self.largest, N_INTERVALS + 1)
        shuffled = np.random.default_rng((SEED, self.latent)).permutation(len(self.act_N))
        for low, high in zip(edges[-2::-1], edges[:0:-1], strict=True):
            inside_N = (self.act_N > low) & (self.act_N <= high)
            drawn = self._one_per_row(shuffled[inside_N[shuffled]])[:N_SAMPLES]
            share = int(inside_N.sum()) / self.n_tokens
            yield Group(float(low), float(high), share, drawn[np.argsort(-self.act_N[drawn], kind="stable")])

    def _one_per_row(self, order: NDArray[np.int64]) -> NDArray[np.int64]:
        """Keep the first of each row, in their order."""
        _, first = np.unique(self.place_N[order] // self.ctx, return_index=True)
        return order[np.sort(first)]

    def in_row(self, row: int) -> NDArray[np.float64]:
        """List the activations at all tokens of a row. [ctx]"""
        start, stop = np.searchsorted(self.place_N, (row * self.ctx, (row + 1) * self.ctx))
        acts_S = np.zeros(self.ctx)
        acts_S[self.place_N[start:stop] % self.ctx] = self.act_N[start:stop]
        return acts_S


def bars(values: NDArray[np.floating]) -> tuple[list[float], list[int]]:
    """Make a histogram of `N_BARS` bars from the least to the largest value: their middles and heights. One
    bar where all values are the same, none of no values."""
    if not len(values):
        return [], []
    low, high = float(values.min()), float(values.max())
    if low == high:
        return [low], [len(values)]
    heights, edges = np.histogram(values, N_BARS, (low, high))
    return ((edges[:-1] + edges[1:]) / 2).tolist(), heights.tolist()

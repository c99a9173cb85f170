"""A probe: logistic regression that tells a label, and how well it does on groups that it never saw.

Its figure is the area under the ROC curve (AUC): how often an example with the label scores higher than one
without, ties counting half. 0.5 is chance, whatever the shares of the two.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from saemill.assess.sums import LEAST_DOCUMENTS, Figure
from saemill.common.log import counted, say

Z = 1.959964
"""Two-sided 95% quantile of the normal distribution."""
MOST_STEPS = 2000
ROWS_AT_ONCE = 1024
"""Number of examples that are in memory in float64 at once."""
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
"""Inverse strengths of the penalty among which one is chosen, of standardised features."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure, and what each group adds to its error, to first order.

    Examples of one group are alike, so groups are what varies. Differences and means of estimates over the
    same groups are those of `influence_G`, which makes them paired.
    """

    value: float
    influence_G: NDArray[np.float64]

    def __sub__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.value - other.value, self.influence_G - other.influence_G)

    def figure(self, noun: str, bounds: tuple[float, float] = (0.0, 1.0)) -> Figure:
        """Return it with its 95% interval; `noun` is what a group is called."""
        n = int((self.influence_G != 0).sum())
        if n == 0:
            reason = f"it is the same for each {noun}, which tells of no error"
            return {"value": self.value, "lo": None, "hi": None, "reason": reason}
        if n < LEAST_DOCUMENTS:
            reason = f"only {counted(n, noun)}; an interval needs {LEAST_DOCUMENTS}"
            return {"value": self.value, "lo": None, "hi": None, "reason": reason}
        half = Z * float(np.sqrt(np.square(self.influence_G).sum() * n / (n - 1)))
        return {
            "value": self.value,
            "lo": max(bounds[0], self.value - half),
            "hi": min(bounds[1], self.value + half),
        }


def area(
    score_N: NDArray[np.float64], y_N: NDArray[np.bool_], group_N: NDArray[np.int64], n_groups: int
) -> Estimate:
    """Compute the AUC of scores.

    Its error is that of placement values (DeLong et al. 1988), added up over groups (Obuchowski 1997).

    Args:
        score_N: higher for what is held to have the label.
        y_N: whether it has; both occur.
        group_N: number of each example's group.
        n_groups: numbers that there are.
    """
    n_with, n_without = int(y_N.sum()), int((~y_N).sum())
    rank_N = rankdata(score_N)
    placement_N = np.empty(len(score_N))
    placement_N[y_N] = (rank_N[y_N] - rankdata(score_N[y_N])) / n_without
    placement_N[~y_N] = 1 - (rank_N[~y_N] - rankdata(score_N[~y_N])) / n_with
    value = float(placement_N[y_N].mean())
    share_N = (placement_N - value) / np.where(y_N, n_with, n_without)
    return Estimate(value, np.bincount(group_N, share_N, n_groups).astype(np.float64))


def ratio(above_G: NDArray[np.float64], below_G: NDArray[np.float64]) -> Estimate:
    """Compute Σ above / Σ below over groups; the latter is positive."""
    total = float(below_G.sum())
    value = float(above_G.sum()) / total
    return Estimate(value, (above_G - value * below_G) / total)


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """Compute the mean of estimates over the same groups."""
    return Estimate(
        float(np.mean([each.value for each in estimates])),
        np.mean([each.influence_G for each in estimates], axis=0),
    )


@dataclass(frozen=True, slots=True)
class Probe:
    """A linear score, in the units of what it was fitted to."""

    weight_D: NDArray[np.float64]
    bias: float

    def score(self, x_ND: NDArray[Any], chosen_N: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
        """Compute the log odds of the label, of some examples or of all. [N]"""
        pieces = [piece_ND @ self.weight_D for piece_ND in pieces_of(x_ND, chosen_N)]
        return np.concatenate([np.zeros(0), *pieces]) + self.bias


def pieces_of(x_ND: NDArray[Any], chosen_N: NDArray[np.bool_] | None = None) -> Iterator[NDArray[Any]]:
    """Cut rows, or the chosen ones, into pieces, so that only one of them is in memory once more."""
    rows = None if chosen_N is None else np.flatnonzero(chosen_N)
    for start in range(0, len(x_ND) if rows is None else len(rows), ROWS_AT_ONCE):
        here = slice(start, start + ROWS_AT_ONCE)
        yield x_ND[here if rows is None else rows[here]]


@dataclass(frozen=True, slots=True)
class Standard:
    """Features of which each has mean 0 and variance 1; a constant one is 0. They are standardised once for
    all labels."""

    z_ND: NDArray[np.float32]
    mean_D: NDArray[np.float64]
    scale_D: NDArray[np.float64]
    """1 / standard deviation."""

    @classmethod
    def of(cls, x_ND: NDArray[Any], chosen_N: NDArray[np.bool_]) -> "Standard":
        """Standardise the features of the chosen examples."""
        n, sum_D, squares_D = int(chosen_N.sum()), np.zeros(x_ND.shape[1]), np.zeros(x_ND.shape[1])
        for piece_ND in pieces_of(x_ND, chosen_N):
            sum_D += piece_ND.sum(0, dtype=np.float64)
        mean_D = sum_D / n
        for piece_ND in pieces_of(x_ND, chosen_N):
            squares_D += np.square(piece_ND - mean_D).sum(0)
        spread_D = np.sqrt(squares_D / n)
        varies_D = spread_D > 1e-6 * abs(mean_D)
        scale_D = np.divide(1.0, spread_D, out=np.zeros_like(spread_D), where=varies_D)
        z_ND = np.empty((n, x_ND.shape[1]), np.float32)
        for place, piece_ND in enumerate(pieces_of(x_ND, chosen_N)):
            start = place * ROWS_AT_ONCE
            z_ND[start : start + len(piece_ND)] = (piece_ND - mean_D) * scale_D
        return cls(z_ND, mean_D, scale_D)


def fit(features: Standard, y_N: NDArray[np.bool_], strengths: Sequence[float]) -> list[Probe]:
    """Fit probes by L2-penalised logistic regression, both classes weighing the same.

    Args:
        features: of the examples.
        y_N: the label; both values occur.
        strengths: inverse strengths of the penalty, scikit-learn's C, ascending: each fit begins at the last.

    Returns: a probe for each.
    """
    model = LogisticRegression(class_weight="balanced", max_iter=MOST_STEPS, warm_start=True)
    probes = []
    for strength in strengths:
        model.set_params(C=strength)
        if not (_converges(model, features.z_ND, y_N) or _converges(model, features.z_ND.astype(float), y_N)):
            say(f"a probe had not converged after {MOST_STEPS:,} steps; its AUC is that of the last one")
        weight_D = model.coef_[0].astype(np.float64) * features.scale_D
        probes.append(Probe(weight_D, float(model.intercept_[0]) - float(features.mean_D @ weight_D)))
    return probes


def _converges(model: LogisticRegression, z_ND: NDArray[Any], y_N: NDArray[np.bool_]) -> bool:
    """Fit a model, and tell whether it came to an end; in float32 the search may stall before."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(z_ND, y_N)
    return not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)


def best_threshold(score_N: NDArray[np.float64], y_N: NDArray[np.bool_]) -> tuple[float, float]:
    """Find the score from which on the label is told with the largest F1, and that F1.

    F1 is the harmonic mean of precision and recall.
    """
    order = np.argsort(-score_N, kind="stable")
    score_N, y_N = score_N[order], y_N[order]
    f1_N = 2 * np.cumsum(y_N) / (np.arange(1, len(y_N) + 1) + max(1, int(y_N.sum())))
    last_N = np.append(score_N[1:] < score_N[:-1], True)  # the last of equal scores
    best = int(np.argmax(np.where(last_N, f1_N, -1.0)))
    return float(score_N[best]), float(f1_N[best])

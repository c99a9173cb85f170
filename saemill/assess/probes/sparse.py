"""Probes on the k latents that tell a label best, after Gurnee et al. (2023, arXiv:2305.01610).

The latents are those with the largest |correlation| with the label, on the part that probes are fitted to.
Each result stands beside a probe on the activations themselves, the same probes on dictionaries that nobody
trained (random directions, and PCA of the same k), and probes for labels that were shuffled among the groups.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saemill.assess.probes.codes import Codes
from saemill.assess.probes.examples import TEST, TRAIN, VALIDATION, Examples
from saemill.assess.probes.labels import Label, shuffled
from saemill.assess.probes.probe import STRENGTHS, Estimate, Probe, Standard, area, fit

SHUFFLE_SEED = 7
LATENTS_AT_ONCE = 256
"""Number of latents whose activations are in memory in float64 at once."""
SPARSE_STRENGTH = 1.0
"""Inverse strength of the penalty on few latents, which hardly matters."""


@dataclass(frozen=True, slots=True)
class SparseResult:
    """What the best latents of one dictionary tell of one label."""

    label: str
    areas: dict[int, Estimate]
    """k → area."""
    latents: list[int]
    """The largest k latents, the best first."""
    shuffled: Estimate
    """Area of the largest k, of shuffled labels."""


@dataclass(frozen=True, slots=True)
class DenseResult:
    """What a probe on all of an activation tells of one label."""

    label: str
    probe: Probe
    area: Estimate
    chance_y_N: NDArray[np.bool_]
    """Shuffled labels, and below the probe for them with its area."""
    chance_probe: Probe
    chance_area: Estimate


def best_latents(
    codes: Codes, y_N: NDArray[np.bool_], chosen_N: NDArray[np.bool_], n: int, only_for: bool = False
) -> NDArray[np.int64]:
    """Rank latents by |correlation| with a label, the best first; those that never fire are left out.

    Args:
        codes: of all examples.
        y_N: the label.
        chosen_N: the examples that are fitted to.
        n: most latents.
        only_for: leave out those that speak against the label.
    """
    weight_2N = np.array([chosen_N, chosen_N & y_N], np.float64)
    total_F, products_F, squares_F = np.zeros((3, codes.shape[1]))
    for start in range(0, codes.shape[1], LATENTS_AT_ONCE):
        here = slice(start, start + LATENTS_AT_ONCE)
        some = codes[:, here].astype(np.float64)
        total_F[here], products_F[here] = weight_2N @ some
        squares_F[here] = weight_2N[0] @ some.power(2)
    n_with, n_all = int((y_N & chosen_N).sum()), int(chosen_N.sum())
    covariance_F = products_F - total_F * (n_with / n_all)
    spread_F = np.sqrt(np.maximum(squares_F - total_F**2 / n_all, 0))
    strength_F = np.divide(abs(covariance_F), spread_F, out=np.zeros_like(spread_F), where=spread_F > 0)
    if only_for:
        strength_F[covariance_F < 0] = 0
    best: NDArray[np.int64] = np.argsort(-strength_F, kind="stable")[:n]
    return np.array([latent for latent in best if strength_F[latent] > 0], np.int64)


def probe_sparsely(codes: Codes, label: Label, examples: Examples, ks: tuple[int, ...]) -> SparseResult:
    """Probe for a label with each number of latents.

    Args:
        codes: of all examples.
        label: one that can be probed for.
        examples: their groups and parts.
        ks: numbers of latents.
    """
    areas, best = _areas(codes, label.y_N, examples, ks)
    chance, _ = _areas(codes, shuffled(label, examples, SHUFFLE_SEED), examples, ks[-1:])
    return SparseResult(label.name, areas, best.tolist(), chance[ks[-1]])


def _areas(
    codes: Codes, y_N: NDArray[np.bool_], examples: Examples, ks: tuple[int, ...]
) -> tuple[dict[int, Estimate], NDArray[np.int64]]:
    """Probe with the best latents by each k; of a dictionary that has fewer, with all of them."""
    train, test = examples.part_N == TRAIN, examples.part_N == TEST
    best = best_latents(codes, y_N, train, max(ks))
    x_NK = codes[:, best].toarray()
    areas = {}
    for k in ks:
        score_N = np.zeros(int(test.sum()))
        if len(best):
            (probe,) = fit(Standard.of(x_NK[:, :k], train), y_N[train], (SPARSE_STRENGTH,))
            score_N = probe.score(x_NK[:, :k], test)
        areas[k] = area(score_N, y_N[test], examples.group_N[test], examples.n_groups)
    return areas, best


def probe_densely(
    features: Standard, x_ND: NDArray[np.float32], label: Label, examples: Examples
) -> DenseResult:
    """Probe for a label with the whole activation; the penalty is chosen on groups of their own.

    Args:
        features: of the examples that are fitted to.
        x_ND: activations of all.
        label: one that can be probed for.
        examples: their groups and parts.
    """
    y_N, chance_y_N = label.y_N, shuffled(label, examples, SHUFFLE_SEED)
    train = examples.part_N == TRAIN

    def on(part: int, probe: Probe, y_N: NDArray[np.bool_]) -> Estimate:
        here = examples.part_N == part
        return area(probe.score(x_ND, here), y_N[here], examples.group_N[here], examples.n_groups)

    probes = fit(features, y_N[train], STRENGTHS)
    areas = [on(VALIDATION, probe, y_N).value for probe in probes]
    best = int(np.argmax(areas))
    (chance,) = fit(features, chance_y_N[train], STRENGTHS[best : best + 1])
    return DenseResult(
        label.name,
        probes[best],
        on(TEST, probes[best], y_N),
        chance_y_N,
        chance,
        on(TEST, chance, chance_y_N),
    )

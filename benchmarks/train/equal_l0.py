"""Figures of SAEs at an L0 that none of them has exactly: between the two nearest of the same kind.

Where a penalty decides, L0 is what comes out; with thresholds it is near k. FVU and the like change about
linearly with log L0 between neighbours, so a figure and the ends of its interval are interpolated in that.
An SAE is left out if another has a lower FVU with no more active latents: too large a weight of a penalty can
raise both. Beyond the first and the last SAE, or across a gap, there is no figure.
"""

import math
from typing import Any, NamedTuple

NEAR = 1.05
"""A measured L0 that is no further off than this factor is taken as it is."""
MOST_GAP = 4.0
"""Largest factor between the L0 of two neighbours."""


class Point(NamedTuple):
    """One SAE as it was measured."""

    l0: float
    metrics: dict[str, Any]
    """Figures of an assessment, by name."""


class Found(NamedTuple):
    """Figures at an L0."""

    metrics: dict[str, Any]
    how: str
    """In words."""


def at(points: list[Point], l0: float) -> Found | None:
    """Find the figures at an L0; None where the points do not reach it."""
    points = best([point for point in points if point.l0 > 0])
    if not points:
        return None
    nearest = min(points, key=lambda point: abs(math.log(point.l0 / l0)))
    if abs(math.log(nearest.l0 / l0)) <= math.log(NEAR):
        return Found(nearest.metrics, f"measured at {nearest.l0:.1f}")
    below = [point for point in points if point.l0 < l0]
    above = [point for point in points if point.l0 > l0]
    if not below or not above or above[0].l0 / below[-1].l0 > MOST_GAP:
        return None
    low, high = below[-1], above[0]
    share = math.log(l0 / low.l0) / math.log(high.l0 / low.l0)
    metrics = {name: between(low.metrics[name], high.metrics[name], share) for name in low.metrics}
    return Found(metrics, f"between {low.l0:.1f} and {high.l0:.1f}")


def best(points: list[Point]) -> list[Point]:
    """Leave out what another point beats in both L0 and FVU. Returns: the others by L0."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point.l0, point.metrics["fvu"]["value"])):
        if not kept or point.metrics["fvu"]["value"] < kept[-1].metrics["fvu"]["value"]:
            kept.append(point)
    return kept


def between(low: dict[str, Any], high: dict[str, Any], share: float) -> dict[str, Any]:
    """Interpolate a figure and the ends of its interval; what one of the two lacks, the result lacks."""
    ends = {key: (low.get(key), high.get(key)) for key in ("value", "lo", "hi")}
    return {
        key: a + share * (b - a)
        for key, (a, b) in ends.items()
        if isinstance(a, int | float) and isinstance(b, int | float)
    }

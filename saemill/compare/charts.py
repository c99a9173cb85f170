"""Where the marks of the report's charts are, in pixels; `report.html` draws them as SVG."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SIZE = 44
"""Pixels of a square in the matrix."""
SKIPPED_BINS = 16
"""Bins of a histogram from -1 to 1 that the first bar sums: the axis begins at -0.2."""


@dataclass(frozen=True, slots=True)
class Cell:
    """Two dictionaries in the matrix."""

    x: int
    share: float


@dataclass(frozen=True, slots=True)
class Row:
    """One dictionary in the matrix."""

    name: str
    y: int
    cells: list[Cell]


@dataclass(frozen=True, slots=True)
class Square:
    """The matrix of every two dictionaries."""

    left: int
    width: int
    height: int
    rows: list[Row]
    size: int = SIZE


def square(names: Sequence[str], shares: Mapping[tuple[str, str], float]) -> Square | None:
    """Lay out the shared share of every two dictionaries as a matrix; None for a single pair.

    Args:
        names: of the dictionaries.
        shares: by two names, in one of both orders.
    """
    if len(names) < 3:
        return None
    left = 30 + 7 * max(map(len, names))
    rows = []
    for i, row in enumerate(names):
        known = [(j, shares.get((row, column), shares.get((column, row)))) for j, column in enumerate(names)]
        cells = [Cell(left + j * SIZE, share) for j, share in known if share is not None]
        rows.append(Row(row, i * SIZE, cells))
    return Square(left, left + len(names) * SIZE, len(names) * SIZE + 22, rows)


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a histogram."""

    x: str
    width: str
    y: str
    height: str


@dataclass(frozen=True, slots=True)
class Distribution:
    """The similarities of a pair's latents that were matched, beside those of chance."""

    name: str
    bars: list[Bar]
    chance_steps: str
    """Points of the outline of chance's histogram."""
    curve: str
    """Points of the share of latents above each threshold."""
    chance_curve: str


def distribution(name: str, matched: Mapping[str, Any], chance: Mapping[str, Any]) -> Distribution:
    """Lay out the marks of one pair.

    Args:
        name: of the pair.
        matched: its `histogram`, the number of latents in each bin, and its `shares` by threshold.
        chance: the same of what chance gives.
    """
    histograms = [matched["histogram"], chance["histogram"]]
    counts, by_chance = ([sum(h[: SKIPPED_BINS + 1]), *h[SKIPPED_BINS + 1 :]] for h in histograms)
    top, width = max(1, *counts, *by_chance), 270 / len(counts)
    bars = [
        Bar(
            x=f"{10 + i * width:.1f}",
            width=f"{width - 1:.1f}",
            y=f"{105 - 95 * n / top:.1f}",
            height=f"{95 * n / top:.1f}",
        )
        for i, n in enumerate(counts)
    ]
    steps = [
        f"{10 + (i + side) * width:.1f},{105 - 95 * n / top:.1f}"
        for i, n in enumerate(by_chance)
        for side in (0, 1)
    ]
    return Distribution(name, bars, " ".join(steps), _curve(matched["shares"]), _curve(chance["shares"]))


def _curve(shares: Mapping[str, float]) -> str:
    """Draw the points of the shares against the threshold, from 0.3 to 0.95."""
    return " ".join(
        f"{330 + (float(t) - 0.3) * 400:.0f},{105 - 95 * share:.1f}" for t, share in shares.items()
    )

"""Where the marks of the report's charts are, in pixels; `report.html` draws them as SVG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from saemill.common.page import PALETTE
from saemill.diff.latents import KINDS, MOST_IN_ERROR, MOST_IN_RECONSTRUCTION

WIDTH, HEIGHT, LEFT, BOTTOM = 600, 240, 46, 36
GREY = "#bbbbbb"
COLOURS = {
    "A only": PALETTE[0],
    "B only": PALETTE[1],
    "A by its norm": PALETTE[5],
    "B by its norm": PALETTE[4],
    "shared": PALETTE[2],
    "uneven": "#888888",
    "rare": GREY,
}


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar, or one piece of it."""

    x: str
    width: str
    y: str
    height: str
    colour: str


@dataclass(frozen=True, slots=True)
class Histogram:
    """Latents by a figure, kinds on top of each other; the height is the root of the number, so that few
    show beside many."""

    bars: list[Bar]
    y_ticks: list[tuple[str, str]]
    """y in pixels, and the number there."""
    x_ticks: list[tuple[str, str]]


def histogram(counts: Mapping[str, Sequence[int]], span: tuple[float, float]) -> Histogram:
    """Lay out the numbers of latents of each kind in bins of equal width over a span."""
    n_bins = len(next(iter(counts.values())))
    totals = [sum(of_kind[i] for of_kind in counts.values()) for i in range(n_bins)]
    most = max(1, *totals)
    room, width = HEIGHT - BOTTOM - 12, (WIDTH - LEFT - 12) / n_bins

    def y(count: float) -> float:
        return HEIGHT - BOTTOM - room * math.sqrt(count / most)

    bars = []
    for i in range(n_bins):
        below = 0
        for kind in reversed(KINDS):
            if n := counts[kind][i]:
                bars.append(
                    Bar(
                        x=f"{LEFT + i * width:.1f}",
                        width=f"{width - 1.5:.1f}",
                        y=f"{y(below + n):.1f}",
                        height=f"{y(below) - y(below + n):.1f}",
                        colour=COLOURS[kind],
                    )
                )
            below += n
    steps = sorted({0, *(round(most * share) for share in (0.04, 0.25, 0.5625, 1))})
    x_ticks = [
        (f"{LEFT + share * (WIDTH - LEFT - 12):.1f}", f"{span[0] + share * (span[1] - span[0]):g}")
        for share in (0, 0.25, 0.5, 0.75, 1)
    ]
    return Histogram(bars, [(f"{y(step):.1f}", f"{step:,}") for step in steps], x_ticks)


@dataclass(frozen=True, slots=True)
class Dot:
    """One latent."""

    x: str
    y: str
    colour: str
    title: str


@dataclass(frozen=True, slots=True)
class Scatter:
    """Latents of one side by their norm: ν on the error against ν on the reconstruction."""

    dots: list[Dot]
    box: tuple[str, str]
    """Right and top edge of the corner in which a latent is of one side alone."""
    x_ticks: list[tuple[str, str]]
    y_ticks: list[tuple[str, str]]


SPAN = (-0.25, 1.5)
"""Values of ν that the axes show; those beyond are drawn at the edge."""


def scatter(latents: Sequence[tuple[int, str, float, float]]) -> Scatter:
    """Lay out latents.

    Args:
        latents: number, kind, ν on the reconstruction, ν on the error.
    """

    def place(value: float, start: float, length: float) -> float:
        inside = min(max(value, SPAN[0]), SPAN[1])
        return start + length * (inside - SPAN[0]) / (SPAN[1] - SPAN[0])

    def x(value: float) -> str:
        return f"{place(value, LEFT, WIDTH - LEFT - 12):.1f}"

    def y(value: float) -> str:
        return f"{place(value, HEIGHT - BOTTOM, -(HEIGHT - BOTTOM - 12)):.1f}"

    dots = [
        Dot(x(made), y(error), COLOURS[kind], f"latent {number}: {made:.2f}, {error:.2f}")
        for number, kind, made, error in latents
    ]
    ticks = (0, 0.5, 1, 1.5)
    return Scatter(
        dots,
        (x(MOST_IN_RECONSTRUCTION), y(MOST_IN_ERROR)),
        [(x(t), f"{t:g}") for t in ticks],
        [(y(t), f"{t:g}") for t in ticks],
    )

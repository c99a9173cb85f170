"""Where the marks of the report's charts are, in pixels; `report.html` draws them as SVG."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saemill.assess.sums import Figure
from saemill.common.page import PALETTE
from saemill.common.sae.parts import place

WIDTH, HEIGHT, LEFT, BOTTOM = 560, 300, 70, 40
NEVER_COLOUR = "#999999"

Tick = tuple[float, str]
"""Pixel and label of a tick."""


@dataclass(frozen=True, slots=True)
class _LogAxis:
    """A logarithmic axis from `low` to `high`, drawn from pixel `start` to pixel `end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Compute the pixel of a value; values beyond the axis are drawn at its end."""
        clipped = min(max(value, self.low), self.high)
        share = math.log(clipped / self.low) / math.log(self.high / self.low)
        return round(self.start + (self.end - self.start) * share, 1)

    def ticks(self) -> list[float]:
        """List 1, 2 and 5 times powers of ten."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        return [m * 10.0**p for p in powers for m in (1, 2, 5) if self.low <= m * 10.0**p <= self.high]


@dataclass(frozen=True, slots=True)
class Mark:
    """A variant's figure against its L0."""

    x: float
    y: float
    ends: tuple[float, float] | None
    """Pixels of the ends of its interval's bar, if it has an interval."""


@dataclass(frozen=True, slots=True)
class Line:
    """The variants of one site, width and architecture, by L0."""

    name: str
    colour: str
    marks: list[Mark]


@dataclass(frozen=True, slots=True)
class Chart:
    """A metric against L0, both logarithmic."""

    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT


def against_l0(assessment: dict[str, Any], metric: str) -> Chart | None:
    """Lay out a metric against L0, one line per site, width and architecture;
    None if no variant has the figure."""
    series: dict[str, list[tuple[float, Figure]]] = {}
    for entry in assessment["variants"]:
        figure, l0 = entry["metrics"][metric], entry["metrics"]["l0"]["value"]
        if (figure["value"] or 0) > 0 and (l0 or 0) > 0:
            architecture = entry.get("architecture", "topk")
            kind = "" if architecture == "topk" else f" ({architecture})"
            name = f"{place(entry)}, {entry['num_latents']:,} latents{kind}"
            series.setdefault(name, []).append((l0, figure))
    if not series:
        return None
    xs = [l0 for points in series.values() for l0, _ in points]
    ys = [figure["value"] for points in series.values() for _, figure in points]
    x = _LogAxis(min(xs) / 1.3, max(xs) * 1.3, LEFT, WIDTH - 10)
    y = _LogAxis(min(ys) / 1.3, max(ys) * 1.3, HEIGHT - BOTTOM, 10)
    lines = []
    for i, (name, points) in enumerate(sorted(series.items())):
        by_l0 = sorted(points, key=lambda point: point[0])
        marks = [Mark(x.at(l0), y.at(figure["value"]), _ends(y, figure)) for l0, figure in by_l0]
        lines.append(Line(name, PALETTE[i % len(PALETTE)], marks))
    return Chart(
        x_ticks=[(x.at(tick), f"{tick:g}") for tick in x.ticks()],
        y_ticks=[(y.at(tick), f"{tick:.3g}") for tick in y.ticks()],
        lines=lines,
    )


def _ends(axis: _LogAxis, figure: Figure) -> tuple[float, float] | None:
    return None if figure.get("lo") is None else (axis.at(figure["lo"]), axis.at(figure["hi"]))


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a histogram."""

    x: float
    y: str
    height: str
    colour: str


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many latents of a variant fire how often."""

    name: str
    bars: list[Bar]
    labels: list[Tick]


def densities(assessment: dict[str, Any], densities: Mapping[str, NDArray[np.float64]]) -> list[Histogram]:
    """Lay out a histogram of log10 density per variant, never-firing latents in a bar of their own.

    Args:
        assessment: names the variants, in their order.
        densities: variant → share of tokens on which each latent fired, [F].
    """
    low = math.floor(math.log10(1 / max(2, assessment["data"]["n_tokens"])))
    edges = np.linspace(low, 0, 41)
    names = [entry["name"] for entry in assessment["variants"] if entry["name"] in densities]
    return [_histogram(name, densities[name], edges, low) for name in names]


def _histogram(name: str, density_F: NDArray[np.float64], edges: NDArray[np.float64], low: int) -> Histogram:
    counts, _ = np.histogram(np.log10(density_F[density_F > 0]), edges)
    never = int((density_F == 0).sum())
    top = max(1, counts.max(), never)

    def bar(x: float, n: int, colour: str) -> Bar:
        return Bar(x, f"{90 - 80 * n / top:.1f}", f"{80 * n / top:.1f}", colour)

    bars = [
        bar(10, never, NEVER_COLOUR),
        *(bar(30 + 6.5 * i, int(n), PALETTE[0]) for i, n in enumerate(counts)),
    ]
    return Histogram(name, bars, [(8, f"never {never}"), (60, f"1e{low}"), (278, "1")])

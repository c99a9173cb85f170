"""The report's charts, as SVG text: nothing to fetch, nothing to run."""

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saemill.assess.sums import Figure
from saemill.common.page import PALETTE

WIDTH, HEIGHT, LEFT, BOTTOM = 560, 300, 70, 40

Point = tuple[float, Figure]


@dataclass(frozen=True, slots=True)
class _LogAxis:
    """A logarithmic axis from `low` to `high`, drawn from pixel `start` to pixel `end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The pixel of a value; values beyond the axis are drawn at its end."""
        clipped = min(max(value, self.low), self.high)
        share = math.log(clipped / self.low) / math.log(self.high / self.low)
        return round(self.start + (self.end - self.start) * share, 1)

    def ticks(self) -> list[float]:
        """1, 2 and 5 times powers of ten."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        return [m * 10.0**p for p in powers for m in (1, 2, 5) if self.low <= m * 10.0**p <= self.high]


def against_l0(assessment: dict[str, Any], metric: str, title: str) -> str:
    """A metric against L0, both logarithmic, one line per site and width, bars for intervals.

    Returns: a section of the page; empty if no variant has the figure.
    """
    series: dict[str, list[Point]] = {}
    for entry in assessment["variants"]:
        figure, l0 = entry["metrics"][metric], entry["metrics"]["l0"]["value"]
        if (figure["value"] or 0) > 0 and (l0 or 0) > 0:
            series.setdefault(f"{entry['site']}, {entry['num_latents']:,} latents", []).append((l0, figure))
    if not series:
        return ""
    xs = [l0 for line in series.values() for l0, _ in line]
    ys = [figure["value"] for line in series.values() for _, figure in line]
    x = _LogAxis(min(xs) / 1.3, max(xs) * 1.3, LEFT, WIDTH - 10)
    y = _LogAxis(min(ys) / 1.3, max(ys) * 1.3, HEIGHT - BOTTOM, 10)
    marks, legend = _grid(x, y), []
    for i, (name, line) in enumerate(sorted(series.items())):
        colour = PALETTE[i % len(PALETTE)]
        marks += _line(x, y, sorted(line, key=lambda point: point[0]), colour)
        legend.append(f'<span style="color:{colour}">● {html.escape(name)}</span>')
    return (
        f"<h2>{title} against L0</h2><p>{' &nbsp; '.join(legend)}</p>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title} against L0">'
        f"{''.join(marks)}</svg>"
    )


def _grid(x: _LogAxis, y: _LogAxis) -> list[str]:
    marks = [f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 4}" text-anchor="middle">L0</text>']
    marks += [
        f'<text x="{x.at(tick)}" y="{HEIGHT - 22}" text-anchor="middle">{tick:g}</text>' for tick in x.ticks()
    ]
    for tick in y.ticks():
        level = y.at(tick)
        marks.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 10}" y1="{level}" y2="{level}"/>')
        marks.append(f'<text x="{LEFT - 6}" y="{level + 4}" text-anchor="end">{tick:.3g}</text>')
    return marks


def _line(x: _LogAxis, y: _LogAxis, line: list[Point], colour: str) -> list[str]:
    path = " ".join(f"{x.at(l0)},{y.at(figure['value'])}" for l0, figure in line)
    marks = [f'<polyline points="{path}" fill="none" stroke="{colour}"/>']
    for l0, figure in line:
        marks.append(f'<circle cx="{x.at(l0)}" cy="{y.at(figure["value"])}" r="4" fill="{colour}"/>')
        if figure.get("lo") is not None:
            ends = f'y1="{y.at(figure["lo"])}" y2="{y.at(figure["hi"])}"'
            place = f'x1="{x.at(l0)}" x2="{x.at(l0)}" {ends}'
            marks.append(f'<line {place} stroke="{colour}" stroke-width="2"/>')
    return marks


def densities(assessment: dict[str, Any], densities: Mapping[str, NDArray[np.float64]]) -> str:
    """A histogram of log10 density per variant, never-firing latents in a bar of their own."""
    low = math.floor(math.log10(1 / max(2, assessment["data"]["n_tokens"])))
    edges = np.linspace(low, 0, 41)
    figures = []
    for entry in assessment["variants"]:
        if entry["name"] not in densities:
            continue
        density = densities[entry["name"]]
        counts, _ = np.histogram(np.log10(density[density > 0]), edges)
        never = int((density == 0).sum())
        top = max(1, counts.max(), never)
        bars = [
            (10, never, "#999999"),
            *((30 + 6.5 * i, int(c), PALETTE[0]) for i, c in enumerate(counts)),
        ]
        rects = "".join(
            f'<rect x="{x}" width="5.5" y="{90 - 80 * n / top:.1f}" height="{80 * n / top:.1f}" fill="{c}"/>'
            for x, n, c in bars
        )
        labels = "".join(
            f'<text x="{x}" y="104">{text}</text>'
            for x, text in ((8, f"never {never}"), (60, f"1e{low}"), (278, "1"))
        )
        figures.append(
            f"<figure><figcaption>{html.escape(entry['name'])}</figcaption>"
            f'<svg viewBox="0 0 300 108" class="small">{rects}{labels}</svg></figure>'
        )
    return f"<h2>Firing density of the latents (log scale)</h2><div class='grid'>{''.join(figures)}</div>"

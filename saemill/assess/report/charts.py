"""Where the marks of a metric against L0 are, in units of the drawing; `marks.html` draws them as SVG.

Lines are told apart by colour, shape and dash together. Colours are architectures, shapes are widths (or
architectures too), dashes are sites, as far as there are enough of each; beyond that, and where there is one
architecture, all three change from line to line.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saemill.assess.report.compared import with_interval
from saemill.assess.verdict import groups
from saemill.common.sae.parts import place

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 360, 52, 14, 14, 40
N_COLOURS = 7
LEAST_TICKS = 4
SHAPES = ("circle", "square", "triangle", "diamond", "star", "down")
DASHES = ("", "7 4", "2 3", "9 3 2 3", "1 5")
METRICS = {"fvu": "FVU", "delta_ce": "ΔCE, nats per token"}
"""Metrics that are drawn."""
CONTROLS = {
    "together": "transcoders of one layer each, together",
    "random": "random dictionaries",
    "pca": "PCA",
    "frozen": "frozen decoders",
}

Tick = tuple[float, str]
"""Place and label of a tick."""
Entry = Mapping[str, Any]
Key = tuple[str, int, str]
"""Architecture, width and site of a line."""


@dataclass(frozen=True, slots=True)
class _LogAxis:
    """A logarithmic axis from `low` to `high`, drawn from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Compute the place of a value; values beyond the axis are drawn at its end."""
        clipped = min(max(value, self.low), self.high)
        share = math.log(clipped / self.low) / math.log(self.high / self.low)
        return round(self.start + (self.end - self.start) * share, 1)

    def ticks(self) -> list[float]:
        """List 1, 2 and 5 times powers of ten; further numbers where these are few."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        tried = [
            [m * 10.0**p for p in powers for m in numbers if self.low <= m * 10.0**p <= self.high]
            for numbers in ((1, 2, 5), (1, 2, 3, 5, 7), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9))
        ]
        return next((ticks for ticks in tried if len(ticks) >= LEAST_TICKS), tried[-1])


@dataclass(frozen=True, slots=True)
class Mark:
    """A variant's figure against its L0."""

    x: float
    y: float
    ends: tuple[float, float] | None
    """Ends of its interval's bar, if it has an interval."""
    title: str
    href: str
    """Place on the page where it is described; empty of a baseline."""
    best: bool


@dataclass(frozen=True, slots=True)
class Style:
    """How a line looks."""

    colour: str
    """Class of its colour."""
    shape: str
    dash: str


@dataclass(frozen=True, slots=True)
class Line:
    """The variants of one site, width and architecture, by L0; or baselines of a kind."""

    name: str
    style: Style
    marks: list[Mark]

    @property
    def path(self) -> str:
        """Points of the line."""
        return " ".join(f"{mark.x},{mark.y}" for mark in self.marks)


@dataclass(frozen=True, slots=True)
class Chart:
    """A metric against L0, both logarithmic."""

    title: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]


def against_l0(assessment: Mapping[str, Any], metric: str) -> Chart | None:
    """Lay out a metric against L0; None if no variant has the figure."""
    variants = list(enumerate(assessment["variants"]))
    drawn = [(i, entry) for i, entry in variants if _has(entry, metric)]
    controls = [entry for entry in assessment["controls"] if _has(entry, metric)]
    if not drawn:
        return None
    values = [entry["metrics"] for entry in [*(entry for _, entry in drawn), *controls]]
    x = _axis([m["l0"]["value"] for m in values], LEFT, WIDTH - RIGHT)
    y = _axis([m[metric]["value"] for m in values], HEIGHT - BOTTOM, TOP)
    first = {group[0]["name"] for group in groups(assessment["variants"]).values()}
    styles = styles_of([_key(entry) for _, entry in variants])
    lines = []
    for key, style in styles.items():
        own = [(f"#v{i}", entry["name"] in first, entry) for i, entry in drawn if _key(entry) == key]
        if own:
            lines.append(Line(_name(key, list(styles)), style, _marks(own, metric, x, y)))
    for kind, name in CONTROLS.items():
        own = [("", False, entry) for entry in controls if entry.get("control") == kind]
        if own:
            lines.append(Line(name, Style(f"{kind} hollow", "circle", "1 4"), _marks(own, metric, x, y)))
    return Chart(
        title=METRICS[metric],
        x_ticks=[(x.at(tick), f"{tick:g}") for tick in x.ticks()],
        y_ticks=[(y.at(tick), f"{tick:.3g}") for tick in y.ticks()],
        lines=lines,
    )


def _has(entry: Entry, metric: str) -> bool:
    """Tell whether a variant has a place on logarithmic axes."""
    return all((entry["metrics"][name]["value"] or 0) > 0 for name in (metric, "l0"))


def _axis(values: Sequence[float], start: float, end: float) -> _LogAxis:
    return _LogAxis(min(values) / 1.3, max(values) * 1.3, start, end)


def _key(entry: Entry) -> Key:
    return entry.get("architecture", "topk"), entry["num_latents"], str(place(entry))


def styles_of(keys: Sequence[Key]) -> dict[Key, Style]:
    """Choose how each line looks: no two alike, up to 210 of them."""
    lines = sorted(set(keys))
    axes: list[list[Any]] = [sorted({key[i] for key in lines}) for i in range(3)]
    fits = all(len(axis) <= n for axis, n in zip(axes, (N_COLOURS, len(SHAPES), len(DASHES)), strict=True))
    styles = {}
    for number, key in enumerate(lines):
        i, j, k = number, number, number
        if fits and len(axes[0]) > 1:
            i, j, k = (axis.index(value) for axis, value in zip(axes, key, strict=True))
            j = j if len(axes[1]) > 1 else i
        styles[key] = Style(f"c{i % N_COLOURS}", SHAPES[j % len(SHAPES)], DASHES[k % len(DASHES)])
    return styles


def _name(key: Key, keys: Sequence[Key]) -> str:
    """Name a line by what differs among the lines; by its architecture where nothing does."""
    architecture, width, site = key
    differs = [len({other[i] for other in keys}) > 1 for i in range(3)]
    words = [architecture] if differs[0] or not any(differs) else []
    words += [f"{width:,} latents"] if differs[1] else []
    words += [site] if differs[2] else []
    return ", ".join(words)


def _marks(own: Sequence[tuple[str, bool, Entry]], metric: str, x: _LogAxis, y: _LogAxis) -> list[Mark]:
    """Place the marks of a line, by L0."""
    marks = []
    for href, best, entry in sorted(own, key=lambda each: each[2]["metrics"]["l0"]["value"]):
        figure, l0 = entry["metrics"][metric], entry["metrics"]["l0"]
        known = figure.get("lo") is not None
        marks.append(
            Mark(
                x=x.at(l0["value"]),
                y=y.at(figure["value"]),
                ends=(y.at(max(figure["lo"], y.low)), y.at(figure["hi"])) if known else None,
                title=f"{entry['name']}: {METRICS[metric]} {with_interval(figure)}, L0 {l0['value']:.1f}",
                href=href,
                best=best,
            )
        )
    return marks

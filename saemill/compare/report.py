"""The comparison for people: a table for the terminal, and one HTML page with charts."""

import html
import io
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from saemill.common.log import console
from saemill.common.page import PALETTE, write_page

COLUMNS = (
    "mean max →", "←", "chance", "adjusted", "mutual", "chance", "match, mean", "chance", "shared", "chance",
)  # fmt: skip
GROUP_COLUMNS = ("differ in", "pairs", *(title for title in COLUMNS if title != "chance"))
CHANCE = {
    "same_covariance": "a random dictionary of B's covariance in place of B",
    "shifted_tokens": "B's codes of other tokens",
}
CHANCE_COLOUR = "#999999"


def cells(entry: dict[str, Any]) -> list[str]:
    """A pair's figures, in the order of `COLUMNS`; chance is that of the last kind, the harder one."""
    chance = list(entry["chance"].values())[-1]
    assigned, by_chance = entry["assignment"], chance["assignment"]
    adjusted = [list(way.values())[-1] for way in entry["mean_max_adjusted"]]
    values = [
        *entry["mean_max"],
        np.mean(chance["mean_max"]),
        None if None in adjusted else np.mean(adjusted),
        entry["mutual_nearest"]["share"],
        chance["mutual_nearest"]["share"],
        *((assigned["mean"], by_chance["mean"]) if assigned else (None, None)),
        *(figures["share_above"] for figures in (_shared(entry), _shared(chance))),
    ]
    return ["–" if value is None else f"{value:.3f}" for value in values]


def groups(comparison: dict[str, Any]) -> dict[str, list[list[str]]]:
    """Pairs by what their SAEs differ in: of each figure the mean and the range, as `cells` has them."""
    found: dict[str, list[list[str]]] = {}
    for entry in comparison["pairs"]:
        found.setdefault(", ".join(entry["differs_in"]) or "nothing", []).append(cells(entry))
    return dict(sorted(found.items()))


def _spread(values: tuple[str, ...]) -> str:
    """`0.132 (0.114–0.146)`."""
    if "–" in values:
        return "–"
    numbers = [float(value) for value in values]
    spread = f" ({min(numbers):.3f}–{max(numbers):.3f})" if len(numbers) > 1 else ""
    return f"{np.mean(numbers):.3f}{spread}"


def _group_rows(comparison: dict[str, Any]) -> list[list[str]]:
    """What differs, how many pairs, and the figures without those of chance."""
    kept = [i for i, title in enumerate(COLUMNS) if title != "chance"]
    rows = []
    for name, entries in groups(comparison).items():
        columns = list(zip(*entries, strict=True))
        rows.append([name, str(len(entries)), *(_spread(columns[i]) for i in kept)])
    return rows


def _shared(entry: dict[str, Any]) -> dict[str, Any]:
    """The one-to-one matching: the assignment, or mutual nearest latents."""
    chosen: dict[str, Any] = entry["assignment"] or entry["mutual_nearest"]
    return chosen


def legend(comparison: dict[str, Any]) -> list[str]:
    """What the columns mean."""
    told = comparison["settings"]
    similarity = {
        "decoder": "cosine of decoder rows",
        "encoder": "cosine of encoder rows",
        "activations": "correlation of codes",
    }[told["by"]]
    matching = "assigned one to one" if told["matching"] == "assignment" else "mutual nearest"
    chance = CHANCE[list(comparison["pairs"][0]["chance"])[-1]]
    lines = [
        f"similarity: {similarity}; mean max: mean over latents of the largest one to the other dictionary, "
        "→ from A, ← from B; adjusted: (mean max - chance) / (1 - chance)",
        f"mutual: share of latents that are each other's nearest; shared: {matching} and above "
        f"{told['threshold']:g}; shares are of the smaller dictionary; chance: {chance}",
    ]
    if told["acts"]:
        lines.append(
            f"latents active on {told['min_firings']} of {comparison['n_tokens']:,} held-out tokens or more"
        )
    return [*lines, *comparison["notes"]]


def table(comparison: dict[str, Any]) -> str:
    """The pairs as a text table."""
    shown = Table()
    for title in ("A", "B", "latents"):
        shown.add_column(title, no_wrap=True, justify="right" if title == "latents" else "left")
    for title in COLUMNS:
        shown.add_column(title, justify="right", no_wrap=True)
    for entry in comparison["pairs"]:
        shown.add_row(entry["a"], entry["b"], _sizes(entry), *cells(entry))
    by_difference = Table()
    for i, title in enumerate(GROUP_COLUMNS):
        by_difference.add_column(title, no_wrap=True, justify="right" if i else "left")
    for row in _group_rows(comparison):
        by_difference.add_row(*row)
    terminal = console(width=400, no_color=True, record=True, file=io.StringIO())
    terminal.print(shown)
    if len(comparison["pairs"]) > 1:
        terminal.print(by_difference)
    return "\n".join([terminal.export_text().rstrip(), *legend(comparison)])


def _sizes(entry: dict[str, Any]) -> str:
    a, b = entry["n_latents"]
    return f"{a:,}" if a == b else f"{a:,}/{b:,}"


def write_html(path: Path, comparison: dict[str, Any]) -> None:
    """The page: the table, all pairs as a matrix, each pair's distribution."""
    sections = [
        "<h1>saemill comparison</h1>",
        f"<ul class='notes'>{''.join(f'<li>{html.escape(line)}</li>' for line in legend(comparison))}</ul>",
        _groups_table(comparison),
        _table(comparison),
        _matrix(comparison),
        "<h2>Distributions</h2><p>Left: similarities of latents matched one to one, and (grey) those that "
        "chance gives. Right: the share of latents above each threshold.</p>",
        "<div class='grid'>",
        *(_figure(entry) for entry in comparison["pairs"]),
        "</div>",
    ]
    write_page(path, "saemill comparison", sections)


def _groups_table(comparison: dict[str, Any]) -> str:
    if len(comparison["pairs"]) < 2:
        return ""
    head = "".join(f"<th>{title}</th>" for title in GROUP_COLUMNS)
    rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in _group_rows(comparison))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<h2>By what two SAEs differ in: mean (range)</h2><table><tr>{head}</tr>{body}</table>"


def _table(comparison: dict[str, Any]) -> str:
    head = "".join(f"<th>{title}</th>" for title in ("A", "B", "latents", *COLUMNS))
    rows = []
    for entry in comparison["pairs"]:
        names = "".join(f"<td class='name text'>{html.escape(entry[side])}</td>" for side in ("a", "b"))
        figures = "".join(f"<td>{cell}</td>" for cell in (_sizes(entry), *cells(entry)))
        rows.append(f"<tr>{names}{figures}</tr>")
    return f"<h2>Every pair</h2><table style='font-size:82%'><tr>{head}</tr>{''.join(rows)}</table>"


def _matrix(comparison: dict[str, Any]) -> str:
    """The shared share of every two dictionaries, as a square; nothing for a single pair."""
    names = [dictionary["name"] for dictionary in comparison["dictionaries"]]
    if len(names) < 3:
        return ""
    size, left = 44, 30 + 7 * max(map(len, names))
    shared = {(e["a"], e["b"]): _shared(e)["share_above"] for e in comparison["pairs"]}
    marks = []
    for i, row in enumerate(names):
        y = i * size
        marks.append(f'<text x="{left - 6}" y="{y + 27}" text-anchor="end">{html.escape(row)} {i + 1}</text>')
        marks.append(
            f'<text x="{left + y + 22}" y="{len(names) * size + 16}" text-anchor="middle">{i + 1}</text>'
        )
        for j, column in enumerate(names):
            value = shared.get((row, column), shared.get((column, row)))
            if value is None:
                continue
            ink = "#fff" if value > 0.5 else "#222"
            x = left + j * size
            marks.append(
                f'<rect x="{x}" y="{y}" width="{size - 2}" height="{size - 2}" fill="{PALETTE[0]}" '
                f'fill-opacity="{value:.3f}" stroke="#ccc"/>'
                f'<text x="{x + 21}" y="{y + 26}" text-anchor="middle" fill="{ink}">{value:.2f}</text>'
            )
    width, height = left + len(names) * size, len(names) * size + 22
    return (
        f"<h2>Shared latents</h2><svg viewBox='0 0 {width} {height}' style='max-width:{width}px' role='img' "
        f"aria-label='Share of latents above the threshold, every two dictionaries'>{''.join(marks)}</svg>"
    )


def _figure(entry: dict[str, Any]) -> str:
    chance = list(entry["chance"].values())[-1]
    found, random = _shared(entry), _shared(chance)
    caption = f"{html.escape(entry['a'])} – {html.escape(entry['b'])}"
    return (
        f"<figure style='width:600px'><figcaption>{caption}</figcaption><svg viewBox='0 0 600 130'>"
        f"{_histogram(found['histogram'], random['histogram'])}{_curve(found['shares'], random['shares'])}"
        "</svg></figure>"
    )


def _histogram(found: list[int], random: list[int]) -> str:
    """Bars of what was found, an outline of chance; the axis begins at -0.2, with what is below it there."""
    skip = 16
    counts, by_chance = ([sum(h[: skip + 1]), *h[skip + 1 :]] for h in (found, random))
    top, width = max(1, *counts, *by_chance), 270 / len(counts)
    bars = "".join(
        f'<rect x="{10 + i * width:.1f}" width="{width - 1:.1f}" y="{105 - 95 * n / top:.1f}" '
        f'height="{95 * n / top:.1f}" fill="{PALETTE[0]}"/>'
        for i, n in enumerate(counts)
    )
    steps = " ".join(
        f"{10 + (i + side) * width:.1f},{105 - 95 * n / top:.1f}"
        for i, n in enumerate(by_chance)
        for side in (0, 1)
    )
    labels = "".join(
        f'<text x="{10 + (value + 0.2) * 225:.0f}" y="120" text-anchor="middle">{value:g}</text>'
        for value in (0, 0.25, 0.5, 0.75, 1)
    )
    return (
        f'{bars}<polyline points="{steps}" fill="none" stroke="{CHANCE_COLOUR}" stroke-width="1.5"/>{labels}'
    )


def _curve(found: dict[str, float], random: dict[str, float]) -> str:
    """The shares against the threshold, from 0.3 to 0.95."""

    def line(shares: dict[str, float], colour: str) -> str:
        points = " ".join(
            f"{330 + (float(t) - 0.3) * 400:.0f},{105 - 95 * share:.1f}" for t, share in shares.items()
        )
        return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'

    marks = [
        f'<line class="grid" x1="330" x2="590" y1="{105 - 95 * y}" y2="{105 - 95 * y}"/>'
        f'<text x="326" y="{109 - 95 * y}" text-anchor="end">{y:g}</text>'
        for y in (0, 0.5, 1)
    ]
    marks += [
        f'<text x="{330 + (t - 0.3) * 400:.0f}" y="120" text-anchor="middle">{t:g}</text>'
        for t in (0.3, 0.5, 0.7, 0.9)
    ]
    return "".join([*marks, line(random, CHANCE_COLOUR), line(found, PALETTE[0])])

"""The comparison for people: a table for the terminal, and one HTML page with charts."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from saemill.common.log import console
from saemill.common.page import write_page
from saemill.compare import charts

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
    """Format a pair's figures in the order of `COLUMNS`. Chance is that of the last kind, the harder one."""
    chance = list(entry["chance"].values())[-1]
    assigned, by_chance = entry["assignment"], chance["assignment"]
    adjusted = [list(direction.values())[-1] for direction in entry["mean_max_adjusted"]]
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
    """Group pairs by what their SAEs differ in, each pair as `cells` formats it."""
    by_difference: dict[str, list[list[str]]] = {}
    for entry in comparison["pairs"]:
        by_difference.setdefault(", ".join(entry["differs_in"]) or "nothing", []).append(cells(entry))
    return dict(sorted(by_difference.items()))


def _spread(values: tuple[str, ...]) -> str:
    """Format the mean and the range, `0.132 (0.114–0.146)`."""
    if "–" in values:
        return "–"
    numbers = [float(value) for value in values]
    spread = f" ({min(numbers):.3f}–{max(numbers):.3f})" if len(numbers) > 1 else ""
    return f"{np.mean(numbers):.3f}{spread}"


def _group_rows(comparison: dict[str, Any]) -> list[list[str]]:
    """List what differs, how many pairs, and the figures without those of chance."""
    shown = [i for i, title in enumerate(COLUMNS) if title != "chance"]
    rows = []
    for name, entries in groups(comparison).items():
        columns = list(zip(*entries, strict=True))
        rows.append([name, str(len(entries)), *(_spread(columns[i]) for i in shown)])
    return rows


def _shared(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the one-to-one matching: the assignment, or mutual nearest latents."""
    chosen: dict[str, Any] = entry["assignment"] or entry["mutual_nearest"]
    return chosen


def legend(comparison: dict[str, Any]) -> list[str]:
    """Explain what the columns mean."""
    settings = comparison["settings"]
    similarity = {
        "decoder": "cosine of decoder rows",
        "encoder": "cosine of encoder rows",
        "activations": "correlation of codes",
    }[settings["by"]]
    matching = "assigned one to one" if settings["matching"] == "assignment" else "mutual nearest"
    chance = CHANCE[list(comparison["pairs"][0]["chance"])[-1]]
    lines = [
        f"similarity: {similarity}; mean max: mean over latents of the largest one to the other dictionary, "
        "→ from A, ← from B; adjusted: (mean max - chance) / (1 - chance)",
        f"mutual: share of latents that are each other's nearest; shared: {matching} and above "
        f"{settings['threshold']:g}; shares are of the smaller dictionary; chance: {chance}",
    ]
    if settings["acts"]:
        lines.append(
            f"latents active on {settings['min_firings']} of {comparison['n_tokens']:,} held-out tokens "
            "or more"
        )
    return [*lines, *comparison["notes"]]


STABILITY_COLUMNS = ("SAE", "latents", "in no other seed", "in some", "in all", "by chance in one")


def stability(comparison: dict[str, Any]) -> list[list[str]]:
    """List how stable each SAE's latents are across seeds, as shares; nothing where there is one seed."""
    rows = []
    for entry in comparison["stability"]:
        first, *some, last = entry["found_in"]
        shares = [n / entry["n_latents"] for n in (first, sum(some), last)]
        cells = [f"{share:.3f}" for share in (*shares, entry["by_chance"])]
        if entry["n_others"] == 1:
            cells[1] = "–"
        rows.append([entry["dictionary"], f"{entry['n_latents']:,}", *cells])
    return rows


def table(comparison: dict[str, Any]) -> str:
    """Render the pairs as a text table."""
    shown = Table()
    for title in ("A", "B", "latents"):
        shown.add_column(title, no_wrap=True, justify="right" if title == "latents" else "left")
    for title in COLUMNS:
        shown.add_column(title, justify="right", no_wrap=True)
    for entry in comparison["pairs"]:
        shown.add_row(entry["a"], entry["b"], _sizes(entry), *cells(entry))
    terminal = console(width=400, no_color=True, record=True, file=io.StringIO())
    terminal.print(shown)
    if len(comparison["pairs"]) > 1:
        terminal.print(_table("", GROUP_COLUMNS, _group_rows(comparison)))
    if comparison["stability"]:
        title = "latents that are found again in SAEs of other seeds"
        terminal.print(_table(title, STABILITY_COLUMNS, stability(comparison)))
    return "\n".join([terminal.export_text().rstrip(), *legend(comparison)])


def _table(title: str, columns: tuple[str, ...], rows: list[list[str]]) -> Table:
    """Lay out rows whose first column is a name."""
    shown = Table(title=title or None)
    for i, column in enumerate(columns):
        shown.add_column(column, no_wrap=True, justify="right" if i else "left")
    for row in rows:
        shown.add_row(*row)
    return shown


def _sizes(entry: dict[str, Any]) -> str:
    a, b = entry["n_latents"]
    return f"{a:,}" if a == b else f"{a:,}/{b:,}"


def write_html(path: Path, comparison: dict[str, Any]) -> None:
    """Write the page: the table, all pairs as a matrix, each pair's distribution."""
    pairs = comparison["pairs"]
    write_page(
        path,
        "compare/report.html",
        legend=legend(comparison),
        group_columns=GROUP_COLUMNS,
        groups=_group_rows(comparison) if len(pairs) > 1 else [],
        stability_columns=STABILITY_COLUMNS,
        stability=stability(comparison),
        columns=COLUMNS,
        pairs=[{"a": e["a"], "b": e["b"], "cells": [_sizes(e), *cells(e)]} for e in pairs],
        square=charts.square([d["name"] for d in comparison["dictionaries"]], _shares(pairs)),
        figures=[_distribution(entry) for entry in pairs],
        chance_colour=CHANCE_COLOUR,
    )


def _shares(pairs: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """Map the names of every two dictionaries to their shared share."""
    return {(entry["a"], entry["b"]): _shared(entry)["share_above"] for entry in pairs}


def _distribution(entry: dict[str, Any]) -> charts.Distribution:
    """Lay out a pair's similarities beside those of chance."""
    chance = list(entry["chance"].values())[-1]
    return charts.distribution(f"{entry['a']} – {entry['b']}", _shared(entry), _shared(chance))

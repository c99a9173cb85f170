"""The SAEs, one by one: the table's rows, how often their latents fire, where they err."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saemill.assess.dense import DENSE
from saemill.assess.report import contexts
from saemill.assess.report.bars import Bar, bars
from saemill.assess.report.compared import outcome, with_interval
from saemill.assess.report.contexts import Shown
from saemill.assess.report.visible import visible
from saemill.assess.sums import number
from saemill.assess.table import by_source, cuts, interval
from saemill.common.sae.parts import place

PER_DECADE = 8
"""Bars per power of ten of density."""
GROUPS = {"position": "FVU by position in the row", "length": "FVU by length of the activation"}


@dataclass(frozen=True, slots=True)
class Small:
    """A small chart: bars between two labels."""

    title: str
    bars: list[Bar]
    left: str
    right: str
    top: str = ""
    """What the highest bar is."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A figure in the table."""

    shown: str
    interval: str
    value: float | None
    """What it is sorted by."""
    bad: bool


@dataclass(frozen=True, slots=True)
class Row:
    """One SAE in the table, and its section."""

    id: str
    entry: Mapping[str, Any]
    outcome: str
    cells: list[Cell]
    site: str
    density: Small | None
    counts: str
    """Sentence on dead and dense latents."""
    errors: list[Small]
    norms: list[Small]
    """Of a crosscoder, how much its latents write to each site."""
    seeds: Small | None
    """In how many SAEs of other seeds its latents are found."""
    cuts: list[list[str]]
    """Titles of the columns, and below them the rows; likewise by source."""
    by_source: list[list[str]]
    worst: list[Shown]


def rows(
    entries: list[Mapping[str, Any]],
    columns: Mapping[str, str],
    densities: Mapping[str, NDArray[np.float64]],
    data: Mapping[str, Any],
) -> list[Row]:
    """Lay out some variants.

    Args:
        entries: the variants, in order.
        columns: metrics of the table.
        densities: variant → share of tokens on which each latent fired, [F].
        data: what was measured on.
    """
    return [
        Row(
            id=f"v{i}",
            entry=entry,
            outcome=outcome(entry),
            cells=_cells(entry, columns),
            site=str(place(entry)),
            density=_density(densities[entry["name"]], data) if entry["name"] in densities else None,
            counts=_counts(entry, densities.get(entry["name"]), data),
            errors=_errors(entry),
            norms=[_norms(site, counts) for site, counts in entry.get("norm_shares", {}).items()],
            seeds=_seeds(entry["found_in_seeds"]) if entry.get("found_in_seeds") else None,
            cuts=[row[1:] for row in cuts([entry])],
            by_source=[row[1:] for row in by_source([entry])],
            worst=[_worst(token["times"], token["place"]) for token in entry.get("worst", ())],
        )
        for i, entry in enumerate(entries)
    ]


def _worst(times: float, place: Mapping[str, Any]) -> Shown:
    """Show a token on which an SAE errs."""
    number = f"{times:.0f}×" if times >= 10 else f"{times:.1f}×"
    if "tokens" not in place:
        return contexts.of_passage(number, str(place["id"] or place["address"]), place["text"])
    tokens = place["tokens"]
    return contexts.of_tokens(number, place["source"], tokens, place["at"], [0.0] * len(tokens), 1.0)


def _cells(entry: Mapping[str, Any], columns: Mapping[str, str]) -> list[Cell]:
    failed = {check["metric"] for check in entry["evidence"] if check["passed"] is False}
    figures = {name: entry["metrics"].get(name, {"value": None}) for name in columns}
    return [
        Cell(number(figure), interval(figure), figure["value"], name in failed)
        for name, figure in figures.items()
    ]


def _density(density_F: NDArray[np.float64], data: Mapping[str, Any]) -> Small:
    """Draw how many latents fire how often, from once in all tokens to always; dead and dense ones apart."""
    decades = math.ceil(math.log10(max(2, data["n_tokens"])))
    edges = np.logspace(-decades, 0, decades * PER_DECADE + 1)
    fires = np.clip(density_F[density_F > 0], edges[0], 1)
    counts, _ = np.histogram(fires, edges)
    never = int((density_F == 0).sum())
    dead = data["dead_percentage_threshold"]
    kinds = ["dead", *(_kind(low, high, dead) for low, high in pairwise(edges.tolist()))]
    titles = [f"{never:,} never fired"]
    titles += [
        f"{count:,} latents fire on {low:.2g} to {high:.2g} of the {data['unit']}s"
        for count, (low, high) in zip(counts.tolist(), pairwise(edges.tolist()), strict=True)
    ]
    return Small(
        title=f"latents by share of {data['unit']}s (log)",
        bars=bars([never, *counts.tolist()], titles, kinds),
        left="never",
        right="always",
        top=f"{max(never, int(counts.max())):,}",
    )


def _kind(low: float, high: float, dead: float) -> str:
    """Tell whether latents with densities between two are dead or dense, or neither, by the middle."""
    middle = math.sqrt(low * high)
    return "dense" if middle > DENSE else "dead" if middle < dead else ""


def _counts(entry: Mapping[str, Any], density_F: NDArray[np.float64] | None, data: Mapping[str, Any]) -> str:
    """Say how many latents are dead, and how many dense."""
    metrics = entry["metrics"]
    if density_F is None or metrics.get("dead_fraction", {}).get("value") is None:
        return ""
    text = (
        f"{metrics['dead_fraction']['value']:.1%} of {len(density_F):,} latents are dead (on fewer than "
        f"{data['dead_percentage_threshold']:.2%} of the {data['unit']}s), "
        f"{metrics['never_fired']['value']:.1%} never fired; {metrics['dense_fraction']['value']:.1%} are "
        f"dense (on more than {DENSE:.0%})"
    )
    share = metrics["dense_share"]["value"]
    return text + (f", and make {share:.1%} of all firings." if share is not None else ".")


def _errors(entry: Mapping[str, Any]) -> list[Small]:
    """Draw FVU by groups of tokens and by source."""
    charts = []
    for by, title in GROUPS.items():
        groups = [group for group in entry.get("groups", ()) if group["by"] == by and group["n_tokens"]]
        if len(groups) > 1:
            titles = [f"{g['label']}: FVU {_fvu(g['fvu'])}, {g['n_tokens']:,} tokens" for g in groups]
            charts.append(_small(title, [g["fvu"] for g in groups], titles, [g["label"] for g in groups]))
    by_name = {name: metrics["fvu"] for name, metrics in (entry.get("by_source") or {}).items()}
    known = {name: figure for name, figure in by_name.items() if figure["value"] is not None}
    if len(known) > 1:
        titles = [f"{visible(name)}: FVU {with_interval(figure)}" for name, figure in known.items()]
        charts.append(_small("FVU by source", [f["value"] for f in known.values()], titles, ["", ""]))
    return charts


def _norms(site: str, counts: list[int]) -> Small:
    """Draw the latents by a site's share in their decoder rows."""
    edges = pairwise(np.linspace(0, 1, len(counts) + 1))
    titles = [f"{n:,} latents: {low:.0%} to {high:.0%}" for n, (low, high) in zip(counts, edges, strict=True)]
    title = f"live latents by the share of {visible(site)} in their decoder row"
    return Small(title, bars(counts, titles), "0%", "100%", f"{max(counts):,}")


def _seeds(counts: list[int]) -> Small:
    """Draw the latents by the number of other seeds in which they are found."""
    n, total = len(counts) - 1, max(1, sum(counts))
    titles = [
        f"{count:,} latents ({count / total:.0%}) in {i} of {n} other seeds" for i, count in enumerate(counts)
    ]
    return Small(
        "live latents by other seeds that have them", bars(counts, titles), "none", "all", f"{max(counts):,}"
    )


def _small(title: str, values: list[float | None], titles: list[str], labels: list[str]) -> Small:
    largest = max((value for value in values if value is not None), default=0.0)
    return Small(
        title, bars(values, titles), visible(labels[0], 16), visible(labels[-1], 16), f"{largest:.3g}"
    )


def _fvu(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"

"""The results of a matrix: each cell over its seeds, and how alike the dictionaries are."""

import io
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.table import Column, Table

from saemill.common import config as settings
from saemill.common import durable
from saemill.common.log import console, say
from saemill.common.stores import assessments
from saemill.compare.config import CompareConfig
from saemill.compare.run import run as compare

METRICS = ("fvu", "delta_ce", "loss_recovered", "dead_fraction")
OVER = {
    "seeds": ("seed",),
    "sources_and_seeds": ("dataset", "seed"),
    "sources": ("dataset",),
}
"""Traits in which two SAEs differ. SAEs of one seed begin alike, so the effect of a source is the second
beside the first, not the third."""


@dataclass(frozen=True, slots=True)
class Cell:
    """SAEs of one kind, of one target trained on one source: one per seed."""

    target: str
    source: str
    kind: str
    """The variants' name without their seed: site, k, latents, and what else tells them apart."""


def write(
    out: Path,
    assessed: Mapping[str, Path | None],
    failed: Mapping[str, str],
    comparing: Mapping[str, Any] | None,
) -> None:
    """Sum up the pairs that are done: `matrix.json` and a table; comparisons below `compare`.

    Args:
        out: the matrix's folder.
        assessed: the folder of each pair's assessment by its name, `<target>--<source>`; None for pairs
            that are not done.
        failed: why pairs failed.
        comparing: settings of `CompareConfig` to match the dictionaries of different seeds and sources;
            None leaves it.
    """
    cells = _cells(assessed)
    summary: dict[str, Any] = {
        "cells": [
            {
                "target": cell.target,
                "source": cell.source,
                "kind": cell.kind,
                "n_seeds": len(entries),
                "metrics": {name: _spread(entries, name) for name in METRICS},
                "saes": [f"runs/{cell.target}--{cell.source}/{entry['name']}" for entry in entries],
            }
            for cell, entries in cells.items()
        ],
        "failed": dict(failed),
        "missing": [name for name, folder in assessed.items() if folder is None],
        "comparisons": None,
    }
    durable.write_json(out / "matrix.json", summary)  # also if the comparisons fail
    if comparing is not None:
        summary["comparisons"] = _compare(out, summary["cells"], comparing)
        durable.write_json(out / "matrix.json", summary)
    say(_text(summary))
    say(
        f"{out / 'matrix.json'} written"
        + (f"; not done: {', '.join(m)}" if (m := summary["missing"]) else "")
    )


def _cells(assessed: Mapping[str, Path | None]) -> dict[Cell, list[dict[str, Any]]]:
    """Group the assessments of the pairs that are done, seeds together."""
    cells: dict[Cell, list[dict[str, Any]]] = defaultdict(list)
    for name, folder in assessed.items():
        if folder is None:
            continue
        target, source = name.split("--")
        assessment = assessments.read(folder)
        frozen = [entry for entry in assessment["controls"] if entry.get("control") == "frozen"]
        entries = [*assessment["variants"], *frozen]
        for entry in sorted(entries, key=lambda entry: str(entry["name"])):
            if entry["not_measured"] is None:
                kind = re.sub(r"-s\d+(?=-|$)", "", entry["name"])
                cells[Cell(target, source, kind)].append(entry)
    return dict(cells)


def _spread(entries: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """Compute the mean over seeds and their standard deviation. Where a seed lacks the figure both are None,
    with the reason; the deviation is None where there is one seed."""
    figures = [entry["metrics"][metric] for entry in entries]
    values = [figure["value"] for figure in figures]
    if any(value is None for value in values):
        reasons = dict.fromkeys(figure["reason"] for figure in figures if figure["value"] is None)
        return {"mean": None, "sd": None, "reason": "; ".join(reasons)}
    return {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else None}


def _compare(out: Path, cells: list[dict[str, Any]], comparing: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Match the SAEs of one kind of one target with one another over seeds and sources."""
    families: dict[tuple[str, str], list[str]] = defaultdict(list)
    for cell in cells:
        families[cell["target"], cell["kind"]] += cell["saes"]
    comparisons = []
    for (target, kind), saes in families.items():
        if len(saes) < 2:
            continue
        folder = Path("compare") / f"{target}-{kind}"
        section = {**comparing, "saes": [out / name for name in saes], "out": out / folder}
        config = settings.build(CompareConfig, section, "compare")
        pairs = compare(config)["pairs"]
        comparisons.append(
            {
                "target": target,
                "kind": kind,
                "folder": str(folder),
                "threshold": config.threshold,
                "by": config.by,
                "matching": config.matching,
                "shared": {over: _shared(pairs, over) for over in OVER},
            }
        )
    return comparisons


def _shared(pairs: list[dict[str, Any]], over: str) -> float | None:
    """Compute the mean share of shared latents, of pairs that differ in the source, the seed or both
    alone."""
    sources, seeds = ("dataset" in OVER[over], "seed" in OVER[over])
    values = [
        (pair["assignment"] or pair["mutual_nearest"])["share_above"]
        for pair in pairs
        if (_sources_differ(pair), "seed" in pair["differs_in"]) == (sources, seeds)
    ]
    return mean(values) if values else None


def _sources_differ(pair: dict[str, Any]) -> bool:
    return Path(pair["a"]).parent != Path(pair["b"]).parent


def _text(summary: dict[str, Any]) -> str:
    figures = (Column(name, no_wrap=True) for name in ("seeds", *METRICS))
    table = Table("target", "source", _folding("SAEs"), *figures, title="mean ± sd over seeds")
    for cell in summary["cells"]:
        values = (_figure(**cell["metrics"][name]) for name in METRICS)
        table.add_row(cell["target"], cell["source"], cell["kind"], str(cell["n_seeds"]), *values)
    tables = [table]
    if comparisons := summary["comparisons"]:
        by, threshold = comparisons[0]["by"], comparisons[0]["threshold"]
        how = {"assignment": "matched one to one", "nearest": "mutual nearest"}[comparisons[0]["matching"]]
        alike = Table(
            "target", _folding("SAEs"), *(f"other {name.replace('_', ' ')}" for name in OVER),
            _folding("report"),
            title=f"share of latents that are {how} with a similarity ({by}) above {threshold:g}",
        )  # fmt: skip
        for entry in comparisons:
            shares = ("–" if share is None else f"{share:.1%}" for share in entry["shared"].values())
            alike.add_row(entry["target"], entry["kind"], *shares, f"{entry['folder']}/report.html")
        tables.append(alike)
    terminal = console(width=150, no_color=True, record=True, file=io.StringIO())
    terminal.print(*tables, sep="\n")
    return "\n".join([terminal.export_text().rstrip(), *_reasons(summary)])


def _folding(title: str) -> Column:
    """Make a column whose long names take lines, and not the figures' room."""
    return Column(title, overflow="fold")


def _reasons(summary: dict[str, Any]) -> list[str]:
    """Say why figures of the table are missing."""
    lines = (
        f"no {name} of {cell['target']}, {cell['source']}, {cell['kind']}: {cell['metrics'][name]['reason']}"
        for cell in summary["cells"]
        for name in METRICS
        if cell["metrics"][name]["mean"] is None
    )
    return list(dict.fromkeys(lines))


def _figure(mean: float | None, sd: float | None, reason: str | None = None) -> str:
    if mean is None or reason is not None:
        return "–"
    return f"{mean:.4g}" if sd is None else f"{mean:.4g} ± {sd:.2g}"

"""What a matrix comes to: each cell over its seeds, and how alike the dictionaries are."""

import io
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from saemill.common import durable
from saemill.common.log import say
from saemill.compare.run import CompareConfig
from saemill.compare.run import run as compare

METRICS = ("fvu", "delta_ce", "loss_recovered", "dead_fraction")
OVER = {
    "seeds": ("seed",),
    "sources_and_seeds": ("dataset", "seed"),
    "sources": ("dataset",),
}
"""In what two SAEs differ. Those of one seed begin alike, so what a source changes is told by the second
beside the first, not by the third."""


@dataclass(frozen=True, slots=True)
class Cell:
    """SAEs of one shape at one site of one target, trained on one source: one per seed."""

    target: str
    source: str
    site: str
    k: int
    num_latents: int

    @property
    def family(self) -> tuple[str, str, int, int]:
        """What cells of different sources have in common."""
        return self.target, self.site, self.k, self.num_latents


def write(out: Path, pairs: list[str], comparing: bool) -> None:
    """Sum up the pairs that are done: `matrix.json` and a table; comparisons below `compare`.

    Args:
        out: the matrix's folder.
        pairs: names of all pairs, `<target>--<source>`.
        comparing: match the dictionaries of different seeds and sources.
    """
    cells = _cells(out, pairs)
    found: dict[str, Any] = {
        "cells": [
            {
                **{name: getattr(cell, name) for name in ("target", "source", "site", "k", "num_latents")},
                "n_seeds": len(entries),
                "metrics": {name: _spread(entries, name) for name in METRICS},
                "saes": [f"runs/{cell.target}--{cell.source}/{entry['name']}" for entry in entries],
            }
            for cell, entries in cells.items()
        ],
        "missing": [name for name in pairs if not (out / "runs" / f"{name}.done.json").exists()],
    }
    found["comparisons"] = _compare(out, found["cells"]) if comparing else None
    durable.write_json(out / "matrix.json", found)
    say(_text(found))
    say(f"{out / 'matrix.json'} written" + (f"; not done: {', '.join(m)}" if (m := found["missing"]) else ""))


def _cells(out: Path, pairs: Iterable[str]) -> dict[Cell, list[dict[str, Any]]]:
    """The assessments of the pairs that are done, seeds together."""
    cells: dict[Cell, list[dict[str, Any]]] = defaultdict(list)
    for name in pairs:
        if not (out / "runs" / f"{name}.done.json").exists():
            continue
        target, source = name.split("--")
        entries = durable.read_json(out / "runs" / name / "final_assessment.json")["variants"]
        for entry in sorted(entries, key=lambda entry: str(entry["name"])):
            if entry["not_measured"] is None:
                cell = Cell(target, source, entry["site"], entry["k"], entry["num_latents"])
                cells[cell].append(entry)
    return dict(cells)


def _spread(entries: list[dict[str, Any]], metric: str) -> dict[str, float | None]:
    """Mean over seeds and their standard deviation; None where it was not measured or there is one seed."""
    values = [entry["metrics"][metric]["value"] for entry in entries]
    if any(value is None for value in values):
        return {"mean": None, "sd": None}
    return {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else None}


def _compare(out: Path, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The SAEs of one shape at one site, matched with one another over seeds and sources."""
    families: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for cell in cells:
        key = tuple(cell[name] for name in ("target", "site", "k", "num_latents"))
        families[key] += cell["saes"]
    told = []
    for (target, site, k, num_latents), saes in families.items():
        if len(saes) < 2:
            continue
        folder = Path("compare") / f"{target}-{site}-k{k}-f{num_latents}"
        config = CompareConfig(saes=tuple(out / name for name in saes), out=out / folder)
        found = compare(config)["pairs"]
        shared = {over: _shared(found, over) for over in OVER}
        told.append(
            {
                "target": target, "site": site, "k": k, "num_latents": num_latents, "folder": str(folder),
                "threshold": config.threshold, "shared": shared,
            }
        )  # fmt: skip
    return told


def _shared(pairs: list[dict[str, Any]], over: str) -> float | None:
    """Mean share of latents that are shared, of pairs that differ in the source, the seed or both alone."""
    sources, seeds = ("dataset" in OVER[over], "seed" in OVER[over])
    values = [
        pair["assignment"]["share_above"]
        for pair in pairs
        if (_sources_differ(pair), "seed" in pair["differs_in"]) == (sources, seeds)
    ]
    return mean(values) if values else None


def _sources_differ(pair: dict[str, Any]) -> bool:
    return Path(pair["a"]).parent != Path(pair["b"]).parent


def _text(found: dict[str, Any]) -> str:
    table = Table("target", "source", "site", "k", "latents", "seeds", *METRICS, title="mean ± sd over seeds")
    for cell in found["cells"]:
        names = (cell["target"], cell["source"], cell["site"])
        counts = (str(cell["k"]), f"{cell['num_latents']:,}", str(cell["n_seeds"]))
        table.add_row(*names, *counts, *(_figure(**cell["metrics"][name]) for name in METRICS))
    tables = [table]
    if found["comparisons"]:
        threshold = found["comparisons"][0]["threshold"]
        alike = Table(
            "target", "site", "k", "latents", *(f"other {name.replace('_', ' ')}" for name in OVER), "report",
            title=f"share of latents whose match has a cosine above {threshold:g}",
        )  # fmt: skip
        for entry in found["comparisons"]:
            shares = entry["shared"].values()
            alike.add_row(
                entry["target"], entry["site"], str(entry["k"]), f"{entry['num_latents']:,}",
                *("–" if share is None else f"{share:.1%}" for share in shares),
                f"{entry['folder']}/report.html",
            )  # fmt: skip
        tables.append(alike)
    console = Console(width=150, no_color=True, record=True, file=io.StringIO())
    console.print(*tables, sep="\n")
    return console.export_text().rstrip()


def _figure(mean: float | None, sd: float | None) -> str:
    if mean is None:
        return "–"
    return f"{mean:.4g}" if sd is None else f"{mean:.4g} ± {sd:.2g}"

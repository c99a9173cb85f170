"""The diff for people: a table for the terminal, and one HTML page with charts and contexts."""

import io
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.table import Table

from saemill.common import durable, records
from saemill.common.log import console, counted
from saemill.common.page import write_page
from saemill.common.records import File
from saemill.common.stores import diffs
from saemill.diff import charts
from saemill.diff.latents import KINDS, TURNED, Latents

GROUPS = KINDS | {TURNED: "shared, but the two parts of the decoder row point furthest apart"}
"""Groups of latents that the page shows, and what each is."""
PAGE_LETTERS = 400
"""Letters of a passage that the page shows."""


def named(text: str, diff: diffs.Diff) -> str:
    """Put the names of both sides for A and B."""
    a, b = (side.name for side in diff.sides)
    return " ".join({"A": a, "B": b}.get(word, word) for word in text.split(" "))


def table(diff: diffs.Diff) -> str:
    """Render how many latents are of each kind, and what the kinds mean."""
    shown = Table()
    for title in ("kind", "latents", "share", "what it is"):
        shown.add_column(title, justify="right" if title in ("latents", "share") else "left", no_wrap=True)
    n = sum(diff.kinds.values())
    for kind, count in diff.kinds.items():
        shown.add_row(kind, f"{count:,}", f"{count / n:.1%}", KINDS[kind])
    terminal = console(width=400, no_color=True, record=True, file=io.StringIO())
    terminal.print(shown)
    sides = ", ".join(
        f"{letter} is {side.name} (FVU {side.fvu:.3f})" for letter, side in zip("AB", diff.sides, strict=True)
    )
    return "\n".join(
        [
            f"{diff.variant}: {diff.described}",
            f"{sides}; L0 {diff.l0:.1f}, on {counted(diff.n_tokens, f'held-out {diff.unit}')}",
            terminal.export_text().rstrip(),
            diff.notes[0],
        ]
    )


def write(out: Path, diff: diffs.Diff, latents: Latents) -> diffs.Diff:
    """Write table, page and record; the record last, with the hashes of the others.

    Returns: the record as it was written.
    """
    columns = latents.table()
    with ExitStack() as replacements:  # which closes the last opened first
        record = replacements.enter_context(durable.replacing(out / diffs.FILE))
        partials = {
            name: replacements.enter_context(durable.replacing(out / name))
            for name in (diffs.LATENTS, diffs.REPORT)
        }
        with durable.writing(out / diffs.LATENTS, columns.nbytes):
            pq.write_table(columns, partials[diffs.LATENTS])
        with durable.writing(out / diffs.REPORT):
            _write_page(partials[diffs.REPORT], diff, latents)
        files = tuple(
            File(path=name, bytes=file.stat().st_size, xxh3=durable.hash_file(file))
            for name, file in partials.items()
        )
        written = diff.model_copy(update={"files": files})
        with durable.writing(out / diffs.FILE):
            records.write(record, written)
        (out / diffs.FILE).unlink(missing_ok=True)
    return written


def _write_page(path: Path, diff: diffs.Diff, latents: Latents) -> None:
    """Write the page, with no scripts and nothing to fetch."""
    n = sum(diff.kinds.values())
    write_page(
        path,
        "diff/report.html",
        diff=diff,
        kinds=[
            (kind, charts.COLOURS[kind], count, count / n, named(KINDS[kind], diff))
            for kind, count in diff.kinds.items()
        ],
        relative_norms=charts.histogram(diff.relative_norms, (0, 1)),
        cosines=charts.histogram(diff.cosines, (-1, 1)),
        scatter=charts.scatter(_exclusive(latents)),
        groups=_groups(diff),
        counted=counted,
        figure=_figure,
        page_letters=PAGE_LETTERS,
    )


def _exclusive(latents: Latents) -> list[tuple[int, str, float, float]]:
    """List the latents that write to one side alone and have ν."""
    kinds = latents.kinds
    chosen = [kind in ("A only", "B only", "A by its norm", "B by its norm") for kind in kinds]
    known = np.isfinite(latents.nu_error) & np.isfinite(latents.nu_reconstruction)
    return [
        (int(i), str(kinds[i]), float(latents.nu_reconstruction[i]), float(latents.nu_error[i]))
        for i in np.flatnonzero(np.array(chosen) & known)
    ]


def _groups(diff: diffs.Diff) -> list[tuple[str, str, list[diffs.Shown]]]:
    """Group the latents that are shown: the group's name, what it is, and its latents."""
    groups = [
        (name, named(what, diff), [shown for shown in diff.shown if shown.group == name])
        for name, what in GROUPS.items()
    ]
    return [group for group in groups if group[2]]


def _figure(figures: dict[str, Any], name: str, form: str = ".2f") -> str:
    """Format a latent's figure, or an en dash."""
    value = figures[name]
    return "–" if value is None else format(value, form)

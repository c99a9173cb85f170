"""Follow a run while it trains: the lines of metrics.jsonl, and how each variant ended."""

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from saemill.common import durable
from saemill.common.stores.runs import METRICS, looks
from saemill.common.tracking.runs import Runs

POLL_SECONDS = 0.5
EVAL = "eval_"
"""Beginning of the names of figures on held-out text."""

Record = dict[str, Any]
"""A line of metrics.jsonl."""


class End(Protocol):
    """The end of the stage that writes the folder."""

    @property
    def word(self) -> str | None:
        """Word on how it ended; None while it runs."""


def follow(folder: Path, end: End, quiet: bool = False) -> None:
    """Log `metrics.jsonl` until the training has ended and all is read.

    Args:
        folder: of the run.
        end: whether the training has ended.
        quiet: without figures of the machine, where training does not run on it now.
    """
    runs = Runs(folder, quiet)
    log_due(folder, runs, records(folder / METRICS, end))
    for name in list(runs.open):
        end_variant(folder, runs, name, end.word or "lost")


def catch_up(folder: Path, runs: Runs) -> None:
    """Log what wandb did not receive while the run was trained."""
    missing = [name for name in runs.settings.runs if name not in runs.ended]
    if missing:
        lines = (folder / METRICS).read_text().splitlines()
        log_due(folder, runs, map(json.loads, lines))
    for name in missing:
        end_variant(folder, runs, name, "finished")


def log_due(folder: Path, runs: Runs, lines: Iterable[Record]) -> None:
    """Log the records that are due, those with figures on held-out text, and each variant's last; end the
    runs of those that were stopped."""
    last: Record = {"variants": {}}
    for record in lines:
        if stopped := [name for name in last["variants"] if name not in record["variants"]]:
            runs.log(last)
            for name in stopped:
                end_variant(folder, runs, name, "finished")
        if record["step"] % runs.settings.log_frequency == 0 or _has_held_out(record):
            runs.log(record)
        last = record
    if last["variants"]:
        runs.log(last)


def _has_held_out(record: Record) -> bool:
    """Tell whether a record has figures on held-out text, which are few: each of them is logged."""
    return any(key.startswith(EVAL) for metrics in record["variants"].values() for key in metrics)


def records(path: Path, end: End) -> Iterator[Record]:
    """Read the lines of a file that is being written, until the stage has ended and all lines are read.

    Training that goes on from a checkpoint puts another file in its place; that is read from its start.
    """
    inode, n_bytes = 0, 0
    while True:
        is_last = end.word is not None
        with suppress(FileNotFoundError), path.open("rb") as file:
            if os.fstat(file.fileno()).st_ino != inode:
                inode, n_bytes = os.fstat(file.fileno()).st_ino, 0
            file.seek(n_bytes)
            for line in file:
                if line.endswith(b"\n"):  # else it is half written
                    n_bytes += len(line)
                    yield json.loads(line)
        if is_last:
            return
        time.sleep(POLL_SECONDS)


def end_variant(folder: Path, runs: Runs, name: str, word: str) -> None:
    """End a variant's run, with its state: trained, stopped or diverged, or how the whole stage ended."""
    if name not in runs.open:
        return
    if word != "finished":
        runs.end(name, word, is_last=False, state=word)
        return
    summary = state(folder, name)
    runs.end(name, "diverged" if summary["state"] == "diverged" else word, is_last=True, **summary)


def state(folder: Path, name: str) -> dict[str, Any]:
    """Describe how a variant whose SAE is written ended, in entries of its wandb summary."""
    provenance = durable.read_json(folder / name / "cfg.json")["saemill"]
    if provenance["diverged_at_step"] is not None:
        return {"state": "diverged", "diverged_at_step": provenance["diverged_at_step"]}
    stopped = _stopped(folder).get(name)
    return {"state": "trained"} if stopped is None else {"state": "stopped", **stopped}


def _stopped(folder: Path) -> dict[str, dict[str, Any]]:
    """Read halving's records of the variants that it stopped."""
    return {
        name: {"stopped_at_step": look.step, "stopped_value": lost.value, "best_then": lost.best}
        for look in looks(folder)
        for name, lost in look.stopped.items()
    }

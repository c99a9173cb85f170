"""Where metrics go: `metrics.jsonl` always, the console, and wandb in a thread of its own."""

import json
import os
import queue
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table

from saemill.common import durable
from saemill.common.log import LINE_SECONDS, duration, say

Record = dict[str, Any]
"""step, tokens, tokens_per_s, seconds, and `variants`: name → fvu, loss, auxk, l0, dead_fraction, lr."""


class Sink(Protocol):
    """Takes a record every few steps."""

    def log(self, record: Record) -> None:
        """Take one record."""

    def close(self) -> None:
        """Flush and end."""


class JsonlSink:
    """Appends one JSON line per record.

    Args:
        path: the file.
        after_step: on resume, lines of later steps are dropped.
    """

    def __init__(self, path: Path, after_step: int) -> None:
        kept = []
        if path.exists() and after_step > 0:
            lines = path.read_text().splitlines()
            kept = [line for line in lines if _step_of(line) <= after_step]
        path.write_text("".join(line + "\n" for line in kept))
        self.file = path.open("a")

    def log(self, record: Record) -> None:
        """Write the line at once."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Flush to disk."""
        os.fsync(self.file.fileno())
        self.file.close()


def _step_of(line: str) -> float:
    """A line's step; a line cut by a crash counts as after any step."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return float("inf")


class ConsoleSink:
    """A live table on a terminal, else a line per variant at most every ten seconds."""

    def __init__(self, n_steps: int, max_tokens: int) -> None:
        self.n_steps, self.max_tokens = n_steps, max_tokens
        self.live = None
        if sys.stderr.isatty():
            self.live = Live(console=Console(stderr=True), auto_refresh=False)
            self.live.start()
        self.shown = 0.0

    def log(self, record: Record) -> None:
        """Show the newest values."""
        if self.live:
            self.live.update(self._table(record), refresh=True)
        elif record["step"] == self.n_steps or time.monotonic() - self.shown > LINE_SECONDS:
            self.shown = time.monotonic()
            print("\n".join([self._title(record), *self._lines(record)]), file=sys.stderr, flush=True)

    def _title(self, record: Record) -> str:
        left = (self.max_tokens - record["tokens"]) / max(record["tokens_per_s"], 1e-9)
        return (
            f"train: step {record['step']:,} of {self.n_steps:,}, {record['tokens']:,} tokens, "
            f"{record['tokens_per_s']:,.0f} tokens/s, {duration(left)} left"
        )

    def _rows(self, record: Record) -> list[list[str]]:
        return [
            [name, *("–" if m[key] is None else f"{m[key]:.4g}" for key in COLUMNS)]
            for name, m in record["variants"].items()
        ]

    def _lines(self, record: Record) -> list[str]:
        width = max(len(name) for name in record["variants"])
        return [
            f"  {row[0]:{width}}  "
            + "  ".join(f"{key} {value}" for key, value in zip(COLUMNS, row[1:], strict=True))
            for row in self._rows(record)
        ]

    def _table(self, record: Record) -> Table:
        table = Table("variant", *COLUMNS, title=self._title(record))
        for row in self._rows(record):
            table.add_row(*row)
        return table

    def close(self) -> None:
        """Leave the last table standing."""
        if self.live:
            self.live.stop()


COLUMNS = ("fvu", "auxk", "l0", "dead_fraction", "lr")


class WandbSink:
    """One wandb run per variant in a group, fed from a queue by a thread.

    Training never waits for wandb: when the queue is full a record is dropped, and the first
    failure is told once and ends the logging to wandb alone.

    Args:
        project: wandb's project.
        group: the runs' common group.
        configs: variant name → its settings.
        folder: where wandb keeps its files, and `wandb.json` the runs' ids, so that a resumed run
            goes on in the same ones.
    """

    CLOSE_SECONDS = 60.0

    def __init__(
        self, project: str, group: str, configs: Mapping[str, Mapping[str, Any]], folder: Path
    ) -> None:
        self.records: queue.Queue[Record | None] = queue.Queue(maxsize=1000)
        arguments = (project, group, configs, folder)
        self.thread = threading.Thread(target=self._guarded, args=arguments, daemon=True)
        self.thread.start()

    def log(self, record: Record) -> None:
        """Queue the record."""
        if self.thread.is_alive():
            try:
                self.records.put_nowait(record)
            except queue.Full:
                return

    def close(self) -> None:
        """Give the thread a minute to finish."""
        if self.thread.is_alive():
            try:
                self.records.put(None, timeout=self.CLOSE_SECONDS)
            except queue.Full:
                return
        self.thread.join(self.CLOSE_SECONDS)
        if self.thread.is_alive():
            say("wandb did not finish within a minute; left behind. metrics.jsonl is complete.")

    def _guarded(self, *arguments: Any) -> None:
        try:
            self._work(*arguments)
        except Exception as error:
            say(f"wandb failed ({error}); training goes on, metrics.jsonl is complete")

    def _work(self, project: str, group: str, configs: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
        import wandb

        start: Callable[..., Any] = wandb.init
        ids_path = folder / "wandb.json"
        ids = durable.read_json(ids_path) if ids_path.exists() else {}
        ids = {name: ids.get(name) or uuid.uuid4().hex[:8] for name in configs}
        durable.write_json(ids_path, ids)
        runs = {
            name: start(
                project=project,
                group=group,
                name=name,
                id=ids[name],
                resume="allow",
                config=dict(config),
                dir=str(folder),
                reinit="create_new",
                settings=wandb.Settings(silent=True),
            )
            for name, config in configs.items()
        }
        while (record := self.records.get()) is not None:
            for name, metrics in record["variants"].items():
                shared = {key: record[key] for key in ("step", "tokens", "tokens_per_s")}
                runs[name].log({**shared, **metrics}, step=record["tokens"])
        for run in runs.values():
            run.finish()

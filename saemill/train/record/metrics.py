"""Where metrics go: `metrics.jsonl` always (which wandb's process reads), the console, TensorBoard."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import xxhash
from rich.live import Live
from rich.table import Table

from saemill.common import durable
from saemill.common.errors import StoreError
from saemill.common.log import LINE_SECONDS, console, duration, printable, say
from saemill.common.records import File

Record = dict[str, Any]
"""step, tokens, left_out, tokens_per_s, seconds, and `variants`: name → fvu, loss, auxk, l0,
dead_fraction, lr; penalty of architectures that have one; where they were measured on held-out text, eval_fvu
and others beside them (`watch`).

`left_out` counts the tokens that were passed over for their norm in the stream's windows so far."""


class Sink(Protocol):
    """Takes a record every few steps."""

    def log(self, record: Record) -> None:
        """Take one record."""

    def close(self) -> None:
        """Flush and end."""


class JsonlSink:
    """Appends one JSON line per record, and knows the hash of all lines, which checkpoints keep.

    Args:
        path: the file.
        logged: what the checkpoint that the run goes on from says of it; lines after it are dropped. None
            begins a new file.

    Raises:
        StoreError: the file is not as it was at the checkpoint.
        DiskError: the disk is full; the file is as it was.
    """

    def __init__(self, path: Path, logged: File | None) -> None:
        content = b"" if logged is None else _logged_content(path, logged)
        self.path, self.n_bytes, self.digest = path, len(content), xxhash.xxh3_64(content)
        durable.write_bytes(path, [content])
        self.file = path.open("ab")

    def log(self, record: Record) -> None:
        """Write the line at once."""
        line = json.dumps(record).encode() + b"\n"
        with durable.writing(self.path, len(line)):
            self.file.write(line)
            self.file.flush()
        self.digest.update(line)
        self.n_bytes += len(line)

    def synced(self) -> File:
        """Flush all lines to disk. Returns: what a checkpoint records of them."""
        with durable.writing(self.path):
            os.fsync(self.file.fileno())
        return self.entry

    @property
    def entry(self) -> File:
        """Return the file's size and hash as they are now."""
        return File(path=self.path.name, bytes=self.n_bytes, xxh3=self.digest.hexdigest())

    def close(self) -> None:
        """Flush to disk."""
        with durable.writing(self.path):
            os.fsync(self.file.fileno())
            self.file.close()


def _logged_content(path: Path, logged: File) -> bytes:
    """Read what the file held at the checkpoint."""
    if not path.exists():
        say(f"{path} is gone; the run goes on, with the log from here on")
        return b""
    content = path.read_bytes()[: logged.bytes]
    if len(content) < logged.bytes or durable.hash_bytes(content) != logged.xxh3:
        raise StoreError(
            f"{path} is damaged: its lines up to the checkpoint differ from their hash. Nothing else is "
            "lost: move the file away, and the same command goes on, with the log from there on"
        )
    return content


class ConsoleSink:
    """A live table on a terminal, else a line per variant at most every ten seconds; with the latest figures
    on held-out text, if there are any."""

    def __init__(self, n_steps: int, max_tokens: int, units: str = "tokens") -> None:
        self.n_steps, self.max_tokens, self.units = n_steps, max_tokens, units
        self.live = None
        if sys.stderr.isatty():
            self.live = Live(console=console(stderr=True), auto_refresh=False)
            self.live.start()
        self.shown = 0.0
        self.latest: dict[str, Record] = {}
        """Latest figures that not all variants have, or not each time, by variant."""

    def log(self, record: Record) -> None:
        """Show the newest values."""
        for name, m in record["variants"].items():
            self.latest.setdefault(name, {}).update({key: m[key] for key in OF_SOME if key in m})
        if self.live:
            self.live.update(self._table(record), refresh=True)
        elif record["step"] == self.n_steps or time.monotonic() - self.shown > LINE_SECONDS:
            self.shown = time.monotonic()
            print("\n".join([self._title(record), *self._lines(record)]), file=sys.stderr, flush=True)

    def _title(self, record: Record) -> str:
        left = (self.max_tokens - record["tokens"]) / max(record["tokens_per_s"], 1e-9)
        return (
            f"train: step {record['step']:,} of {self.n_steps:,}, {record['tokens']:,} {self.units}, "
            f"{record['tokens_per_s']:,.0f} {self.units}/s, {duration(left)} left"
        )

    @property
    def _columns(self) -> tuple[str, ...]:
        there = {key for figures in self.latest.values() for key in figures}
        return tuple(key for key in COLUMNS if key not in OF_SOME or key in there)

    def _rows(self, record: Record) -> list[list[str]]:
        rows = []
        for name, m in record["variants"].items():
            values = ((m | self.latest[name]).get(key) for key in self._columns)
            rows.append([printable(name), *("–" if value is None else f"{value:.4g}" for value in values)])
        return rows

    def _lines(self, record: Record) -> list[str]:
        width = max(len(name) for name in record["variants"])
        return [
            f"  {row[0]:{width}}  "
            + "  ".join(f"{key} {value}" for key, value in zip(self._columns, row[1:], strict=True))
            for row in self._rows(record)
        ]

    def _table(self, record: Record) -> Table:
        table = Table("variant", *self._columns, title=self._title(record))
        for row in self._rows(record):
            table.add_row(*row)
        return table

    def close(self) -> None:
        """Leave the last table standing."""
        if self.live:
            self.live.stop()


OF_SOME = ("kl", "ce", "penalty", "eval_fvu", "eval_l0", "eval_delta_ce", "eval_loss_recovered")
"""Columns that are there where some variant has them."""
COLUMNS = ("fvu", *OF_SOME[:2], "auxk", "penalty", "l0", "dead_fraction", "lr", *OF_SOME[3:])


class TensorBoardSink:
    """One event folder per variant under `folder`, the number of training tokens as the step.

    Args:
        folder: where the events go.
        after_tokens: training tokens that the run goes on from; TensorBoard then hides what an earlier
            process wrote of later ones.
    """

    def __init__(self, folder: Path, after_tokens: int) -> None:
        self.folder, self.after_tokens = folder, after_tokens
        self.writers: dict[str, Any] = {}

    def log(self, record: Record) -> None:
        """Write each variant's scalars."""
        for name, metrics in record["variants"].items():
            writer = self._writer(name)
            for key, value in {**metrics, "tokens_per_s": record["tokens_per_s"]}.items():
                if value is not None:
                    writer.add_scalar(key, value, record["tokens"])

    def _writer(self, name: str) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        if name not in self.writers:
            make: Any = SummaryWriter
            self.writers[name] = make(self.folder / name, purge_step=self.after_tokens + 1)
        return self.writers[name]

    def close(self) -> None:
        """Flush and end."""
        for writer in self.writers.values():
            writer.close()

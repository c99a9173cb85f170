"""One stage, really run on a little of its input, in a process of its own: so its start counts as it will.

It runs three times: to warm up, on as little again, and on more. The difference of the last two is what
its input costs, the rest what it costs anyway.
"""

import importlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from saemill.common import log
from saemill.common.errors import SaemillError
from saemill.common.outlook import Outlook, process_bytes

SECONDS = 3.0
"""Seconds that the longest run is to take."""
LEAST_FACTOR, MOST_FACTOR = 2, 32
"""How much more the last run goes over than the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A little of a stage."""

    stage: str
    config: Any
    """Its settings, whole."""
    whole: Mapping[str, int]
    """Settings that say how much it goes over, and their values for the whole; the first counts."""
    unit: int
    """Fewest tokens that it can go over: a row, a step."""
    least: int
    """Tokens of the short runs."""
    most: int
    """Most tokens that there are to measure on."""
    out: Path
    """Folder for what the runs write; the last one's is `2`."""

    def config_of(self, n_tokens: int, run: int) -> Any:
        """Make the settings of one run."""
        in_all = next(iter(self.whole.values()))
        amounts = {
            name: max(self.unit, round(amount * n_tokens / in_all)) for name, amount in self.whole.items()
        }
        return replace(self.config, out=self.out / str(run), **amounts)


@dataclass(frozen=True, slots=True)
class Ran:
    """One run, or the start of the process."""

    n_tokens: int
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What a process saw of a piece."""

    start: Ran
    runs: tuple[Ran, ...]
    """The three runs."""
    peak_bytes: int
    """Most memory of the process."""
    outlook: Outlook
    """Of the last run."""


def work(piece: Piece, began: float, to: Connection) -> None:
    """Run a piece and send what was measured; or the error.

    Args:
        piece: what to run.
        began: the time when the process was started, in seconds since the epoch.
        to: where the result goes.
    """
    log.speaks = False
    try:
        to.send(_measured(piece, began))
    except SaemillError as error:
        to.send(str(error))


def _measured(piece: Piece, began: float) -> Measured:
    stage = importlib.import_module(f"saemill.{piece.stage}.run")
    start = Ran(0, time.time() - began, time.process_time())
    outlooks: list[Outlook] = []

    def run(n_tokens: int, number: int) -> Ran:
        wall, cpu = time.perf_counter(), time.process_time()
        stage.run(piece.config_of(n_tokens, number), before=outlooks.append)
        return Ran(n_tokens, time.perf_counter() - wall, time.process_time() - cpu)

    least = max(piece.unit, min(piece.least, piece.most // LEAST_FACTOR) // piece.unit * piece.unit)
    warm, short = run(least, 0), run(least, 1)
    factor = min(MOST_FACTOR, max(LEAST_FACTOR, SECONDS / max(short.seconds, 1e-3)))
    long = run(max(least, min(round(least * factor), piece.most) // piece.unit * piece.unit), 2)
    return Measured(start, (warm, short, long), process_bytes(), outlooks[-1])

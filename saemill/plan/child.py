"""One stage, really run on a little of its input, in a process of its own: so its start counts as it will.

It runs to warm up, on as little again, and then on more and more, until that takes longer by seconds. What
the last run takes longer than the second is what its input costs; the rest it costs anyway.
"""

import gc
import importlib
import os
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from saemill.common.errors import SaemillError
from saemill.common.outlook import Outlook, process_bytes

SECONDS = 3.0
"""Seconds by which the last run is to be longer than the second."""
WAITED = 5
"""Times as many seconds by the clock that do as well, where a disk or other processes are waited for."""
GROWTH = 3
"""How much more each run goes over than the one before."""


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
    """Folder for what the runs write, each into its own."""

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
    """What the process takes to begin, and to end."""
    warm: Ran
    short: Ran
    long: Ran
    """The last run."""
    out: Path
    """What it wrote."""
    peak_bytes: int
    """Most memory of the process in its first run: what later ones leave behind is not of the stage."""
    outlook: Outlook
    """Of the first run."""
    cpu_seconds: float
    """Of the process in all, but for its end."""


def work(piece: Piece, began: float, to: Connection) -> None:
    """Run a piece and send what was measured, or why it was not. What it says goes nowhere.

    Args:
        piece: what to run.
        began: the time when the process was started, in seconds since the epoch.
        to: where the result goes.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
    try:
        to.send(_measured(piece, began))
    except SaemillError as error:
        to.send(str(error))
    except Exception:
        to.send(traceback.format_exc())


def _measured(piece: Piece, began: float) -> Measured:
    stage = importlib.import_module(f"saemill.{piece.stage}.run")
    start = Ran(0, time.time() - began, time.process_time())
    outlooks: list[Outlook] = []

    def run(n_tokens: int) -> Ran:
        gc.collect()  # what the run before held in cycles
        wall, cpu = time.perf_counter(), time.process_time()
        stage.run(piece.config_of(n_tokens, len(outlooks)), before=outlooks.append)
        return Ran(n_tokens, time.perf_counter() - wall, time.process_time() - cpu)

    def whole(n_tokens: int) -> int:
        return max(piece.unit, n_tokens // piece.unit * piece.unit)

    least, most = whole(min(piece.least, piece.most // GROWTH)), whole(piece.most)
    warm, peak_bytes = run(least), process_bytes()
    long = short = run(least)
    while long.n_tokens < most and not _is_longer(long, short):
        long = run(min(long.n_tokens * GROWTH, most))
    out = piece.out / str(len(outlooks) - 1)
    return Measured(start, warm, short, long, out, peak_bytes, outlooks[0], time.process_time())


def _is_longer(long: Ran, short: Ran) -> bool:
    """Tell whether a run took longer by enough seconds of computing, or by many more of waiting."""
    computed = (long.cpu_seconds - short.cpu_seconds) / torch.get_num_threads()
    return computed > SECONDS or long.seconds - short.seconds > WAITED * SECONDS

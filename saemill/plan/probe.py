"""A little of each stage, really run in a temporary folder, and what follows for the whole.

Seconds are a line: start and warm-up of the process, what a run costs anyway, and so much per token. Memory
is the most that the piece held, with what grows with the amount (windows, buffers) as it will be. Where a
stage's input is not there, that is what the piece of the stage before has left.
"""

import multiprocessing
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

from saemill.common.errors import ConfigError, Interrupted
from saemill.common.log import duration
from saemill.common.outlook import Outlook
from saemill.common.signals import stop_on_signal
from saemill.plan import child
from saemill.plan.child import Measured, Piece, Ran

LIBRARIES, MEASURED = "libraries", "libraries and what else was measured"
POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds of a whole stage."""

    seconds: float
    cpu_seconds: float
    tokens_per_hour: float
    """How much it goes over once it is under way."""

    def describe(self, unit: str) -> str:
        """Describe it for the plan."""
        return f"time: about {duration(self.seconds)}; {_count(self.tokens_per_hour)} {unit}s per hour"


def _count(number: float) -> str:
    for scale, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:,.3g}{suffix}"
    return f"{number:,.0f}"


class Probe:
    """The temporary folder of the pieces, and the processes that work in it."""

    def __init__(self, folder: Path, stop: Event) -> None:
        self.folder, self.stop = folder, stop
        self.measured_seconds = 0.0

    def measure(self, piece: Piece) -> Measured:
        """Run a piece in a process of its own.

        Raises:
            ConfigError: the stage refuses it, or its process died.
            Interrupted: a signal came.
        """
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        before, began = _children_seconds(), time.time()
        process = context.Process(target=child.work, args=(piece, began, sender))
        process.start()
        sender.close()
        try:
            while not self.stop.is_set() and not receiver.poll(POLL_SECONDS):
                pass
            if self.stop.is_set():  # Ctrl-C comes to both processes
                raise Interrupted("stopped by a signal; a plan writes nothing, so nothing is left")
            result, ending = receiver.recv(), time.time()
            process.join()
        except EOFError:
            process.join()
            raise ConfigError(
                f"the process that measured {piece.stage} ended with code {process.exitcode}, which where "
                "memory is short is the system's doing"
            ) from None
        finally:
            process.terminate()
            process.join()
        if isinstance(result, str):
            raise ConfigError(f"{piece.stage} on a little of it: {result}")
        assert isinstance(result, Measured)
        self.measured_seconds += time.time() - began
        start, end_cpu = result.start, _children_seconds() - before - result.cpu_seconds
        both = Ran(0, start.seconds + time.time() - ending, start.cpu_seconds + end_cpu)
        return replace(result, start=both)


def _children_seconds() -> float:
    """Return the CPU seconds of all processes that this one started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@contextmanager
def probing() -> Iterator[Probe]:
    """Make a temporary folder for pieces; it is gone afterwards, whatever happens."""
    with TemporaryDirectory(prefix="saemill-plan-") as folder, stop_on_signal() as stop:
        yield Probe(Path(folder), stop)


def estimate(measured: Measured, n_tokens: int) -> Estimate:
    """Draw the line through the runs to the whole stage.

    Args:
        measured: the piece.
        n_tokens: of the whole.
    """
    start, warm, short, long = measured.start, measured.warm, measured.short, measured.long

    def whole(what: str) -> tuple[float, float]:
        start_s, warm_s, short_s, long_s = (getattr(run, what) for run in (start, warm, short, long))
        more = long.n_tokens - short.n_tokens
        per_token = max(0.0, long_s - short_s) / more if more else 0.0
        anyway = max(0.0, short_s - per_token * short.n_tokens)
        return start_s + max(0.0, warm_s - short_s) + anyway + per_token * n_tokens, per_token

    (seconds, per_token), (cpu_seconds, _) = whole("seconds"), whole("cpu_seconds")
    rate = 1 / per_token if per_token else long.n_tokens / long.seconds
    return Estimate(seconds, cpu_seconds, 3600 * rate)


def with_measured(outlook: Outlook, measured: Measured) -> Outlook:
    """Put what the piece's process held beyond its own outlook into that of the whole."""
    piece = measured.outlook
    own = sum(n_bytes for name, n_bytes in piece.memory.items() if name != LIBRARIES)
    rest = max(measured.peak_bytes - own, piece.memory.get(LIBRARIES, 0))
    parts: dict[str, Any] = {name: n for name, n in outlook.memory.items() if name != LIBRARIES}
    return replace(outlook, memory={MEASURED: rest} | parts)

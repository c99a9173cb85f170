"""What the user sees: sentences on stdout, progress on stderr (a bar on a terminal, in a notebook a line that
is written over, else lines)."""

import logging
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, the marks that turn the direction of text, and halves of characters."""
LINE_SECONDS = 10.0
"""Least time between two progress lines where stderr is no terminal."""
NOTEBOOK_SECONDS = 0.5
"""The same in a notebook, where a line takes the place of the one before."""
speaks = True
"""Whether this process shows progress; of several, one does."""


def printable(text: str) -> str:
    """Return the text as a terminal may show it: what would steer the terminal is written out, as `\\x1b` for
    ESC.

    Line ends and tabs stay. Text of a corpus, names and paths can hold anything.
    """
    return UNPRINTABLE.sub(
        lambda match: match.group().encode("unicode_escape", "surrogatepass").decode(), text
    )


class PrintableRecord(logging.LogRecord):
    """A record of any package's log whose message is printable."""

    def getMessage(self) -> str:
        """Return the message as a terminal may show it."""
        return printable(super().getMessage())


def tame_other_packages() -> None:
    """Make what other packages log and warn printable too: it may name files and quote texts."""
    logging.setLogRecordFactory(PrintableRecord)
    written = warnings.formatwarning
    warnings.formatwarning = lambda *about, **more: printable(written(*about, **more))


def say(text: str) -> None:
    """Print a sentence or table at once; control characters in it are written out."""
    if speaks:
        print(printable(text), flush=True)


def console(**settings: Any) -> Console:
    """Make a console that shows names as they are: `[red]` and `:smile:` in one are no markup."""
    return Console(markup=False, emoji=False, highlight=False, **settings)


def counted(n: int, thing: str) -> str:
    """Count things in words: `1 bank`, `2,000 banks`."""
    return f"{n:,} {thing}" if n == 1 else f"{n:,} {thing}s"


def duration(seconds: float) -> str:
    """Format seconds as `1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _Rate(ProgressColumn):
    """A column of the bar: `1,234 tokens/s`."""

    def render(self, task: Task) -> Text:
        """Return the text that the bar shows now."""
        return Text(f"{task.speed or 0:,.0f} {task.fields['unit']}/s")


@contextmanager
def progress(label: str, total: int | None, unit: str, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show progress while the block runs.

    Args:
        label: what is being done.
        total: amount of work, None if unknown.
        unit: its name in the plural.
        done: amount that an earlier run did; it does not count in the rate.

    Yields: a function that takes the amount done since it was last called.
    """
    if not speaks:
        yield lambda n: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:,.0f}"),
        _Rate(),
        TimeRemainingColumn(),
    )
    is_terminal = sys.stderr.isatty()
    with Progress(*columns, console=console(stderr=True), disable=not is_terminal) as bar:
        number = bar.add_task(printable(label), total=total, completed=done, unit=unit)
        if is_terminal:
            yield partial(bar.advance, number)
            return
        (task,) = bar.tasks
        shown = time.monotonic()
        seconds, start, end = (NOTEBOOK_SECONDS, "\r", "") if _in_notebook() else (LINE_SECONDS, "", "\n")

        def advance(n: int) -> None:
            nonlocal shown
            bar.advance(number, n)
            if time.monotonic() - shown >= seconds:
                shown = time.monotonic()
                print(start + _line(task, done), end=end, file=sys.stderr, flush=True)

        yield advance
        print(start + _line(task, done), file=sys.stderr, flush=True)


def _in_notebook() -> bool:
    """Tell whether stderr is shown below a notebook's cell."""
    return type(sys.stderr).__module__.startswith("ipykernel")


def _line(task: Task, done_before: int) -> str:
    """Format progress as a line of a log: the amount, the rate since the start, and the time that is left."""
    rate = (task.completed - done_before) / max(task.elapsed or 0, 1e-9)
    unit = task.fields["unit"]
    line = f"{task.description}: {task.completed:,}"
    if task.total:
        line += f" of {task.total:,}"
    line += f" {unit}, {rate:,.0f} {unit}/s"
    if task.total and rate > 0 and task.completed < task.total:
        line += f", {duration((task.total - task.completed) / rate)} left"
    return line

"""What `saemill track` does: it reads what a run's folder holds, and talks to wandb.

By hand it looks into the folder to know when training has finished. A stage that starts it says so through
its standard input; when that ends it ends too, a bounded time later, so nothing is left where a stage was
killed.
"""

import fcntl
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import TextIO

from saemill.common.errors import ConfigError, Interrupted, StoreError
from saemill.common.log import counted, say
from saemill.common.signals import stop_on_signal
from saemill.common.stores import assessments, runs
from saemill.common.tracking import process, record
from saemill.common.tracking.follow import POLL_SECONDS, End, follow


class Parent:
    """The end of the stage that started this process, as it says on standard input; none while it runs."""

    def __init__(self) -> None:
        self.word: str | None = None
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        word = sys.stdin.readline().strip()
        if not word:  # it was killed, and nobody else would end this process
            timer = threading.Timer(process.END_SECONDS, lambda: os.killpg(0, signal.SIGKILL))
            timer.daemon = True
            timer.start()
        self.word = word or "lost"


class Watch:
    """A run seen from outside: whether training has finished, or is not waited for.

    Args:
        run: its folder.
        stop: set by a signal, which ends the waiting.
        waits: whether to wait until training has finished.
    """

    def __init__(self, run: Path, stop: threading.Event, waits: bool) -> None:
        self.run, self.stop, self.waits = run, stop, waits
        self._ids = self._read_ids()

    def _read_ids(self) -> list[str]:
        """Read the ids of the run's wandb runs; none while training begins anew."""
        if not (self.run / runs.WANDB).exists():
            return []
        return [entry.id for entry in record.settings(self.run).runs.values()]

    @property
    def word(self) -> str | None:
        """Word on how training ended, `interrupted` where it may go on; None while it is waited for.

        Raises:
            StoreError: it began anew, in other wandb runs.
        """
        if self._read_ids() != self._ids:
            raise StoreError(f"{self.run} is trained anew meanwhile; run the same command again")
        if runs.is_finished(self.run):
            return "finished"
        return "interrupted" if self.stop.is_set() or not self.waits else None


def track(run: Path, waits: bool, assessment: Path | None) -> None:
    """Send to wandb what it lacks of a run, by hand.

    Args:
        run: its folder.
        waits: whether to go on until training has finished.
        assessment: the folder of an assessment to send, if one is to be sent.

    Raises:
        ConfigError: the run was not logged to wandb, or wandb has no API key.
        StoreError: the folder is no run, or a record in it is damaged.
        Interrupted: a signal came before training had finished; the same call goes on.
    """
    if not runs.is_run(run):
        raise StoreError(f"{run} is no run of `saemill train`")
    if not (run / runs.WANDB).exists():
        raise ConfigError(
            f"{run} was not logged to wandb ({runs.WANDB} is missing); train with --log-to-wandb"
        )
    if assessment is not None:
        assessments.load(assessment)
        if waits:
            raise ConfigError("--follow has no effect on an assessment, of a finished run; leave it out")
    process.check()
    with stop_on_signal() as stop:
        _send(run, assessment, Watch(run, stop, waits), stop)
    logged = record.settings(run)
    n_variants = counted(len(logged.runs), "variant")
    say(f"{run}: {n_variants} logged to wandb, project {logged.project}, group {logged.group}")
    if stop.is_set() and not runs.is_finished(run):
        raise Interrupted("stopped by a signal; the same command continues")
    if not runs.is_finished(run):
        say("training has not finished; --follow goes on until it has")


def track_for_stage(run: Path, assessment: Path | None) -> None:
    """Track as `track` does, for the stage that started this process, which waits a bounded time for it."""
    # Ctrl-C and a scheduler's signals reach every process of a job; the stage says when to end.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    _send(run, assessment, Parent(), None)


def _send(run: Path, assessment: Path | None, end: End, stop: threading.Event | None) -> None:
    """Log a run or an assessment. A failure of wandb's is reported once, and ends this process alone.

    Args:
        run: the folder of the run.
        assessment: that of the assessment to send; without one the metrics are sent.
        end: when to stop reading metrics.
        stop: set by a signal; None where a stage waits, which says on standard input when to end.
    """
    (run / "wandb").mkdir(exist_ok=True)
    with (run / "wandb" / process.LOG).open("a") as log:
        try:
            _lock(log, run, stop)
            if assessment is None:
                follow(run, end, quiet=stop is not None)
            else:
                from saemill.common.tracking.assessment import log_assessment

                log_assessment(run, assessment)
        except Interrupted:
            raise
        except BaseException as error:
            traceback.print_exc(file=log)
            log.flush()
            file = run / runs.METRICS if assessment is None else assessment / assessments.FILE
            why = str(error).partition("\n")[0] or type(error).__name__
            say(f"wandb failed ({why}); nothing else is disturbed, {file} is complete")
            sys.stdout.flush()
            os._exit(1)  # past wandb's own hooks, which would wait for a server


def _lock(log: TextIO, run: Path, stop: threading.Event | None) -> None:
    """Wait until no other process logs this run: that of a stage that was killed may not be through."""
    if stop is None:
        stop = threading.Event()
    elif not _has_lock(log):
        say(f"another process logs {run} to wandb; waiting for it")
    while not _has_lock(log):
        if stop.wait(POLL_SECONDS):
            raise Interrupted("stopped by a signal; the same command continues")


def _has_lock(log: TextIO) -> bool:
    """Lock the log, if no other process has. Return True too where the file system knows no locks."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True

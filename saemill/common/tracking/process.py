"""The process that talks to wandb, `saemill track`, seen from the stage that starts it."""

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from saemill.common import records
from saemill.common.errors import ConfigError, Interrupted
from saemill.common.log import say
from saemill.common.stores.runs import WANDB, WANDB_FOLDER
from saemill.common.tracking import record
from saemill.common.tracking.record import Entry, WandbSettings

LOG = "saemill.log"
"""Name of the log of what the process prints, in wandb's folder."""
END_SECONDS = 60.0
"""Seconds, at most, that a stage waits for wandb at its end."""
STOP_SECONDS = 10.0
"""Seconds, at most, that it waits when a signal stopped it: a scheduler kills what takes long."""
ARTIFACT_BYTES_PER_SECOND = 10e6
"""Rate, in bytes per second, of the longer wait at the end where artifacts are sent."""
CHECK_SECONDS = 30.0
OFFLINE = ("offline", "dryrun", "disabled")
"""Modes of wandb that need no key."""
QUIET_SECONDS = 5.0


def check() -> None:
    """Refuse to start where wandb would ask for an API key; no server is asked.

    Raises:
        ConfigError: there is no key, and wandb is not set to be offline.
    """
    if os.environ.get("WANDB_MODE") in OFFLINE:
        return
    command = [sys.executable, "-m", f"{__package__}.key"]
    try:
        done = subprocess.run(
            command,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CHECK_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return  # the process that logs will report it
    if done.returncode:
        why = done.stderr.strip().rpartition("\n")[2]
        raise ConfigError(done.stdout.strip() or f"wandb does not start: {why}; leave out --log-to-wandb")


def write_record(folder: Path, settings: Mapping[str, Any], configs: Mapping[str, Any]) -> None:
    """Write `wandb.json`; runs that it knows keep their ids, so that a resumed run goes on in them.

    Args:
        folder: of the run.
        settings: project, entity, group, prefix (of the names of wandb's runs), log_frequency (steps),
            artifacts.
        configs: variant name → its config.
    """
    known = record.settings(folder) if (folder / WANDB).exists() else None
    ids = {name: entry.id for name, entry in known.runs.items()} if known else {}
    entries = {
        name: Entry(id=ids.get(name) or new_id(), config=record.plain(config))
        for name, config in configs.items()
    }
    assessments = known.assessments if known else {}
    records.write(folder / WANDB, WandbSettings(**settings, runs=entries, assessments=assessments))


def new_id() -> str:
    """Make the id of a wandb run."""
    return uuid.uuid4().hex[:8]


class Wandb:
    """The process that talks to wandb: started at once, ended within a bounded time. The stage does not fail
    where one of these does.

    As a context manager it sends the process a word on how the block ended.

    Args:
        folder: of the run, whose metrics are followed.
        assessment: the folder of an assessment, to send that instead.
        artifact_bytes: size of what may have to be uploaded at the end.
    """

    def __init__(self, folder: Path, assessment: Path | None = None, artifact_bytes: int = 0) -> None:
        self.later = f"`saemill assess {folder}`" if assessment is None else "the same command"
        what = ["--follow"] if assessment is None else ["--assessment", str(assessment.absolute())]
        self.end_seconds = END_SECONDS + artifact_bytes / ARTIFACT_BYTES_PER_SECOND
        (folder / WANDB_FOLDER).mkdir(exist_ok=True)
        with (folder / WANDB_FOLDER / LOG).open("a") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "saemill", "track", str(folder.absolute()), *what, "--for-stage"],
                env=_environment(),
                stdin=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )

    def __enter__(self) -> "Wandb":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        word = "finished" if kind is None else "interrupted" if kind is Interrupted else "failed"
        self.end(word, self.end_seconds if kind is None else STOP_SECONDS)

    def end(self, word: str, most_seconds: float) -> None:
        """Tell the process how the stage ended; after `most_seconds` it is killed."""
        try:
            self.process.communicate(f"{word}\n".encode(), timeout=QUIET_SECONDS)
        except subprocess.TimeoutExpired:
            say(f"wandb: sending the rest, for at most {most_seconds:.0f} seconds")
        try:
            self.process.wait(max(0.0, most_seconds - QUIET_SECONDS))
        except subprocess.TimeoutExpired:
            say(
                f"wandb did not finish within {most_seconds:.0f} seconds and was ended; "
                f"{self.later} sends what is missing"
            )
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            return
        if self.process.returncode < 0:  # any other failure it reported itself
            say(
                f"wandb's process was killed by signal {-self.process.returncode}; "
                f"{self.later} sends what is missing"
            )


def _environment() -> dict[str, str]:
    """Copy the environment with this process's module path, so that modules are found there as here."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}

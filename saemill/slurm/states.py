"""The states of jobs: from squeue, then sacct, then the exit codes that the scripts leave."""

import getpass
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from saemill.common import records
from saemill.common.errors import StoreError
from saemill.common.records import Name, Positive, Record

ENDED = (
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL",
    "DEADLINE", "REVOKED", "GONE",
)  # fmt: skip
"""SLURM's states of a job that will not run again, and ours of one that SLURM has forgotten."""


JOBS = "jobs.json"


class Entry(Record):
    """A job that was submitted."""

    stage: Name
    job: Annotated[str, Field(pattern=r"^\d+$")]
    """SLURM's id."""
    workers: Positive | None = None
    """Tasks of its array; None where it is none."""


class Jobs(Record):
    """`jobs.json`: the last submission."""

    format: Literal["saemill jobs 2"] = "saemill jobs 2"
    jobs: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """A stage's job, or one task of its array."""

    stage: str
    id: str
    """As SLURM shows it: 12, or 12_0 of an array."""
    folder: Path
    """Where its log and exit code are."""
    state: str = "GONE"
    reason: str = ""
    """Why it waits, where it does."""

    @property
    def log(self) -> Path:
        """Return the file of what it printed, in all its starts."""
        return self.folder / f"{self.stage}-{self.id}.log"

    @property
    def exit_code(self) -> int | None:
        """Read the exit code of its script's last end, as the script wrote it."""
        file = self.folder / f"{self.stage}-{self.id}.exit"
        text = file.read_text().strip() if file.exists() else ""
        return int(text) if text.isdecimal() else None

    @property
    def phrase(self) -> str:
        """Describe its state: why it waits, or how its script ended."""
        if self.reason:
            return f"{self.state} ({self.reason})"
        return f"{self.state} (exit code {self.exit_code})" if self.failed and self.exit_code else self.state

    @property
    def failed(self) -> bool:
        """Tell whether it ran and did not come to its end; a cancelled one that never ran has no log."""
        return self.state in ENDED and self.state != "COMPLETED" and self.log.exists()

    @property
    def alive(self) -> bool:
        """Tell whether it runs, or may run yet."""
        return self.state not in ENDED


def submitted(folder: Path) -> list[Job]:
    """List the jobs of the last submission, each with its present state; none if there was none.

    Raises:
        StoreError: its record is damaged, or SLURM does not answer.
    """
    if not (folder / JOBS).exists():
        return []
    repair = "See to the jobs with squeue; without the file, the run may be submitted again."
    entries = records.read(folder / JOBS, Jobs, repair).jobs
    names = [(entry.stage, id) for entry in entries for id in _ids(entry)]
    queued = _queued()
    ended = _accounted([id for _, id in names if id not in queued])
    jobs = []
    for stage, id in names:
        job = Job(stage, id, folder)
        state, reason = queued.get(id) or (ended.get(id) or _by_exit_code(job), "")
        jobs.append(Job(stage, id, folder, state, reason))
    return jobs


def _ids(entry: Entry) -> list[str]:
    if entry.workers is None:
        return [entry.job]
    return [f"{entry.job}_{task}" for task in range(entry.workers)]


def _queued() -> dict[str, tuple[str, str]]:
    """Ask squeue for state and reason of the user's jobs, which it remembers for minutes after their end.

    Raises:
        StoreError: SLURM does not answer; not to know a job is not to know that it has ended.
    """
    if not shutil.which("squeue"):
        return {}
    command = ["squeue", "-h", "-r", "-t", "all", "-u", getpass.getuser(), "-o", "%i|%T|%r"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise StoreError(f"squeue does not tell of the jobs: {done.stderr.strip()}; try again later")
    rows = [line.split("|", 2) for line in done.stdout.splitlines()]
    return {id: (state, reason if state == "PENDING" else "") for id, state, reason in rows}


def _accounted(ids: Sequence[str]) -> dict[str, str]:
    """Ask SLURM's accounting for states; none where that is off."""
    if not ids or not shutil.which("sacct"):
        return {}
    command = ["sacct", "-n", "-P", "-X", "-j", ",".join(ids), "-o", "JobID,State"]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = [line.split("|") for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return {id: state.split()[0] for id, state in rows}  # CANCELLED by 1000


def _by_exit_code(job: Job) -> str:
    """Return the state of a job that SLURM has forgotten, by its exit code."""
    if job.exit_code is None:
        return "GONE" if job.log.exists() else "CANCELLED"
    return "FAILED" if job.exit_code else "COMPLETED"

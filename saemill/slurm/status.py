"""`saemill status`: the jobs of a run, how far each stage is, and the end of a failed one's log."""

from collections import Counter
from pathlib import Path

from saemill.slurm.progress import by_stage
from saemill.slurm.states import Job, submitted
from saemill.slurm.submit import jobs_folder

LOG_LINES = 12
"""Lines shown of a failed job's log."""
MOST_LOGS = 3
"""Logs shown; the tasks of an array often fail alike."""


def status(run: Path) -> str:
    """Describe each stage: its jobs, if any, and how far it is; then the logs of failed jobs.

    Raises:
        StoreError: nothing is known of such a run.
    """
    folder = jobs_folder(run)
    progress_by_stage, jobs = by_stage(folder, run), submitted(folder)
    lines = [f"run {run}" + ("" if jobs else ": no jobs were submitted")]
    for stage, progress in progress_by_stage.items():
        left = _jobs([job for job in jobs if job.stage == stage])
        lines.append(f"  {stage:9} {left:48}{progress[0]}" if jobs else f"  {stage:9} {progress[0]}")
        lines += [" " * (60 if jobs else 12) + more for more in progress[1:]]
    failed = [job for job in jobs if job.failed]
    for job in failed[:MOST_LOGS]:
        lines += ["", f"{job.stage} {job.id}, the end of {job.log}:", *_end(job.log)]
    if len(failed) > MOST_LOGS:
        lines += ["", f"and of {', '.join(str(job.log) for job in failed[MOST_LOGS:])}"]
    return "\n".join(lines)


def _jobs(jobs: list[Job]) -> str:
    """Summarise jobs: `12 RUNNING`; of an array `13_[0-3]: 3 COMPLETED, 1 FAILED (exit code 2)`."""
    if not jobs:
        return ""
    if len(jobs) == 1:
        return f"{jobs[0].id} {jobs[0].phrase}"
    counts = Counter(job.phrase for job in jobs)
    array = jobs[0].id.split("_")[0]
    return f"{array}_[0-{len(jobs) - 1}]: " + ", ".join(f"{n} {phrase}" for phrase, n in counts.items())


def _end(log: Path) -> list[str]:
    return [f"  {line}" for line in log.read_text(errors="replace").splitlines()[-LOG_LINES:]]

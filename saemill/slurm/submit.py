"""`saemill submit`: the stages of a config as jobs, each after the one before it.

Plain sbatch and bash, not a library such as submitit that pickles functions: the scripts can be read, kept
and submitted again by hand; each stage has resources of its own and waits for another kind of job; cache
is an array; and our exit code decides on a restart. The stages resume by themselves, so to submit the
same config again continues after any failure: a finished stage says so and ends at once.
"""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from saemill.common import config as settings
from saemill.common import durable, records
from saemill.common.errors import ConfigError, StoreError
from saemill.common.log import say
from saemill.slurm.pipeline import Pipeline
from saemill.slurm.script import script
from saemill.slurm.states import JOBS, Entry, Jobs, submitted


def jobs_folder(run: Path) -> Path:
    """Return the folder of a run's scripts, logs and exit codes: beside it, as `train` wants the run's folder
    for itself."""
    return run.with_name(f"{run.name}.jobs")


@dataclass(frozen=True, slots=True)
class Plan:
    """The scripts of a pipeline, in the order of their submission."""

    folder: Path
    config: dict[str, Any]
    """All settings, for the folder's config.yaml."""
    scripts: dict[str, str]
    """Text by stage."""
    workers: int
    """Tasks of cache's array."""

    @classmethod
    def of(cls, pipeline: Pipeline) -> "Plan":
        """Plan what submitting the pipeline from this folder means."""
        folder = jobs_folder(pipeline.run)
        place = (folder.absolute(), pipeline.run.name, Path.cwd())
        scripts = {stage: script(stage, pipeline.slurm.job(stage), *place) for stage in pipeline.stages}
        return cls(folder, pipeline.plain(), scripts, pipeline.slurm.job("cache").workers or 1)

    def command(self, stage: str, after: str | None) -> list[str]:
        """Return the command that submits a stage's script, after the job `after` has ended well."""
        waiting = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
        return ["sbatch", "--parsable", *waiting, str(self.folder / f"{stage}.sh")]

    def __str__(self) -> str:
        """Show the scripts, and the commands that would submit them."""
        texts, before = [], None
        for stage, text in self.scripts.items():
            texts.append(f"# {' '.join(self.command(stage, before and f'<{before}>'))}\n{text}")
            before = stage
        return "\n".join(texts)


def run(file: Path, dry_run: bool = False) -> None:
    """Submit a pipeline, or with `dry_run` print its scripts.

    Raises:
        ConfigError: the config is wrong, or sbatch is missing or refuses a job; nothing stays submitted.
        StoreError: jobs of this run are alive.
    """
    pipeline = Pipeline.read(file)
    plan = Plan.of(pipeline)
    if dry_run:
        say(str(plan))
        return
    pipeline.check_input()
    settings.check_folder(plan.folder)
    if not shutil.which("sbatch"):
        raise ConfigError(
            "sbatch is not found here; run submit where SLURM's commands are, such as the login node, "
            "or --dry-run to see the scripts"
        )
    with durable.exclusive(plan.folder):
        _refuse_alive(plan.folder)
        _write(plan)
        jobs = _submit(plan)
    for entry in jobs:
        say(f"{entry.stage:8} job {entry.job}{_tasks(entry)}")
    say(f"scripts and logs: {plan.folder}; follow them with `saemill status {pipeline.run}`")


def _tasks(entry: Entry) -> str:
    return f", tasks 0-{entry.workers - 1}" if entry.workers and entry.workers > 1 else ""


def _refuse_alive(folder: Path) -> None:
    alive = [job for job in submitted(folder) if job.alive]
    if alive:
        names = ", ".join(f"{job.id} ({job.stage}, {job.state})" for job in alive)
        ids = " ".join(dict.fromkeys(job.id.split("_")[0] for job in alive))
        raise StoreError(
            f"jobs of {folder} are alive: {names}; wait for them, or end them with scancel {ids}"
        )


def _write(plan: Plan) -> None:
    text = yaml.safe_dump(plan.config, sort_keys=False)
    durable.write_bytes(plan.folder / "config.yaml", [text.encode()])
    for stage, text in plan.scripts.items():
        durable.write_bytes(plan.folder / f"{stage}.sh", [text.encode()])


def _submit(plan: Plan) -> list[Entry]:
    """Hand the scripts to sbatch one by one; when it refuses one, those before it are cancelled."""
    jobs: list[Entry] = []
    for stage in plan.scripts:
        done = subprocess.run(
            plan.command(stage, jobs[-1].job if jobs else None), capture_output=True, text=True
        )
        if done.returncode:
            if jobs:
                subprocess.run(["scancel", *(entry.job for entry in jobs)], check=True)
            raise ConfigError(
                f"sbatch refuses {plan.folder / f'{stage}.sh'}: {done.stderr.strip()}\n"
                "Nothing stays submitted; repair the section slurm and submit again."
            )
        job = done.stdout.strip().split(";")[0]
        jobs.append(Entry(stage=stage, job=job, workers=plan.workers if stage == "cache" else None))
        # After each one: a job that is not noted down would be submitted twice.
        records.write(plan.folder / JOBS, Jobs(jobs=tuple(jobs)))
    return jobs

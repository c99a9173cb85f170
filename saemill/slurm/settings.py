"""The section `slurm` of a config: what the jobs of each stage ask for."""

import re
from dataclasses import dataclass, fields
from typing import Any

from saemill.common.config import STAGES, shown
from saemill.common.errors import ConfigError
from saemill.common.setting import check, setting

TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d\d))?(?::(\d\d))?")
MEMORY = re.compile(r"\d+[KMGT]")
SAVES = ("cache", "train")
"""Stages that save on a signal and exit with code 75."""
ONLY_FOR = {
    "workers": ("cache",),
    "nodes": ("train", "assess"),
    "ntasks": ("train", "assess"),
    "gpus": ("cache", "train", "assess"),
    "signal_seconds": SAVES,
    "most_requeues": SAVES,
}
"""Settings that some stages cannot use; the others are for all."""
SIGNAL_SECONDS = 120
MOST_REQUEUES = 100
SET_HERE = {
    "array": "workers",
    "chdir": "the folder where submit runs",
    "cpus-per-task": "cpus",
    "dependency": "the order of the stages",
    "error": "the log's place",
    "job-name": "the run's name",
    "kill-on-invalid-dep": "the order of the stages",
    "no-requeue": "requeue: false",
    "ntasks": "ntasks",
    "open-mode": "the log's place",
    "output": "the log's place",
    "requeue": "requeue",
    "signal": "signal_seconds",
    "time": "time",
}
"""sbatch's options that follow from something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    """Resources that jobs ask for. A setting that a stage leaves open is that of the section."""

    partition: str | None = setting(None, "sbatch's partition")
    account: str | None = setting(None, "sbatch's account")
    qos: str | None = setting(None, "sbatch's qos")
    constraint: str | None = setting(None, "sbatch's constraint")
    time: str | None = setting(
        None, "Limit of each job, in quotes: '4:00:00', '2-00:00:00'", by_default="the partition's"
    )
    cpus: int | None = setting(None, "CPUs per process, and threads of each", least=1)
    memory: str | None = setting(None, "Memory per node: 64G")
    gpus: int | None = setting(None, "GPUs per node, one for each process there; tokenize uses none", least=0)
    workers: int | None = setting(
        None, "Tasks of cache's job array, which share out the shards", by_default="1", least=1
    )
    nodes: int | None = setting(None, "Nodes of train or assess", by_default="1", least=1)
    ntasks: int | None = setting(
        None, "Processes of train or assess on all nodes together", by_default="1", least=1
    )
    setup: str | None = setting(
        None, "Shell lines before the command: `module load cuda`, `source venv/bin/activate`"
    )
    python: str | None = setting(
        None,
        "What runs saemill, as shell words: `python`, `apptainer exec --nv saemill.sif python`",
        by_default="the Python that ran submit",
    )
    options: tuple[str, ...] | None = setting(
        None, "Further options of sbatch: [--exclusive, --mail-type=FAIL]"
    )
    requeue: bool | None = setting(
        None, "Whether a preempted, stopped or timed-out job starts again", by_default="true"
    )
    signal_seconds: int | None = setting(
        None, "Seconds before its limit at which a job of cache or train saves", by_default="120", least=1
    )
    most_requeues: int | None = setting(
        None, "Times that a job of cache or train is started again", by_default="100", least=1
    )

    def __post_init__(self) -> None:
        check(self)
        if self.time is not None and seconds(self.time) == 0:
            raise ConfigError(f"time must be longer than nothing, got {self.time}")
        if self.memory is not None and not MEMORY.fullmatch(self.memory):
            raise ConfigError(
                f"memory must be a number with K, M, G or T, such as 64G; got {shown(self.memory)}"
            )
        for option in self.options or ():
            _check_option(option)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmConfig(JobConfig):
    """The section: settings for all stages, and a group of each stage's own, which come first."""

    tokenize: JobConfig = setting(JobConfig(), "Of tokenize alone")
    cache: JobConfig = setting(JobConfig(), "Of cache alone")
    train: JobConfig = setting(JobConfig(), "Of train alone")
    assess: JobConfig = setting(JobConfig(), "Of assess alone")

    def __post_init__(self) -> None:
        # Not super(): a slotted dataclass is made anew by its decorator, which super() does not see.
        JobConfig.__post_init__(self)
        for stage in STAGES:
            for name, stages in ONLY_FOR.items():
                if getattr(getattr(self, stage), name) is not None and stage not in stages:
                    raise ConfigError(
                        f"slurm.{stage}.{name} has no effect; it is for {', '.join(stages)}: leave it out"
                    )
            _check_job(self.job(stage), stage)

    def job(self, stage: str) -> JobConfig:
        """Build what the jobs of one stage ask for: its own settings before those for all."""
        own = getattr(self, stage)
        chosen: dict[str, Any] = {}
        for name in (field.name for field in fields(JobConfig)):
            if stage in ONLY_FOR.get(name, STAGES):
                value = getattr(own, name)
                chosen[name] = getattr(self, name) if value is None else value
        return JobConfig(**chosen)


def seconds(time: str) -> int:
    """Parse a time limit in SLURM's notation, into seconds.

    Raises:
        ConfigError: it is none, or a bare number: YAML reads 4:00:00 without quotes as 14400, which
            SLURM would take for minutes.
    """
    match = TIME.fullmatch(time)
    if not match or time.isdigit():
        raise ConfigError(f"time must be as '4:00:00' or '2-00:00:00', in quotes; got {shown(time)}")
    days, *rest = match.groups()
    numbers = [int(number) for number in rest if number is not None]
    if days is None and len(numbers) == 2:
        numbers.insert(0, 0)  # SLURM reads 30:00 as minutes, but 1-12:30 as hours
    hours, minutes, remaining = numbers + [0] * (3 - len(numbers))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + remaining


def _check_option(option: str) -> None:
    """Refuse what is no option of sbatch, or one that other settings decide."""
    name = option.split("=")[0].split()[0] if option.strip() else ""
    if not name.startswith("-"):
        raise ConfigError(
            f"options must be sbatch's, such as [--exclusive, --mem-bind=local]; got {shown(option)}"
        )
    if decided := SET_HERE.get(name.lstrip("-")):
        raise ConfigError(f"the option {name} follows from {decided}; take it out of options")


def _check_job(job: JobConfig, stage: str) -> None:
    """Refuse settings that contradict one another."""
    where = f"slurm.{stage}"
    if job.requeue is False and job.most_requeues is not None:
        raise ConfigError(f"{where}: most_requeues has no effect without requeue; leave it out")
    lead = job.signal_seconds or SIGNAL_SECONDS
    if stage in SAVES and job.time and seconds(job.time) < lead + 60:
        raise ConfigError(
            f"{where}: of a time of {job.time}, {lead} seconds for saving leave less than a minute to work; "
            "raise time or lower signal_seconds"
        )
    nodes, ntasks = job.nodes or 1, job.ntasks or 1
    if ntasks % nodes:
        raise ConfigError(f"{where}: {ntasks} ntasks do not go evenly on {nodes} nodes")
    if job.gpus and job.gpus != ntasks // nodes:
        raise ConfigError(
            f"{where}: each process uses one GPU, but gpus is {job.gpus} per node for "
            f"{ntasks // nodes} of them there; make them equal, or leave out gpus"
        )

"""The section `slurm` of a config: what the jobs of each stage ask for."""

import re
from dataclasses import dataclass, field, fields
from typing import Any

from saemill.common.config import STAGES, shown
from saemill.common.errors import ConfigError

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

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | None = None
    """Limit of each job, in quotes: '4:00:00', '2-00:00:00'; by default the partition's."""
    cpus: int | None = None
    """CPUs per process; also the number of threads of each."""
    memory: str | None = None
    """Memory per node: 64G."""
    gpus: int | None = None
    """GPUs per node, one for each process there; tokenize uses none."""
    workers: int | None = None
    """Tasks of cache's job array [1]; they share the shards between them."""
    nodes: int | None = None
    """Nodes of train or assess [1]."""
    ntasks: int | None = None
    """Processes of train or assess on all nodes together [1]."""
    setup: str | None = None
    """Shell lines before the command: `module load cuda`, `source venv/bin/activate`."""
    python: str | None = None
    """What runs saemill, as shell words: `python`, `apptainer exec --nv saemill.sif python`; by default
    the Python that ran submit."""
    options: tuple[str, ...] | None = None
    """Further options of sbatch: [--exclusive, --mail-type=FAIL]."""
    requeue: bool | None = None
    """Whether a preempted, stopped or timed-out job starts again [true]."""
    signal_seconds: int | None = None
    """Seconds before its limit at which a job of cache or train is signalled to save [120]."""
    most_requeues: int | None = None
    """Most restarts of a job of cache or train [100]."""

    def __post_init__(self) -> None:
        for name in ("cpus", "workers", "nodes", "ntasks", "signal_seconds", "most_requeues"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be 1 or more, got {value}")
        if self.gpus is not None and self.gpus < 0:
            raise ConfigError(f"gpus must be 0 or more, got {self.gpus}")
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

    tokenize: JobConfig = field(default_factory=JobConfig)
    cache: JobConfig = field(default_factory=JobConfig)
    train: JobConfig = field(default_factory=JobConfig)
    assess: JobConfig = field(default_factory=JobConfig)

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
        for name in (setting.name for setting in fields(JobConfig)):
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

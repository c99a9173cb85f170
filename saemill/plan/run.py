"""`saemill plan`, and `--dry-run`: the plan of some stages, told as it grows; its sum at the end."""

import os
import platform
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from saemill.common.addresses import named
from saemill.common.errors import ConfigError
from saemill.common.log import duration, say
from saemill.common.outlook import shown
from saemill.common.world import World
from saemill.pipeline import matrix
from saemill.pipeline.chain import Chain
from saemill.plan.planner import Planned, Planner
from saemill.plan.probe import probing
from saemill.train.config import TrainConfig

CPU_INFO = Path("/proc/cpuinfo")


def of_chain(chain: Chain, measures: bool = True) -> list[Planned]:
    """Tell the plan of a pipeline; nothing is written.

    Returns: the plan of each stage.

    Raises:
        SaemillError: what its stages refuse.
    """
    return plan(chain.configs, measures, chain.placed)


def of_matrix(file: Path, targets: tuple[str, ...], sources: tuple[str, ...], measures: bool = True) -> None:
    """Tell the plan of every pair of a matrix that is not done; nothing is written.

    Raises:
        SaemillError: what their stages refuse.
    """
    for pair in matrix.pairs_of(file, targets, sources)[-1]:
        is_done = pair.is_done()
        say(f"\n{pair.name}" + (", done already" if is_done else ""))
        if not is_done:
            of_chain(pair.chain, measures)


def plan(
    configs: dict[str, Any],
    measures: bool = True,
    place: Callable[[str, Any], Any] = lambda _, config: config,
) -> list[Planned]:
    """Tell the plan of some stages that follow one another; nothing is written.

    Args:
        configs: by stage.
        measures: whether a little of each stage is run, in a temporary folder, to estimate its time.
        place: fills in the folder of a stage, where that is found by content.

    Returns: the plan of each stage.

    Raises:
        SaemillError: what the stages refuse.
    """
    if World.here().size > 1:
        raise ConfigError("a plan is made by one process; start it without torchrun or srun")
    with probing() if measures else nullcontext() as probe:
        planner, done = Planner(place, probe, _follower(configs)), []
        for number, (stage, config) in enumerate(configs.items(), 1):
            say(f"{number}. {stage}" if len(configs) > 1 else stage)
            done.append(planner.stage(stage, config))
            _tell(done[-1], planner.unmeasured)
        say(_sum(done, probe.measured_seconds if probe else 0.0))
    return done


def _follower(configs: dict[str, Any]) -> TrainConfig | None:
    """Return the settings of training where it follows caching, and what it has read is removed."""
    if "cache" not in configs or "train" not in configs:
        return None
    training: TrainConfig = configs["train"]
    return training if training.follow and configs["cache"].delete_consumed else None


def _tell(planned: Planned, unmeasured: str) -> None:
    """Tell the plan of one stage."""
    outlook, time = planned
    if outlook.is_done and outlook.folder is not None:
        say(f"  {named(outlook.folder)} is there already")
        return
    lines = [*outlook.lines(), *([time.describe(outlook.unit)] if time else [])]
    if time is None and unmeasured:
        lines.append(f"time: {unmeasured}")
    say("\n".join(f"  {line}" for line in lines))


def _sum(stages: list[Planned], measured_seconds: float) -> str:
    """Sum up the stages, and say where times are from."""
    outlooks = [outlook for outlook, _ in stages if not outlook.is_done]
    if not outlooks:
        return "everything is there already"
    disk = sum(outlook.disk_bytes for outlook in outlooks)
    memory = max(outlook.memory_bytes for outlook in outlooks)
    text = f"in all: {shown(disk)} of disk, {shown(memory)} of memory at most"
    times = [time.seconds for _, time in stages if time]
    if not times:
        return text
    return (
        f"{text}, about {duration(sum(times))}. Times are estimates, from {measured_seconds:.0f} s "
        f"of work on this machine ({machine()})"
    )


def machine() -> str:
    """Describe the machine: its CPU, torch's threads, and its GPUs."""
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return ", ".join([*gpus, f"{os.cpu_count()} cores of {cpu}", f"{threads} of torch's threads"])

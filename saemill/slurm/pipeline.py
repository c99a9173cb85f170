"""A config file as a pipeline: the stages it has, joined at the folders between them."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from saemill.common import config as settings
from saemill.common.config import STAGES
from saemill.common.errors import ConfigError
from saemill.common.stores.tokens import TokenStore
from saemill.pipeline.rows import check_rows
from saemill.pipeline.stages import (
    CONFIGS,
    absolute,
    check_amounts,
    check_input,
    check_removal,
    hand_on,
    join,
    stages_of,
)
from saemill.slurm.settings import SlurmConfig


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The stages of one config file, in their order, and how SLURM runs them."""

    stages: dict[str, Any]
    """Each one's config, whole."""
    slurm: SlurmConfig

    @classmethod
    def read(cls, file: Path) -> "Pipeline":
        """Read the pipeline of a config file. A folder that one of two neighbours names is filled in.

        Raises:
            ConfigError: a section is missing or wrong, or neighbours name different folders.
        """
        sections = settings.read_sections(file)
        slurm = settings.build(SlurmConfig, settings.read_section(file, "slurm"), "slurm")
        present = stages_of(sections, str(file))
        _check_jobs(file, present, sections["slurm"])
        for before, after in pairwise(present):
            if join(sections, before, after) is None:
                raise ConfigError(
                    f"{before}.out must be given: the folder that {before} writes and {after} reads"
                )
        hand_on(sections)
        if "run" in sections:
            raise ConfigError(f"the section run of {file} is for `saemill run`, and has no effect here")
        stages = {stage: settings.build(CONFIGS[stage], sections[stage], stage) for stage in present}
        _check_stages(file, stages)
        return cls(stages, slurm)

    @property
    def run(self) -> Path:
        """Return the folder that names the whole: the run, or the last store where nothing is trained."""
        if "assess" in self.stages:
            return Path(self.stages["assess"].run)
        return Path(next(reversed(self.stages.values())).out)

    def check_input(self) -> None:
        """Refuse a first stage whose input is not there, or has too few rows to train on.

        Raises:
            ConfigError: it is not, or has.
        """
        first, config = next(iter(self.stages.items()))
        check_input(first, config)
        if first == "cache" and "train" in self.stages:
            check_rows(TokenStore(config.tokens), self.stages, batch_is_set=True)

    def plain(self) -> dict[str, Any]:
        """List all settings, defaults included, as `--config` reads them; folders are absolute."""
        stages = {stage: settings.plain(absolute(config)) for stage, config in self.stages.items()}
        return stages | {"slurm": _without_unset(settings.plain(self.slurm))}


def _without_unset(values: dict[str, Any]) -> dict[str, Any]:
    """Keep the settings that are not left open, without groups that have none."""
    inner = {name: _without_unset(v) if isinstance(v, dict) else v for name, v in values.items()}
    return {name: value for name, value in inner.items() if value not in (None, {})}


def _check_jobs(file: Path, present: list[str], slurm: dict[str, Any]) -> None:
    """Refuse settings for jobs of stages that the file has not."""
    for stage in STAGES:
        if stage in slurm and stage not in present:
            raise ConfigError(f"slurm.{stage} has no effect: {file} has no section {stage}; leave it out")


def _check_stages(file: Path, stages: dict[str, Any]) -> None:
    """Refuse a training that would start anew whenever its job is requeued, and jobs that are bound to fail:
    for a batch that was meant in sequences, or without anything to assess on."""
    check_amounts(stages)
    check_removal(stages, "leave it out, as jobs of stages wait for one another")
    holds_out = "tokenize" not in stages or stages["tokenize"].held_out_fraction > 0
    if "assess" in stages and stages["assess"].tokens is None and not holds_out:
        raise ConfigError(
            f"{file}: nothing is held out to assess on; raise tokenize.held_out_fraction, name other text "
            "with assess.tokens, or leave out the section assess"
        )
    if "train" in stages and not stages["train"].resume:
        raise ConfigError(f"{file}: train.resume false would start anew at every requeue; leave it out")

"""A config file as a pipeline: the stages it has, joined at the folders between them."""

from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from saemill.assess.run import AssessConfig
from saemill.cache.run import CacheConfig
from saemill.common import config as settings
from saemill.common.config import STAGES
from saemill.common.errors import ConfigError
from saemill.slurm.settings import SlurmConfig
from saemill.tokenize.run import TokenizeConfig
from saemill.train.config import TrainConfig

CONFIGS: dict[str, Any] = {
    "tokenize": TokenizeConfig,
    "cache": CacheConfig,
    "train": TrainConfig,
    "assess": AssessConfig,
}
READS = {"cache": "tokens", "train": "acts", "assess": "run"}
"""The setting of each stage that names the `out` of the one before."""
MADE = {"cache": "manifest.json", "train": "zarr.json", "assess": "identity.json"}
"""A file in the folder that each stage reads."""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The stages of one config file, in their order, and how SLURM shall run them."""

    stages: dict[str, Any]
    """Each one's config, whole."""
    slurm: SlurmConfig

    @classmethod
    def read(cls, file: Path) -> "Pipeline":
        """The pipeline of a config file; a folder that one of two neighbours names is filled in.

        Raises:
            ConfigError: a section is missing or wrong, or neighbours name different folders.
        """
        sections = settings.read_sections(file)
        slurm = settings.build(SlurmConfig, settings.read_section(file, "slurm"), "slurm")
        present = [stage for stage in STAGES if stage in sections]
        _check_stages(file, present, sections["slurm"])
        for before, after in pairwise(present):
            _join(sections, before, after)
        return cls({s: settings.build(CONFIGS[s], sections[s], s) for s in present}, slurm)

    @property
    def run(self) -> Path:
        """The folder that names the whole: the run, or the last store where nothing is trained."""
        if "assess" in self.stages:
            return Path(self.stages["assess"].run)
        return Path(next(reversed(self.stages.values())).out)

    def check_input(self) -> None:
        """Refuse a first stage whose input is not there.

        Raises:
            ConfigError: it is not.
        """
        stage, config = next(iter(self.stages.items()))
        if stage in READS and not (getattr(config, READS[stage]) / MADE[stage]).exists():
            before = STAGES[STAGES.index(stage) - 1]
            raise ConfigError(
                f"{stage}.{READS[stage]} is {getattr(config, READS[stage])}, where nothing was made by "
                f"`saemill {before}`; name another folder, or add the section {before}"
            )

    def plain(self) -> dict[str, Any]:
        """All settings, defaults included, as `--config` reads them; their folders as seen from anywhere."""
        stages = {stage: settings.plain(_absolute(config)) for stage, config in self.stages.items()}
        return stages | {"slurm": _given(settings.plain(self.slurm))}


def _absolute(config: Any) -> Any:
    """A config whose folders do not depend on the one we are in."""
    values = {setting.name: getattr(config, setting.name) for setting in fields(config)}
    return replace(config, **{name: v.absolute() for name, v in values.items() if isinstance(v, Path)})


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """The settings that are not left open, without groups that have none."""
    inner = {name: _given(v) if isinstance(v, dict) else v for name, v in values.items()}
    return {name: value for name, value in inner.items() if value not in (None, {})}


def _check_stages(file: Path, present: list[str], slurm: dict[str, Any]) -> None:
    """Refuse a file without stages, with a gap between them, or with jobs of stages it has not."""
    if not present:
        raise ConfigError(f"{file} has no stage to submit; add sections: {', '.join(STAGES)}")
    first, last = STAGES.index(present[0]), STAGES.index(present[-1])
    if missing := [stage for stage in STAGES[first:last] if stage not in present]:
        raise ConfigError(f"{file} has {', '.join(present)} but not {', '.join(missing)} between them")
    for stage in STAGES:
        if stage in slurm and stage not in present:
            raise ConfigError(f"slurm.{stage} has no effect: {file} has no section {stage}; leave it out")


def _join(sections: dict[str, dict[str, Any]], before: str, after: str) -> None:
    """One folder between two stages, whichever of them names it."""
    named = {"out": sections[before].get("out"), READS[after]: sections[after].get(READS[after])}
    out, read = named.values()
    if out is None and read is None:
        raise ConfigError(f"{before}.out must be given: the folder that {before} writes and {after} reads")
    if out is not None and read is not None and Path(out).absolute() != Path(read).absolute():
        raise ConfigError(
            f"{before}.out is {out}, but {after}.{READS[after]} is {read}; {after} reads what {before} "
            "writes: name one folder, or leave one out"
        )
    sections[before] = sections[before] | {"out": out or read}
    sections[after] = sections[after] | {READS[after]: out or read}

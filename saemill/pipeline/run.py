"""`saemill run`: a model and a dataset, or a config file, through all stages."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from saemill.common import config as settings
from saemill.common.config import STAGES
from saemill.common.errors import ConfigError
from saemill.common.world import World, speak_for
from saemill.pipeline.chain import Chain
from saemill.pipeline.config import RunConfig
from saemill.pipeline.stages import Sections

FOR_SEVERAL = {"device": STAGES[1:], "device_map": ("cache", "assess"), "max_memory": ("cache", "assess")}
"""Settings that the command names once, and the stages that have them."""


def run(
    model: str | None,
    dataset: str | None,
    flags: Mapping[str, Any],
    file: Path | None = None,
    sets: Iterable[str] = (),
) -> Path:
    """Tokenize, cache, train and assess; what is there already is found again. Arguments as of `chain_of`.

    Returns: the folder of the run, or of the last store where the file ends before training.

    Raises:
        ConfigError: settings that are wrong, without effect, or do not fit together or the model.
    """
    return chain_of(model, dataset, flags, file, sets)()


def chain_of(
    model: str | None,
    dataset: str | None,
    flags: Mapping[str, Any],
    file: Path | None = None,
    sets: Iterable[str] = (),
    is_plan: bool = False,
) -> Chain:
    """Make the stages of a command, checked.

    Args:
        model: hub id or local folder; None takes the file's.
        dataset: hub id, or local file or folder; None takes the file's.
        flags: settings by dotted name (`train.k`), and those of `FOR_SEVERAL`; None means not set.
        file: a YAML file with a section per stage; without it, all four stages run.
        sets: `stage.key=value` strings.
        is_plan: whether it is only planned, and may be for another machine.

    Raises:
        ConfigError: settings that are wrong, without effect, or do not fit together or the model.
    """
    speak_for(World.here())
    sections: Sections = {stage: {} for stage in STAGES}
    if file:  # which may hold sections of other commands too
        file_sections = settings.read_sections(file)
        sections = {name: values for name, values in file_sections.items() if name in (*STAGES, "run")}
    sets = tuple(sets)
    all_flags = {"cache.model": model, "tokenize.dataset": dataset, **_dealt_out(flags, sections, sets)}
    present = [*sections, "run"]
    _refuse_other_sections(present, all_flags, sets)
    settings.override(sections, all_flags, sets)
    section = sections.pop("run", {})
    own = settings.build(RunConfig, section, "run")
    _refuse_end_to_end(sections)
    if "tokenize" in sections:
        _complete_tokenize(sections)
    if own.follow:
        _follow(sections)
    chain = Chain(sections, own.save_dir, own.run_name, str(file or "the command"), is_plan)
    if section.get("save_dir") is not None and not chain.finds_places:
        raise ConfigError("save_dir has no effect: the config names the folders of all stages; leave it out")
    return chain


def _dealt_out(flags: Mapping[str, Any], sections: Sections, sets: Iterable[str]) -> dict[str, Any]:
    """Give each stage the flags that are said once for several, unless `sets` says its own."""
    own = {item.partition("=")[0] for item in sets}
    dealt = {
        f"{stage}.{name}": flags.get(name)
        for name, stages in FOR_SEVERAL.items()
        for stage in stages
        if stage in sections and f"{stage}.{name}" not in own
    }
    return {name: value for name, value in flags.items() if name not in FOR_SEVERAL} | dealt


def _refuse_other_sections(present: list[str], flags: Mapping[str, Any], sets: Iterable[str]) -> None:
    flagged = [name for name, value in flags.items() if value is not None]
    for name in [*flagged, *(item.partition("=")[0] for item in sets)]:
        stage = name.partition(".")[0]
        if stage not in (*STAGES, "run"):
            raise ConfigError(f"--set takes stage.key=value here, got {name!r}: train.k=32, for instance")
        if stage not in present:
            raise ConfigError(
                f"{name} has no effect: the config has no section {stage}; add it or leave it out"
            )


def _follow(sections: Sections) -> None:
    """Let training follow caching."""
    if missing := [stage for stage in ("cache", "train") if stage not in sections]:
        raise ConfigError(
            f"run.follow has no effect without the section {missing[0]}; add it or leave it out"
        )
    sections["train"]["follow"] = True


def _refuse_end_to_end(sections: Sections) -> None:
    if (loss := sections.get("train", {}).get("loss")) in ("ce", "kl"):
        raise ConfigError(
            f"loss {loss} trains through the model, which saemill cannot do: it trains on cached "
            "activations. Use fvu or mse; `saemill assess` measures what the model loses"
        )


def _complete_tokenize(sections: Sections) -> None:
    """Fill in the tokenizer, which is the model's own if none is named; the dataset must be named."""
    values = sections["tokenize"]
    if values.get("dataset") is None and not values.get("mix"):
        raise ConfigError("name a dataset: saemill run MODEL DATASET, or tokenize.dataset in the config")
    if values.get("tokenizer") is None:
        if (model := sections.get("cache", {}).get("model")) is None:
            raise ConfigError("name a model: saemill run MODEL DATASET, or cache.model in the config")
        values["tokenizer"] = model
        values.setdefault("tokenizer_revision", sections["cache"].get("revision"))

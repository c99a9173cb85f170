"""The stages of a config file, in their order, and the folders that join them."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from saemill.assess.config import AssessConfig
from saemill.cache.config import CacheConfig
from saemill.common.addresses import address_of, is_there
from saemill.common.config import STAGES
from saemill.common.errors import ConfigError
from saemill.common.stores import runs
from saemill.tokenize.config import TokenizeConfig
from saemill.tokenize.run import CTX_LEN
from saemill.train.batch import check_batch
from saemill.train.config import TrainConfig

Sections = dict[str, dict[str, Any]]
"""Settings of the user, by stage."""

CONFIGS: dict[str, Any] = {
    "tokenize": TokenizeConfig,
    "cache": CacheConfig,
    "train": TrainConfig,
    "assess": AssessConfig,
}
READS = {"cache": "tokens", "train": "acts", "assess": "run"}
"""The setting of each stage that names the `out` of the one before."""
MADE = {"cache": "manifest.json", "train": "zarr.json", "assess": runs.IDENTITY}
"""A file in the folder that each stage reads."""


def stages_of(sections: Sections, where: str) -> list[str]:
    """List the stages; refuse none, or a gap between them.

    Args:
        sections: of a config.
        where: its file, for messages.

    Raises:
        ConfigError: no stage, or one is missing between others.
    """
    present = [stage for stage in STAGES if stage in sections]
    if not present:
        raise ConfigError(f"{where} has no stage; add sections: {', '.join(STAGES)}")
    first, last = STAGES.index(present[0]), STAGES.index(present[-1])
    if missing := [stage for stage in STAGES[first:last] if stage not in present]:
        raise ConfigError(f"{where} has {', '.join(present)} but not {', '.join(missing)} between them")
    return present


def join(sections: Sections, before: str, after: str) -> Path | None:
    """Join two stages by one folder, whichever of them names it; None if neither does.

    Raises:
        ConfigError: they name different ones.
    """
    folders = {"out": sections[before].get("out"), READS[after]: sections[after].get(READS[after])}
    out, read = folders.values()
    if out is None and read is None:
        return None
    if out is not None and read is not None and Path(out).absolute() != Path(read).absolute():
        raise ConfigError(
            f"{before}.out is {out}, but {after}.{READS[after]} is {read}; {after} reads what {before} "
            "writes: name one folder, or leave one out"
        )
    sections[before] = sections[before] | {"out": out or read}
    sections[after] = sections[after] | {READS[after]: out or read}
    return Path(str(out or read))


def hand_on(sections: Sections) -> None:
    """Let the assessment keep as much of a store in a bucket on the disk as training, unless it says itself
    how much, or reads activations on a disk."""
    if "assess" not in sections:
        return
    train, assess = sections.get("train", {}), sections["assess"]
    read = [assess.get(name) or train.get(name) for name in ("acts", "with_acts")]
    if assess.get("local_cache") is None and any(path and address_of(path) for path in read):
        sections["assess"] = assess | {"local_cache": train.get("local_cache")}


def absolute(config: Any) -> Any:
    """Make the folders of a config independent of the current one."""
    values = {setting.name: getattr(config, setting.name) for setting in fields(config)}
    paths = {name: v for name, v in values.items() if isinstance(v, Path) and address_of(v) is None}
    return replace(config, **{name: path.absolute() for name, path in paths.items()})


def check_input(stage: str, config: Any) -> None:
    """Refuse a first stage whose input is not there.

    Raises:
        ConfigError: it is not.
    """
    if stage in READS and not is_there(getattr(config, READS[stage]) / MADE[stage]):
        before = STAGES[STAGES.index(stage) - 1]
        raise ConfigError(
            f"{stage}.{READS[stage]} is {getattr(config, READS[stage])}, where nothing was made by "
            f"`saemill {before}`; name another folder, or add the section {before}"
        )


def check_removal(configs: dict[str, Any], advice: str) -> None:
    """Refuse to remove what training has read where training begins when caching has ended: `cache` would
    wait for ever.

    Args:
        configs: of the stages that there are.
        advice: what helps.

    Raises:
        ConfigError: shards are to be removed.
    """
    if "cache" in configs and "train" in configs and configs["cache"].delete_consumed:
        raise ConfigError(
            "cache.delete_consumed waits for training to read what is cached, and here training begins when "
            f"caching has ended; {advice}"
        )


def check_amounts(configs: dict[str, Any]) -> None:
    """Refuse amounts of tokens that cannot fit, as far as the settings alone tell.

    Args:
        configs: of the stages that there are.

    Raises:
        ConfigError: a batch that was meant in sequences, or less text than one step of training.
    """
    tokenize, train = configs.get("tokenize"), configs.get("train")
    if tokenize is None or train is None:
        return
    try:
        check_batch(train.batch_size, tokenize.ctx_len or CTX_LEN)
    except ConfigError as error:
        if tokenize.ctx_len is not None:
            raise
        raise ConfigError(
            f"{error}. Rows have {CTX_LEN} tokens unless tokenize.ctx_len says otherwise: name it for a "
            "dataset of ids in rows of another length"
        ) from None
    limits = [configs[stage].max_tokens for stage in ("tokenize", "cache")]
    n_tokens = min((limit for limit in limits if limit is not None), default=None)
    n_trained = train.max_tokens or (n_tokens and n_tokens * (train.epochs or 1))
    if n_trained is not None and n_trained < train.step_tokens:
        raise ConfigError(
            f"at most {n_trained:,} training tokens are less than one step of {train.step_tokens:,}; raise "
            "max_tokens or epochs, or lower batch_size"
        )

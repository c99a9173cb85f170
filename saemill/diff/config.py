"""The settings of `saemill diff`, and the crosscoder that they ask for."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saemill.common.config import build, override, read_section
from saemill.common.errors import ConfigError
from saemill.common.setting import about, axes, check, setting
from saemill.common.stores.site_names import BESIDE, JOINT, parts_of
from saemill.train.config import TrainConfig

ARCHITECTURE = "batchtopk"
"""That of the crosscoder, unless another is named: an L1 penalty makes latents look exclusive that are not
(Minder et al. 2025)."""
RUN = "run"
"""Name of the folder of the crosscoder's run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffConfig:
    """Settings of the command, beside those of its training."""

    out: Path = field(metadata=about("Folder of the run, the table and the page", decides=False))
    measure_tokens: int = setting(131_072, "Most held-out tokens to measure latents on", least=1)
    n_latents: int = setting(12, "Latents of each kind to show", least=0)
    n_contexts: int = setting(6, "Places to show where each of them fires most", least=0)
    context_tokens: int = setting(500_000, "Most tokens to search for these", least=1)

    def __post_init__(self) -> None:
        check(self)


def configs_of(
    flags: Mapping[str, Any], file: Path | None, sets: Iterable[str]
) -> tuple[DiffConfig, dict[str, Any]]:
    """Merge file, `--set` and flags, whose names begin with `train.` or `diff.`.

    Returns: the settings of the command, and those of its training that are given.

    Raises:
        ConfigError: an unknown or malformed setting.
    """
    merged: dict[str, Any] = {}
    for section in ("train", "diff"):
        if file is not None:
            merged[section] = read_section(file, section)
    override(merged, flags, sets)
    if unknown := sorted(set(merged) - {"train", "diff"}):
        raise ConfigError(
            f"{unknown[0]} is no group of settings of `saemill diff`; say train.KEY or diff.KEY"
        )
    config = build(DiffConfig, merged.get("diff", {}), "diff")
    return config, dict(merged.get("train", {}))


def crosscoder_of(out: Path, given: Mapping[str, Any], common_sites: list[str]) -> TrainConfig:
    """Fill in what a diff knows of its training: the joined site, the architecture, the folder.

    Args:
        out: folder of the diff.
        given: settings of `saemill train`.
        common_sites: sites that both stores have; those of the one where there is one.

    Raises:
        ConfigError: no two sites are named, or settings that make several crosscoders.
    """
    values = {"architecture": ARCHITECTURE, **given, "out": out / RUN}
    values["site"] = _joined(values.get("site"), values.get("with_acts") is not None, common_sites)
    config = build(TrainConfig, values, "train")
    several = [name for name in axes(TrainConfig) if len(getattr(config, name)) > 1]
    if several or config.variants:
        raise ConfigError(
            f"a diff is of one crosscoder, got several values of {(several or ['variants'])[0]}; "
            "`saemill train` makes many"
        )
    if len(parts_of(config.site[0])) != 2:
        raise ConfigError(
            f"a diff is of two sites, got {config.site[0]}; `saemill train` makes crosscoders of more"
        )
    return config


def _joined(site: Any, is_of_two: bool, common_sites: list[str]) -> str:
    """Join a site with the same site of the second model, where it is not joined already."""
    if isinstance(site, list | tuple) and len(site) == 1:
        site = site[0]
    if site is not None and (not isinstance(site, str) or "," in site):
        raise ConfigError(f"a diff is of one site, got {site}; name one with --site")
    if site is not None and JOINT in site:
        return site
    if not is_of_two:
        raise ConfigError(
            "name a second store to compare with, or two sites of the one: --site layers.2+layers.4"
        )
    if site is None:
        if len(common_sites) != 1:
            has = f"both stores have {', '.join(common_sites)}" if common_sites else "the stores share none"
            raise ConfigError(f"name a site of both stores with --site; {has}")
        site = common_sites[0]
    return f"{site}{JOINT}{BESIDE}{site}"

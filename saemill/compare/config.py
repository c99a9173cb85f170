"""The settings of `saemill compare`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from saemill.common.config import LARGEST
from saemill.common.errors import ConfigError
from saemill.common.setting import DEVICE, about, check, like, setting
from saemill.common.stores.kept_locally import KeptLocally


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareConfig:
    """Settings of the command."""

    saes: tuple[Path, ...] = field(metadata=about("Folders of SAEs, and of runs for all of their SAEs"))
    """In any format that `Sae.load` reads; runs are finished."""
    out: Path | None = setting(None, "Folder for a report", by_default="none")
    """Gets comparison.json, matches.parquet and report.html."""
    by: Literal["decoder", "encoder", "activations"] = setting(
        "decoder", "What latents are compared by", metavar="WHAT"
    )
    """The cosine of their rows, or the correlation of their codes."""
    matching: Literal["assignment", "nearest"] = setting(
        "assignment", "How latents are matched; nearest is for wide dictionaries", metavar="KIND"
    )
    """assignment: one to one, the best in sum; nearest: each with the one that is most alike."""
    assignment_limit: int | None = setting(
        None, "Most latents of either dictionary for an assignment", by_default="16384", least=1
    )
    threshold: float = setting(0.7, "Matched latents more similar than this are shared", within="[-1, 1)")
    acts: tuple[Path, ...] = setting(
        (),
        "Activation store of the SAEs' model: leaves out latents that its held-out tokens do not make fire; "
        "repeat for several models",
        metavar="STORE",
    )
    local_cache: str | None = like(KeptLocally, "local_cache")
    max_tokens: int | None = setting(None, "Most of these tokens", by_default="131072", least=1)
    seed: int = setting(0, "Seed of the random dictionaries", least=0, most=LARGEST)
    device: str = setting("auto", DEVICE)

    def __post_init__(self) -> None:
        check(self)
        if self.by == "activations" and not self.acts:
            raise ConfigError(
                "--by activations needs the activations of some tokens; name stores with --acts"
            )
        if self.local_cache is not None and not self.acts:
            raise ConfigError("local_cache has no effect without acts; leave it out")
        if self.max_tokens is not None and not self.acts:
            raise ConfigError("max_tokens has no effect without acts; leave it out")
        if self.by == "activations" and self.seed:
            raise ConfigError("seed has no effect with --by activations; leave it out")
        if self.assignment_limit is not None and self.matching == "nearest":
            raise ConfigError("assignment_limit has no effect with matching nearest; leave it out")

"""The settings of `saemill export-latents`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from saemill.common.errors import ConfigError
from saemill.common.ranges import parsed
from saemill.common.setting import DEVICE, about, check, like, setting
from saemill.common.stores.kept_locally import KeptLocally

HAS_EFFECT = {
    "model": ("delphi", "saedashboard"),
    "latents": ("delphi", "saedashboard"),
    "max_tokens": ("delphi", "saedashboard"),
    "ctx": ("delphi", "saedashboard"),
    "held_out": ("delphi", "saedashboard"),
    "n_splits": ("delphi",),
    "release": ("saedashboard", "saebench"),
}
"""The formats in which a setting has an effect, of those that have it in some alone."""
MAX_TOKENS = {"delphi": 10_000_000, "saedashboard": 24_576 * 128}
"""Each tool's own default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportLatentsConfig:
    """Settings of the command."""

    run: Path = field(metadata=about("A finished run, or the folder of one of its SAEs", decides=False))
    format: Literal["delphi", "saedashboard", "saebench"] = field(
        metadata=about("What the files are for", metavar="NAME")
    )
    out: Path = field(metadata=about("Folder to write, new or empty", decides=False))
    acts: Path | None = setting(None, "The activation store, if it moved", decides=False)
    local_cache: str | None = like(KeptLocally, "local_cache")
    model: str | None = setting(None, "The model, if not where it was cached from", decides=False)
    latents: tuple[str, ...] = setting((), "Latents to export", by_default="all", metavar="I-J,K,…")
    """Numbers, and ranges with both ends included."""
    max_tokens: int | None = setting(
        None,
        "Most tokens, in whole rows",
        by_default="10M for delphi, 24,576 × 128 for saedashboard",
        least=1,
    )
    ctx: int | None = setting(
        None,
        "Tokens per row: the store's rows are cut to so many",
        by_default="the store's; 128 for saedashboard where that divides it",
        least=1,
    )
    held_out: bool = setting(False, "Only rows that training did not see")
    n_splits: int | None = setting(
        None, "Files of a delphi cache, of a range of latents each", by_default="5", least=1
    )
    release: str | None = setting(
        None, "What the set of SAEs is called", by_default="the name of the run's folder"
    )
    device: str = setting("auto", DEVICE, decides=False)

    def __post_init__(self) -> None:
        check(self)
        for name, formats in HAS_EFFECT.items():
            given = getattr(self, name)
            if given not in (None, (), False) and self.format not in formats:
                raise ConfigError(f"{name} has no effect with format {self.format}; leave it out")
        if self.release is not None and not (self.release.strip() and self.release.isprintable()):
            raise ConfigError(f"release must be a name of printable characters, got {self.release!r:.80}")
        for item in self.latents:
            parsed(item)

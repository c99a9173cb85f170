"""The settings of `saemill view`."""

from dataclasses import dataclass, field
from pathlib import Path

from saemill.assess.config import AssessConfig
from saemill.common.setting import about, check, like, setting


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewConfig:
    """Settings of the command."""

    run: Path = field(metadata=about("An assessed run, or the folder of one of its SAEs"))
    port: int = setting(8321, "Port on this machine; 0 for any that is free", least=0, most=65_535)
    acts: Path | None = like(AssessConfig, "acts")
    with_acts: Path | None = like(AssessConfig, "with_acts")
    local_cache: str | None = like(AssessConfig, "local_cache")
    model: str | None = like(AssessConfig, "model")
    n_contexts: int = like(AssessConfig, "n_contexts")
    n_samples: int = like(AssessConfig, "n_samples")
    context_tokens: int = like(AssessConfig, "context_tokens")
    device: str = like(AssessConfig, "device")

    def __post_init__(self) -> None:
        check(self)

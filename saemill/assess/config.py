"""The settings of the stage, and what of them decides its result."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saemill.assess.verdict import Thresholds
from saemill.common import config as settings
from saemill.common import durable
from saemill.common.errors import ConfigError, StoreError
from saemill.common.stores import assessments, runs
from saemill.common.stores.tokens import TokenStore


@dataclass(frozen=True, slots=True, kw_only=True)
class AssessConfig:
    """Settings of the stage."""

    run: Path
    """Folder of a finished run."""
    acts: Path | None = None
    """The activation store, if it is no longer where training read it."""
    model: str | None = None
    """Hub id or local folder; by default the one that was cached."""
    with_model: bool = True
    """Whether the model is run with the SAEs spliced in; false leaves out the losses."""
    tokens: Path | None = None
    """Token store to assess on instead of the held-out rows."""
    out: Path | None = None
    """Folder to write; by default the run's folder, or `on-<name>` in it for other tokens."""
    max_tokens: int = 1_000_000
    """Most tokens for reconstruction and firing."""
    model_tokens: int = 100_000
    """Most tokens for the losses, in whole rows."""
    batch_size: int = 8
    """Rows per forward pass."""
    device: str = "auto"
    dead_percentage_threshold: float = 0.0005
    """Share of the tokens; a latent that fires on fewer counts as dead."""
    thresholds: Thresholds = field(default_factory=Thresholds)
    latents: tuple[int, ...] = ()
    """Latents of the shown variant whose contexts are wanted, beside random live ones."""
    variant: str | None = None
    """The variant whose latents are shown; by default the best."""
    n_latents: int = 12
    """Random live latents shown."""
    n_contexts: int = 8
    """Contexts per latent, at most one per document."""
    context_tokens: int = 500_000
    """Most tokens searched for contexts."""
    log_to_wandb: bool | None = None
    """Whether the assessment goes to the run's wandb runs; by default where training logged to wandb."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "model_tokens", "batch_size", "n_contexts", "context_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not 0 <= self.dead_percentage_threshold < 1:
            raise ConfigError(
                f"dead_percentage_threshold must be in [0, 1), got {self.dead_percentage_threshold}"
            )
        settings.at_least(self, 0, "latents")
        if self.n_latents < 0:
            raise ConfigError(f"n_latents must be 0 or more, got {self.n_latents}")
        if self.variant is not None and self.n_latents == 0 and not self.latents:
            raise ConfigError("variant has no effect where no latent is shown; leave it out")
        if self.model is not None and not self.with_model and self.tokens is None:
            raise ConfigError("model has no effect with --no-model; leave one out")

    @property
    def folder(self) -> Path:
        """Return the folder that the assessment is written to."""
        return self.out or (self.run if self.tokens is None else self.run / f"on-{self.tokens.name}")

    def is_done(self) -> bool:
        """Tell whether the folder holds, whole, the assessment of this run, on this text, by these
        settings."""
        try:
            assessment = assessments.read(self.folder)
            is_whole = not assessments.problems(self.folder)
        except StoreError:  # assessed again, it is whole
            return False
        try:
            of = self.of()
        except FileNotFoundError:
            return False
        return is_whole and (assessment["settings"], assessment["of"]) == (self.identity(), of)

    def of(self) -> str:
        """Hash what is assessed: the run, whose SAEs know their store, and the tokens if they are named.

        Raises:
            FileNotFoundError: the run or the tokens are unfinished.
        """
        run = durable.hash_file(self.run / runs.FINISHED)
        if self.tokens is None:
            return run
        return durable.hash_json([run, TokenStore(self.tokens).fingerprint])

    def identity(self) -> dict[str, Any]:
        """List the settings that decide the result, except the run."""
        skip = ("run", "acts", "model", "out", "device", "log_to_wandb")
        return {key: value for key, value in settings.plain(self).items() if key not in skip}

"""The settings of `saemill assess`."""

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from saemill.common.config import LARGEST
from saemill.common.errors import ConfigError
from saemill.common.ranges import parsed
from saemill.common.setting import DEVICE, about, check, identity, like, setting
from saemill.common.stores.kept_locally import KeptLocally
from saemill.common.weights import DeviceMap, Weights

PROBE_K = (1, 2, 5, 20)
PROBE_EXAMPLES = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """What a healthy SAE reaches."""

    min_loss_recovered: float = setting(
        0.60, "Least loss recovered of a healthy SAE, against zero-ablation", least=-1, most=LARGEST
    )
    min_l0: float = setting(20.0, "Fewest active latents per token of a healthy SAE", least=0, most=LARGEST)
    max_l0: float = setting(200.0, "Most active latents per token of a healthy SAE", least=0, most=LARGEST)
    max_dead_fraction: float = setting(0.20, "Largest share of dead latents of a healthy SAE")
    max_decoder_cosine: float = setting(
        0.25, "Largest mean, over latents, of the cosine to the most similar decoder row, of a healthy SAE"
    )

    def __post_init__(self) -> None:
        check(self)
        for name in ("min_loss_recovered", "max_dead_fraction", "max_decoder_cosine"):
            if not getattr(self, name) <= 1 or (name.startswith("max") and getattr(self, name) < 0):
                raise ConfigError(f"{name} must be a share, at most 1, got {getattr(self, name)}")
        if self.min_l0 > self.max_l0:
            raise ConfigError(f"min_l0 must be at most max_l0 ({self.max_l0}), got {self.min_l0}")


@dataclass(frozen=True, slots=True, kw_only=True)
class AssessConfig:
    """Settings of the stage."""

    run: Path = field(metadata=about("A folder made by `saemill train`", decides=False))
    acts: Path | None = setting(None, "The activation store, if it moved", decides=False)
    with_acts: Path | None = setting(
        None, "The second model's activation store of a crosscoder, if it moved", decides=False
    )
    local_cache: str | None = like(KeptLocally, "local_cache")
    model: str | None = setting(None, "The model, if not where it was cached from", decides=False)
    with_acts_model: str | None = setting(
        None,
        "The second model of a crosscoder of two, if not where it was cached from",
        decides=False,
    )
    with_model: bool = setting(True, "Measure losses with the SAE spliced into the model")
    tokens: Path | None = setting(None, "Assess on this token store, not the held-out rows")
    out: Path | None = setting(None, "Where to write", by_default="the run's folder", decides=False)
    """By default `on-<name>` in the run's folder for other tokens."""
    max_tokens: int = setting(1_000_000, "Most tokens for reconstruction and firing", least=1)
    model_tokens: int = setting(100_000, "Most tokens for the losses, in whole rows", least=1)
    batch_size: int = setting(8, "Rows per forward pass", metavar="ROWS", least=1)
    device: str = setting("auto", DEVICE, decides=False)
    device_map: DeviceMap | None = like(Weights, "device_map")
    max_memory: tuple[str, ...] = like(Weights, "max_memory")
    dead_percentage_threshold: float = setting(
        0.0005, "A latent active on a smaller share of tokens is dead", within="[0, 1)"
    )
    thresholds: Thresholds = setting(Thresholds(), "What a healthy SAE reaches")
    latents: tuple[int, ...] = setting(
        (), "Latents to show beside random ones", metavar="I,J", least=0, most=LARGEST
    )
    variant: str | None = setting(None, "Whose latents are shown", by_default="the best")
    n_latents: int = setting(500, "Random live latents to show", least=0)
    n_contexts: int = setting(
        8, "Contexts of the strongest activations per latent, at most one per document", least=1
    )
    n_samples: int = setting(2, "Contexts per fifth of a latent's activations, drawn at random", least=0)
    page_bytes: int = setting(
        10_000_000,
        "Most bytes of the report; latents beyond that are left out of it",
        metavar="BYTES",
        least=100_000,
    )
    most_beside: int = setting(
        32_768,
        "Most latents of an SAE for all of them to be written beside the report; 0 for none",
        least=0,
        later=True,
    )
    context_tokens: int = setting(500_000, "Most tokens searched for contexts", least=1)
    together: bool = setting(
        False,
        "Measure transcoders of one layer each also all at once, as a cross-layer transcoder",
        later=True,
    )
    probes: bool = setting(False, "Probe for labels that the text brings, on few latents", later=True)
    probe_k: tuple[int, ...] = setting(
        (), "Latents that a probe may read", by_default="1,2,5,20", metavar="K,…", least=1, later=True
    )
    absorption: bool = setting(False, "Measure how much of a concept its own latents miss", later=True)
    probe_examples: int | None = setting(
        None,
        "Most words, and most tokens of documents, that probes are fitted to and tried on",
        by_default="100k",
        least=100,
        later=True,
    )
    log_to_wandb: bool | None = setting(
        None, "Add it to the run's wandb runs", by_default="as the run was", decides=False
    )

    def __post_init__(self) -> None:
        check(self)
        if self.variant is not None and self.n_latents == 0 and not self.latents:
            raise ConfigError("variant has no effect where no latent is shown; leave it out")
        if self.model is not None and not self.with_model and self.tokens is None:
            raise ConfigError("model has no effect with --no-model; leave one out")
        if self.with_acts_model is not None and not self.with_model:
            raise ConfigError("with_acts_model has no effect with --no-model; leave one out")
        if self.spread.device_map is not None and not self.with_model:
            raise ConfigError("device_map has no effect with --no-model; leave one out")
        if self.probe_k and not self.probes:
            raise ConfigError("probe_k has no effect without --probes; add that, or leave it out")
        if self.probe_examples is not None and not (self.probes or self.absorption):
            raise ConfigError(
                "probe_examples has no effect without --probes or --absorption; add one, or leave it out"
            )
        if any(low >= high for low, high in pairwise(self.probe_k)):
            raise ConfigError(f"probe_k must be ascending, got {', '.join(map(str, self.probe_k))}")

    @property
    def folder(self) -> Path:
        """Return the folder that the assessment is written to."""
        return self.out or (self.run if self.tokens is None else self.run / f"on-{self.tokens.name}")

    @property
    def spread(self) -> Weights:
        """Return over which devices the model is dealt."""
        return Weights(device_map=self.device_map, max_memory=self.max_memory)

    def identity(self) -> dict[str, Any]:
        """Collect the settings that decide the result, but for the run."""
        return identity(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentConfig:
    """Settings of `saemill latent`."""

    run: Path = field(metadata=about("A finished run, or the folder of one of its SAEs"))
    latents: tuple[str, ...] = field(metadata=about("Latents to show: 7, or 0-99", metavar="I-J,K,…"))
    """Numbers, and ranges with both ends included."""
    out: Path | None = setting(None, "HTML page to write", by_default="", metavar="PAGE")
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
        if not self.latents:
            raise ConfigError("latents must name one or more, as 7 or 0-99, got none")
        if self.out is not None and self.out.is_dir():
            raise ConfigError(
                f"out must be a page, as {self.out / 'latents.html'}, got the folder {self.out}"
            )
        for item in self.latents:
            parsed(item)

"""The settings of `saemill generate`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from saemill.common.config import LARGEST
from saemill.common.errors import ConfigError
from saemill.common.setting import DEVICE, about, check, setting


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig:
    """Settings of the command."""

    model: tuple[str, ...] = field(
        metadata=about("Hub id or folder of a causal model; repeat or separate by commas", metavar="M,…")
    )
    """A file is named by the last part."""
    out: Path = field(metadata=about("Folder to write", decides=False))
    n_samples: int | None = setting(None, "Samples per model, before the cut to one size", least=1)
    tokens_per_dataset: int | None = setting(
        None, "In place of n-samples: sample until each model has so many tokens", least=1
    )
    max_tokens: int = setting(256, "Most tokens per sample", least=1)
    seed: int = setting(42, "Seed of the samples", least=0, most=LARGEST)
    temperature: float = setting(1.0, "Divides the logits")
    top_p: float = setting(
        0.9, "Sample from the most probable tokens that sum to this; 1 from all", within="(0, 1]"
    )
    stop_at_eos: bool = setting(True, "A sample ends before an EOS")
    """False: each has `max_tokens` tokens, EOS among them."""
    batch_size: int = setting(32, "Samples at once, and per file", decides=False, least=1)
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = setting(
        "auto",
        "Type the model computes in",
        by_default="auto: bf16 on a GPU, fp32 on a CPU",
        metavar="TYPE",
    )
    device: str = setting("auto", DEVICE, decides=False)
    revision: str | None = setting(None, "The hub models' revision", metavar="REV")

    def __post_init__(self) -> None:
        check(self)
        if (self.n_samples is None) == (self.tokens_per_dataset is None):
            raise ConfigError("give one of n_samples and tokens_per_dataset: how much text is wanted")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"temperature must be more than 0, got {self.temperature}")
        names = list(self.named())
        if len(names) < len(self.model) or not names:
            raise ConfigError(f"model must list models of different last names, got {', '.join(self.model)}")

    def named(self) -> dict[str, str]:
        """Find each model by the name of its dataset."""
        return {Path(model).absolute().name: model for model in self.model}

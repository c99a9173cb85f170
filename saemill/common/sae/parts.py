"""The config and tensors of a TopK SAE, as files of any format hold them and `Sae` is made of."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from saemill.common.errors import ConfigError, SaemillError
from saemill.common.log import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class SaeConfig:
    """Shape and provenance of one SAE."""

    d_in: int
    """Length D of the activation vectors."""
    num_latents: int
    """Number F of latents."""
    k: int
    """Most latents active per token."""
    provenance: dict[str, Any]
    """Origin of the SAE: site, model, training settings, versions."""

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.num_latents:
            raise ConfigError(f"k must be in 1..num_latents ({self.num_latents}), got {self.k}")


@dataclass(frozen=True, slots=True)
class Parts:
    """An SAE as tensors."""

    config: SaeConfig
    W_enc: Tensor
    """Encoder weights [F, D]."""
    b_enc: Tensor
    """Encoder bias [F]."""
    W_dec: Tensor
    """Decoder weights [F, D], a row per latent."""
    b_dec: Tensor
    """Decoder bias [D]."""

    @property
    def weights(self) -> dict[str, Tensor]:
        """Tensors by name."""
        return {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}

    def check_finite(self, where: str, kind: type[SaemillError]) -> None:
        """Refuse weights with NaN or infinite values.

        Args:
            where: what the message begins with.
            kind: the error.
        """
        for name, weights in self.weights.items():
            n_bad = weights.numel() - int(weights.isfinite().sum())
            if n_bad:
                count = f"{counted(n_bad, 'value')} of {name} {'is' if n_bad == 1 else 'are'} NaN or infinite"
                raise kind(f"{where} is of no use: {count}")


def apart(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights as safetensors takes them: on the CPU, contiguous, none in another's memory (as those
    of an encoder tied to its decoder are)."""
    own: dict[str, Tensor] = {}
    taken = set()
    for name, weight in weights.items():
        plain = weight.detach().cpu().contiguous()
        place = plain.untyped_storage().data_ptr()
        own[name] = plain.clone() if place in taken else plain
        taken.add(place)
    return own

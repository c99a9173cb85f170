"""The meaning of a sparse autoencoder: TopK after Gao et al. 2024, and its files on disk.

    f = ReLU(TopK_k(W_enc (x − b_dec) + b_enc)),    x̂ = W_decᵀ f + b_dec

A saved SAE takes activations as the model produces them: the scale and the centre that training
used are folded into the biases. The folder holds `cfg.json` and `sae.safetensors`, in the layout
that sparsify reads (`encoder.weight` [F, D], `encoder.bias` [F], `W_dec` [F, D], `b_dec` [D]).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from saemill.common import durable
from saemill.common.errors import ConfigError, StoreError
from saemill.common.topk import topk


@dataclass(frozen=True, slots=True, kw_only=True)
class SaeConfig:
    """Shape and provenance of one SAE."""

    d_in: int
    """D, length of the activation vectors."""
    num_latents: int
    """F."""
    k: int
    """Most latents active per token."""
    provenance: dict[str, Any]
    """Where it came from: site, model, training settings, versions."""

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.num_latents:
            raise ConfigError(f"k must be in 1..num_latents ({self.num_latents}), got {self.k}")


class Encoded(NamedTuple):
    """The active latents of some tokens."""

    top_acts: Tensor
    """[..., k], 0 or more, in no particular order; a 0 is an unused slot."""
    top_indices: Tensor
    """int64 [..., k], the latents' numbers."""


class SaeOutput(NamedTuple):
    """A reconstruction and the latents it is made of."""

    reconstruction: Tensor
    """[..., D]."""
    top_acts: Tensor
    """[..., k]."""
    top_indices: Tensor
    """int64 [..., k]."""


class Sae(nn.Module):
    """A TopK sparse autoencoder.

    Args:
        config: its shape.
        W_enc: [F, D]; b_enc: [F]; W_dec: [F, D], rows of unit length; b_dec: [D].
    """

    def __init__(self, config: SaeConfig, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> None:
        super().__init__()
        self.config = config
        self.W_enc = nn.Parameter(W_enc)
        self.b_enc = nn.Parameter(b_enc)
        self.W_dec = nn.Parameter(W_dec)
        self.b_dec = nn.Parameter(b_dec)

    def pre_acts(self, x: Tensor) -> Tensor:
        """W_enc (x − b_dec) + b_enc. x: [..., D] → [..., F], in the weights' dtype."""
        return nn.functional.linear(x.to(self.W_enc.dtype) - self.b_dec, self.W_enc, self.b_enc)

    def encode(self, x: Tensor) -> Encoded:
        """The k largest pre-activations of each token, negative ones set to 0. x: [..., D]."""
        pre = self.pre_acts(x)
        values, indices = topk(pre.flatten(0, -2) if pre.dim() > 1 else pre[None], self.config.k)
        shape = (*pre.shape[:-1], self.config.k)
        return Encoded(values.view(shape), indices.view(shape))

    def decode(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
        """x̂ from active latents. [..., k] and int64 [..., k] → [..., D]."""
        k = top_acts.shape[-1]
        bags = nn.functional.embedding_bag(
            top_indices.reshape(-1, k),
            self.W_dec,
            per_sample_weights=top_acts.reshape(-1, k).to(self.W_dec.dtype),
            mode="sum",
        )
        return bags.view(*top_acts.shape[:-1], -1) + self.b_dec

    def forward(self, x: Tensor) -> SaeOutput:
        """Encode and decode. x: [..., D]."""
        encoded = self.encode(x)
        return SaeOutput(self.decode(*encoded), *encoded)

    def save(self, folder: Path | str) -> None:
        """Write `cfg.json` and `sae.safetensors`."""
        folder = Path(folder)
        weights = {
            "encoder.weight": self.W_enc,
            "encoder.bias": self.b_enc,
            "W_dec": self.W_dec,
            "b_dec": self.b_dec,
        }
        folder.mkdir(parents=True, exist_ok=True)
        with durable.replacing(folder / "sae.safetensors") as partial:
            save_file({name: w.detach().cpu().contiguous() for name, w in weights.items()}, partial)
        config = self.config
        durable.write_json(
            folder / "cfg.json",
            {
                "activation": "topk",
                "expansion_factor": config.num_latents / config.d_in,
                "normalize_decoder": True,
                "num_latents": config.num_latents,
                "k": config.k,
                "multi_topk": False,
                "skip_connection": False,
                "transcode": False,
                "d_in": config.d_in,
                "saemill": config.provenance,
            },
        )

    @classmethod
    def load(cls, folder: Path | str, device: str | torch.device = "cpu") -> "Sae":
        """Read an SAE that `save` wrote.

        Raises:
            StoreError: a file is missing, or the weights do not fit the config.
        """
        folder = Path(folder)
        try:
            cfg = durable.read_json(folder / "cfg.json")
            weights = load_file(folder / "sae.safetensors", device=str(device))
        except FileNotFoundError as error:
            raise StoreError(f"{folder} holds no SAE: {error.filename or error} is missing") from None
        config = SaeConfig(
            d_in=cfg["d_in"],
            num_latents=cfg["num_latents"],
            k=cfg["k"],
            provenance=cfg.get("saemill", {}),
        )
        wide, narrow = (config.num_latents, config.d_in), (config.d_in,)
        shapes = {"encoder.weight": wide, "encoder.bias": wide[:1], "W_dec": wide, "b_dec": narrow}
        for name, shape in shapes.items():
            if name not in weights or tuple(weights[name].shape) != shape:
                got = tuple(weights[name].shape) if name in weights else "nothing"
                raise StoreError(f"{folder}: {name} must be {shape} by its cfg.json, got {got}")
        return cls(config, *(weights[name] for name in shapes))

"""The settings of `saemill cache`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from saemill.common import elsewhere
from saemill.common.errors import ConfigError
from saemill.common.stores.mask import MaskConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Settings of the stage."""

    tokens: Path
    """A token store."""
    model: str
    """Hub id or local folder."""
    out: Path
    """Folder of the activation store, new or to be added to."""
    layers: tuple[int, ...] = ()
    """Blocks whose outgoing residual stream is cached; -1 is the last."""
    sites: tuple[str, ...] = ()
    """Globs over module paths, and `residual.<layer>`."""
    layer_stride: int | None = None
    """Stride over blocks, from block 0: in place of `layers` and `sites`."""
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """Stored type of activations; by default as the store that is added to, else bf16."""
    model_dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Type that the model computes in; auto: as for the store that is added to, else bf16 on a GPU and fp32
    on a CPU."""
    max_tokens: int | None = None
    """Most tokens to cache, from the first rows on; by default as many as are in the store that is added to,
    else all."""
    batch_size: int = 16
    """Rows per forward pass."""
    shard_tokens: int | None = None
    """Tokens per shard file, rounded down to whole rows (one at least); by default as the store that is
    added to, else 65,536."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …"""
    revision: str | None = None
    """The hub model's revision."""
    mask: MaskConfig | None = None
    """Positions that statistics, training and assessment leave out; nothing is left out on disk. By
    default as the store that is added to, else those of `MaskConfig`."""
    allow_other_tokenizer: bool = False
    """Whether tokens of another tokenizer than the one that comes with the model are accepted."""
    load_in_8bit: bool | None = None
    """Whether the model's weights are loaded as 8-bit integers, with bitsandbytes on a CUDA device; by
    default as for the store that is added to, else not."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "shard_tokens", "layer_stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be 1 or more, got {value}")
        chosen = [name for name in ("layers", "sites", "layer_stride") if getattr(self, name)]
        if not chosen:
            raise ConfigError(
                "name what to cache: add --layers -1 for the residual stream after the last block; others: "
                "--layers 2,4, --sites 'layers.*.mlp' or --layer-stride 2"
            )
        if self.layer_stride not in (None, 1) and len(chosen) > 1:
            raise ConfigError(f"layer_stride chooses all layers itself; leave out {chosen[0]}")
        for site in self.sites:
            if here := elsewhere.of_hook(site):
                raise ConfigError(here)

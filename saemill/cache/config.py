"""The settings of `saemill cache`. What is left open is as in the store that is added to."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from saemill.common import elsewhere
from saemill.common.addresses import address_of
from saemill.common.errors import ConfigError
from saemill.common.setting import DEVICE, about, check, like, setting
from saemill.common.sizes import size_of
from saemill.common.stores.mask import MaskConfig
from saemill.common.weights import DeviceMap, Weights, bits_of


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Settings of the stage."""

    tokens: Path = field(metadata=about("A folder or an address made by `saemill tokenize`", decides=False))
    model: str = field(metadata=about("Hub id or folder of the model"))
    out: Path = field(
        metadata=about("Activation store, new or to be added to: a folder, or an address", decides=False)
    )
    layers: tuple[int, ...] = setting(
        (), "Residual stream after these blocks: 2,4; -1 is the last", metavar="I,J"
    )
    sites: tuple[str, ...] = setting(
        (), "Globs over module paths and residual.N: 'layers.*.mlp', or 'layers.*.mlp:in'", metavar="GLOBS"
    )
    layer_stride: int | None = setting(None, "Every N-th block, from block 0", least=1)
    """In place of `layers` and `sites`."""
    dtype: Literal["bf16", "fp16", "fp32", "int8"] | None = setting(
        None, "Type of the stored activations", by_default="the store's, or bf16", metavar="TYPE"
    )
    """int8 takes half the bytes of bf16, at a relative error of about 1e-4 in place of 3e-6."""
    compression: Literal["raw", "lz4", "zstd"] | None = setting(
        None,
        "Lossless compression of the shards",
        by_default="the store's, or raw",
        metavar="NAME",
        later=True,
    )
    model_dtype: Literal["auto", "bf16", "fp16", "fp32"] = setting(
        "auto",
        "Type the model computes in",
        by_default="auto: the store's, or bf16 on a GPU, fp32 on a CPU",
        metavar="TYPE",
    )
    max_tokens: int | None = setting(
        None, "Cache only the first rows, at most so many tokens", by_default="the store's, or all"
    )
    batch_size: int | None = setting(
        None,
        "Rows per forward pass",
        by_default="16, on a CPU those of 2048 tokens",
        metavar="ROWS",
        decides=False,
        least=1,
    )
    shard_tokens: int | None = setting(
        None,
        "Tokens per shard file, in whole rows; compressed, in whole blocks of 256",
        by_default="the store's, or 65536",
        least=1,
    )
    max_disk: str | None = setting(
        None,
        "Most room on the disk for the shards of these sites at once, as 200GB",
        by_default="the disk's",
        metavar="SIZE",
        decides=False,
    )
    delete_consumed: bool = setting(
        False,
        "With max-disk, remove shards that all runs of `train --follow` on this store have read",
        decides=False,
    )
    """The store cannot be read as a whole afterwards."""
    device: str = setting("auto", DEVICE, decides=False)
    revision: str | None = setting(None, "The hub model's revision", metavar="REV")
    mask: MaskConfig | None = setting(
        None,
        "Positions that statistics, training and assessment leave out",
        by_default="the store's, or those of `MaskConfig`",
    )
    """Nothing is left out on disk."""
    allow_other_tokenizer: bool = setting(False, "Take tokens of another tokenizer than the model's")
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] | None = setting(
        None, "How attention is computed", by_default="the store's, or transformers' choice", metavar="NAME"
    )
    trust_remote_code: bool = setting(False, "Run code that the model brings", decides=False)
    """The model's fingerprint has the code."""
    load_in_8bit: bool | None = setting(
        None, "Weights as 8-bit integers, by bitsandbytes", by_default="the store's, or off"
    )
    load_in_4bit: bool | None = setting(
        None, "Weights in 4 bits (NF4), by bitsandbytes", by_default="the store's, or off", later=True
    )
    device_map: DeviceMap | None = like(Weights, "device_map")
    max_memory: tuple[str, ...] = like(Weights, "max_memory")

    @property
    def max_disk_bytes(self) -> int | None:
        """`max_disk` in bytes; None where it is the disk's."""
        return None if self.max_disk is None else size_of(self.max_disk, "max_disk")

    def __post_init__(self) -> None:
        check(self)
        replace(self.spread, n_bits=bits_of(self.load_in_8bit, self.load_in_4bit))  # checks both
        chosen = [name for name in ("layers", "sites", "layer_stride") if getattr(self, name)]
        if not chosen:
            raise ConfigError(
                "name what to cache: add --layers -1 for the residual stream after the last block; others: "
                "--layers 2,4, --sites 'layers.*.mlp' or --layer-stride 2"
            )
        if self.max_disk is not None and (address := address_of(self.out)):
            raise ConfigError(
                f"max_disk has no effect: {address} is on no disk, and `train --local-cache` bounds what is "
                "kept of it here; leave it out, or cache to a folder"
            )
        if self.max_disk is not None:
            size_of(self.max_disk, "max_disk")
        elif self.delete_consumed:
            raise ConfigError("delete_consumed has no effect without max_disk; leave it out, or name a size")
        if self.layer_stride not in (None, 1) and len(chosen) > 1:
            raise ConfigError(f"layer_stride chooses all layers itself; leave out {chosen[0]}")
        for site in self.sites:
            if here := elsewhere.of_hook(site):
                raise ConfigError(here)

    @property
    def spread(self) -> Weights:
        """Return over which devices the model is dealt."""
        return Weights(device_map=self.device_map, max_memory=self.max_memory)

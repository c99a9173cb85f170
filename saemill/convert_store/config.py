"""The settings of `saemill convert-store`. What is left open is as in the store that is converted."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from saemill.common.setting import about, check, setting


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertConfig:
    """Settings of convert-store."""

    source: Path = field(metadata=about("Activation store to convert; it stays as it is"))
    out: Path = field(metadata=about("Store to write", decides=False))
    dtype: Literal["bf16", "fp16", "fp32", "int8"] | None = setting(
        None, "Type of the stored activations", by_default="the source's", metavar="TYPE"
    )
    compression: Literal["raw", "lz4", "zstd"] | None = setting(
        None, "Lossless compression of the shards", by_default="the source's", metavar="NAME"
    )
    shard_tokens: int | None = setting(
        None,
        "Tokens per shard file, in whole rows; compressed, in whole blocks of 256",
        by_default="the source's",
        least=1,
    )

    def __post_init__(self) -> None:
        check(self)

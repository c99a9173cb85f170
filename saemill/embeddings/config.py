"""The settings of `saemill import-activations` and `saemill embed`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from saemill.common.setting import DEVICE, about, check, identity, like, setting


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportConfig:
    """Settings of import-activations."""

    source: str = field(
        metadata=about(
            "File, folder or glob: parquet, arrow, jsonl(.gz), npy, npz, pt, safetensors or raw rows; "
            "a saved dataset or a hub id",
            decides=False,
        )
    )
    out: Path = field(metadata=about("Activation store to write: a folder, or an address", decides=False))
    column: str | None = setting(
        None, "Column of the vectors, or name of the array", by_default="embedding, or the only one"
    )
    site: str | None = setting(
        None, "What they are called in the store", by_default="as the column, or embedding"
    )
    id_column: str | None = setting(None, "Column of ids", by_default="id, if there is one")
    text_column: str | None = setting(None, "Column of texts", by_default="text, if there is one")
    source_column: str | None = setting(
        None,
        "Column that names each passage's source, for figures per source and probes",
        by_default="",
        later=True,
    )
    texts: str | None = setting(
        None,
        "Table of the texts, if elsewhere: joined by id, or by order if there are no ids",
        metavar="FILE",
        decides=False,
    )
    normalize: bool = setting(False, "Divide each vector by its length")
    dtype: Literal["bf16", "fp16", "fp32", "int8"] | None = setting(
        None,
        "Stored type",
        by_default="as they come; float64, JSON and normalized: fp32",
        metavar="TYPE",
        decides=False,
    )
    width: int | None = setting(None, "Values per vector of raw rows", least=1)
    raw_dtype: Literal["fp32", "fp16", "bf16", "fp64"] | None = setting(
        None, "Type of raw rows", metavar="TYPE"
    )
    subset: str | None = setting(None, "The hub dataset's configuration")
    split: str | None = setting(None, "Split of a dataset", by_default="train")
    revision: str | None = setting(None, "The hub dataset's revision", metavar="REV")
    max_rows: int | None = setting(None, "Take only so many rows, the first ones", least=1)
    held_out_fraction: float = setting(0.1, "Share of the rows never trained on", within="[0, 1)")
    """Chosen by a hash of their text; without texts, of the id or the vector itself."""
    shard_rows: int | None = setting(
        None,
        "Rows per shard file",
        by_default="64 MiB of them, at most 65536",
        decides=False,
        least=1,
    )

    compression: Literal["raw", "lz4", "zstd"] | None = setting(
        None,
        "Lossless compression of the shards",
        by_default="the store's, or raw",
        metavar="NAME",
        decides=False,
    )

    def __post_init__(self) -> None:
        check(self)

    def identity(self) -> dict[str, Any]:
        """Collect the settings that decide the passages and vectors."""
        return identity(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedConfig:
    """Settings of embed."""

    dataset: str = field(
        metadata=about(
            "Hub id, or file or folder: parquet, jsonl(.gz), csv, arrow, txt, `save_to_disk`", decides=False
        )
    )
    model: str = field(metadata=about("Hub id or folder of a sentence-transformers model", decides=False))
    out: Path = field(metadata=about("Activation store to write: a folder, or an address", decides=False))
    text_column: str = setting("text", "Column that holds the text")
    id_column: str | None = like(ImportConfig, "id_column")
    source_column: str | None = like(ImportConfig, "source_column")
    subset: str | None = like(ImportConfig, "subset")
    split: str | None = like(ImportConfig, "split")
    revision: str | None = like(ImportConfig, "revision")
    model_revision: str | None = setting(None, "The hub model's revision", metavar="REV")
    prompt: str | None = setting(None, "Put before each text, as some encoders want it", metavar="TEXT")
    normalize: bool = like(ImportConfig, "normalize")
    dtype: Literal["bf16", "fp16", "fp32", "int8"] = setting(
        "fp32", "Stored type", metavar="TYPE", decides=False
    )
    model_dtype: Literal["bf16", "fp16", "fp32"] = setting(
        "fp32", "Type the model computes in", metavar="TYPE"
    )
    """Whatever its weights are stored as."""
    site: str = setting("embedding", "What they are called in the store")
    batch_size: int = setting(32, "Texts per forward pass", least=1)
    """It decides: a batch's padding changes a vector's last bits."""
    device: str = setting("auto", DEVICE, decides=False)
    max_rows: int | None = like(ImportConfig, "max_rows")
    held_out_fraction: float = like(ImportConfig, "held_out_fraction")
    shard_rows: int | None = like(ImportConfig, "shard_rows")
    compression: Literal["raw", "lz4", "zstd"] | None = like(ImportConfig, "compression")

    def __post_init__(self) -> None:
        check(self)

    def identity(self) -> dict[str, Any]:
        """Collect the settings that decide the passages and vectors."""
        return identity(self)

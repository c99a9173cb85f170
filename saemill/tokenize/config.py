"""The settings of `saemill tokenize`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saemill.common.config import LARGEST
from saemill.common.errors import ConfigError
from saemill.common.setting import about, check, identity, setting


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeConfig:
    """Settings of the stage."""

    dataset: str = field(
        metadata=about("Hub id, or file or folder: parquet, jsonl(.gz), csv, arrow, txt, `save_to_disk`")
    )
    tokenizer: str = field(metadata=about("Hub id or folder of the tokenizer"))
    out: Path = field(metadata=about("Folder to write", decides=False))
    subset: str | None = setting(None, "The hub dataset's configuration")
    split: str = setting("train", "Split of the dataset")
    text_column: str = setting("text", "Column that holds the text")
    ctx_len: int | None = setting(
        None,
        "Tokens per row",
        by_default="512, or the length of the rows of ids, where all have one",
        least=1,
    )
    max_tokens: int | None = setting(None, "Stop after so many tokens, rounded down to whole rows")
    streaming: bool = setting(False, "Read no more than max-tokens needs")
    shuffle_seed: int | None = setting(
        42, "Seed of the documents' order; none keeps the source's", least=0, most=LARGEST
    )
    held_out_fraction: float = setting(0.05, "Share of documents never trained on", within="[0, 1)")
    """Chosen by a hash of their text; where it gives no row, a few more."""
    repack: bool = setting(False, "Pack rows of ids anew, even where all have ctx-len")
    num_proc: int = setting(1, "Processes that tokenize", decides=False, least=1)
    revision: str | None = setting(None, "The hub dataset's revision", metavar="REV")
    tokenizer_revision: str | None = setting(None, "The hub tokenizer's revision", metavar="REV")

    def __post_init__(self) -> None:
        check(self)
        least = self.ctx_len or 1
        if self.max_tokens is not None and self.max_tokens < least:
            raise ConfigError(f"max_tokens must be at least one row of {least}, got {self.max_tokens}")

    def identity(self) -> dict[str, Any]:
        """Collect the settings that decide the store's content."""
        return identity(self)

"""Packing: documents joined by the separator into full rows, framed as the model expects."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
import xxhash

from saemill.common.errors import ConfigError, DataError
from saemill.common.tokens import TokenizerInfo

UNLIMITED = 1 << 30
"""Tokenizers without a limit of their own report a number beyond this."""


def load_tokenizer(name: str, revision: str | None) -> tuple[Any, TokenizerInfo]:
    """A tokenizer by hub id or local folder, and what later stages need to know of it.

    Raises:
        ConfigError: it cannot be loaded, or it has no token to put between documents.
    """
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load the tokenizer {name!r}: {error}") from error
    separator = tokenizer.eos_token_id
    if separator is None:
        separator = tokenizer.sep_token_id
    if separator is None:
        raise ConfigError(
            f"the tokenizer {name!r} has no EOS or separator token to put between documents; "
            "set its eos_token and save it to a folder"
        )
    prefix, suffix = frame_of(tokenizer)
    return tokenizer, TokenizerInfo(
        name=name,
        hash=hash_tokenizer(tokenizer),
        vocab_size=len(tokenizer),
        prefix_ids=prefix,
        suffix_ids=suffix,
        separator_id=separator,
        special_ids=tuple(sorted(set(tokenizer.all_special_ids))),
        pad_id=tokenizer.pad_token_id,
        mask_id=tokenizer.mask_token_id,
    )


def frame_of(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the tokenizer's own template puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return tuple(framed[:start]), tuple(framed[start + len(bare) :])
    raise ConfigError(f"the tokenizer changes a text when it adds special tokens: {bare} → {framed}")


def hash_tokenizer(tokenizer: Any) -> str:
    """xxh3 of the tokenizer's serialisation (its vocabulary for tokenizers without one)."""
    if tokenizer.is_fast:
        content = tokenizer.backend_tokenizer.to_str()
    else:
        content = repr(sorted(tokenizer.get_vocab().items()))
    return xxhash.xxh3_64_hexdigest(content.encode())


def check_ctx_len(ctx_len: int, tokenizer: Any, info: TokenizerInfo) -> None:
    """Refuse rows longer than the tokenizer, or the model in the same place, can take."""
    limits = {"the tokenizer's model_max_length": tokenizer.model_max_length}
    if (Path(info.name) / "config.json").is_file():
        config = transformers.AutoConfig.from_pretrained(info.name)
        limits["the model's max_position_embeddings"] = getattr(
            config, "max_position_embeddings", UNLIMITED
        )
    for source, limit in limits.items():
        if limit < UNLIMITED and ctx_len > limit:
            raise ConfigError(f"ctx_len must be at most {limit} ({source}), got {ctx_len}")
    if ctx_len <= len(info.prefix_ids) + len(info.suffix_ids):
        raise ConfigError(f"ctx_len {ctx_len} leaves no room beside the row's special tokens")


@dataclass(slots=True)
class RowPacker:
    """Fills rows of `ctx_len` with documents, each followed by the separator."""

    ctx_len: int
    tokenizer: TokenizerInfo
    _row: list[int] = field(default_factory=list)
    _segments: list[tuple[int, int]] = field(default_factory=list)

    def add(self, document: int, ids: list[int]) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        """Append a document; yield each row that it fills.

        Args:
            document: its number.
            ids: its token ids, without frame.

        Yields: the row's `ctx_len` ids, and its segments as (position, document); the first
            segment is at position 0 and includes the frame.
        """
        info = self.tokenizer
        end = self.ctx_len - len(info.suffix_ids)
        pending = self._unframed(ids)
        pending.append(info.separator_id)
        offset = 0
        while offset < len(pending):
            if not self._row:
                self._row = list(info.prefix_ids)
                self._segments = [(0, document)]
            elif offset == 0:
                self._segments.append((len(self._row), document))
            piece = pending[offset : offset + end - len(self._row)]
            self._row += piece
            offset += len(piece)
            if len(self._row) == end:
                yield [*self._row, *info.suffix_ids], self._segments
                self._row, self._segments = [], []

    def _unframed(self, ids: list[int]) -> list[int]:
        """A copy without the frame and the separator that a tokenized dataset may carry."""
        info = self.tokenizer
        start, stop = 0, len(ids)
        if info.prefix_ids and tuple(ids[: len(info.prefix_ids)]) == info.prefix_ids:
            start = len(info.prefix_ids)
        while stop > start and ids[stop - 1] == info.separator_id:
            stop -= 1
        return ids[start:stop]


def check_ids(ids: list[int], vocab_size: int, source_index: int) -> None:
    """Refuse ids of a tokenized dataset that the tokenizer does not have."""
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise DataError(
            f"row {source_index} of the tokenized dataset has ids {min(ids)}..{max(ids)}, but the "
            f"tokenizer has {vocab_size}; name the tokenizer that made it with --tokenizer"
        )

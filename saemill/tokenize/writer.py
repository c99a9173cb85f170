"""Documents' token ids become rows, full shards and the tables of a TokenStore."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from numpy.typing import NDArray

from saemill.common import durable
from saemill.common.errors import DataError
from saemill.common.log import counted
from saemill.common.stores.shards import ShardedArray
from saemill.common.stores.token_writer import cut_documents, write_token_store
from saemill.common.stores.tokens import TokenizerInfo
from saemill.tokenize.held_out import chosen_for_a_row, is_held_out, largest_fraction
from saemill.tokenize.ids import check_ids, n_padding, unframed
from saemill.tokenize.packing import RowPacker
from saemill.tokenize.source import Batch, Source

SHARD_TOKENS = 1 << 24
DOCUMENTS = ("text", "row of ids", "kept row")
"""Kinds of documents: a text; a row of token ids, packed anew; such a row, kept as it is."""


@dataclass(slots=True, kw_only=True)
class Writer:
    """A writer that puts train and held-out documents into rows of their own and writes full shards."""

    path: Path
    source: Source
    info: TokenizerInfo
    ctx_len: int
    max_tokens: int | None
    held_out_fraction: float
    document: str
    """Kind of document, one of `DOCUMENTS`."""
    chosen: frozenset[int] = frozenset()
    """Hashes of documents that are held out whatever the fraction."""
    n_rows: int = 0
    n_empty: int = 0
    n_padding: int = 0
    """Number of ids that were left out as padding."""
    n_used_ids: int = 0
    rows: list[NDArray[Any]] = field(default_factory=list)
    held_out: list[bool] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    source_index: list[int] = field(default_factory=list)
    document_held_out: list[bool] = field(default_factory=list)
    text_hash: list[int] = field(default_factory=list)
    n_tokens: list[int] = field(default_factory=list)
    """Tokens of each document, its separator among them."""
    first_ids: set[int] = field(default_factory=set)
    """First ids of the rows that are kept as they are."""
    all_framed: list[bool] = field(default_factory=lambda: [True, True])
    """Whether all rows that are kept begin with the tokenizer's prefix, and whether all end with its
    suffix."""
    packers: dict[bool, RowPacker] = field(init=False)
    dtype: torch.dtype = field(init=False)
    shard_rows: int = field(init=False)
    n_written_shards: int = 0

    def __post_init__(self) -> None:
        self.packers = {side: RowPacker(self.ctx_len, self.info) for side in (False, True)}
        largest = self.info.vocab_size - 1
        types = (torch.uint8, torch.uint16, torch.uint32)
        self.dtype = next(t for t in types if largest <= torch.iinfo(t).max)
        self.shard_rows = max(1, SHARD_TOKENS // self.ctx_len)

    def add(self, batch: Batch) -> bool:
        """Pack a tokenized batch. Return True when `max_tokens` is reached."""
        assert batch.input_ids is not None
        for i, row in enumerate(batch.input_ids):
            text = batch.texts[i] if batch.texts is not None else None
            ids = self._content(row, batch.source_index[i]) if text is None else row
            if not ids or (text is not None and not text.strip()):
                self.n_empty += 1
                continue
            content = text.encode() if text is not None else np.asarray(ids, np.uint32).tobytes()
            held_out = self._begin(xxhash.xxh3_64_intdigest(content), batch.source_index[i])
            self._add_ids(ids, held_out)
            if self.n_rows == self._max_rows():
                return True
        return False

    def _content(self, ids: list[int], number: int) -> list[int]:
        """Return the ids of a tokenized dataset's row that go into the store; none of a row of padding
        alone."""
        where = self.source.where(number)
        check_ids(ids, self.info.vocab_size, where)
        left, right = (0, 0) if self.source.column.masked else n_padding(ids, self.info)
        if self.document == "kept row" and len(ids) == self.ctx_len and left + right < self.ctx_len:
            return ids
        self.n_padding += left + right
        content = unframed(ids[left : len(ids) - right], self.info)
        if self.document == "kept row" and content:
            raise DataError(
                f"{where} has {len(ids)} ids, but the rows before it {self.ctx_len} each, and they are kept "
                "as they are; say --repack to pack all rows anew"
            )
        return content

    def _begin(self, text_hash: int, number: int) -> bool:
        """Note a document. Return whether it is held out."""
        held_out = text_hash in self.chosen or is_held_out(text_hash, self.held_out_fraction)
        self.source_index.append(number)
        self.document_held_out.append(held_out)
        self.text_hash.append(text_hash)
        return held_out

    def _add_ids(self, ids: list[int], held_out: bool) -> None:
        """Put the last document's ids into rows."""
        document = len(self.source_index) - 1
        if self.document == "kept row":
            self.n_tokens.append(len(ids))
            self._note_frame(ids)
            self._add_row(ids, [(0, document)], held_out)
            return
        self.n_tokens.append(len(ids) + 1)
        for row, segments in self.packers[held_out].add(document, ids):
            self._add_row(row, segments, held_out)
            if self.n_rows == self._max_rows():
                return

    def _note_frame(self, ids: list[int]) -> None:
        prefix, suffix = self.info.prefix_ids, self.info.suffix_ids
        self.first_ids.add(ids[0])
        self.all_framed[0] &= tuple(ids[: len(prefix)]) == prefix
        self.all_framed[1] &= tuple(ids[len(ids) - len(suffix) :]) == suffix

    def _max_rows(self) -> int | None:
        return None if self.max_tokens is None else self.max_tokens // self.ctx_len

    def _add_row(self, row: list[int], segments: list[tuple[int, int]], held_out: bool) -> None:
        address = self.n_rows * self.ctx_len
        self.starts += [address + position for position, _ in segments]
        self.numbers += [document for _, document in segments]
        self.rows.append(np.array(row, str(self.dtype).removeprefix("torch.")))
        self.held_out.append(held_out)
        self.n_used_ids = max(self.n_used_ids, max(row) + 1)
        self.n_rows += 1
        if len(self.rows) == self.shard_rows:
            self._flush()

    def _flush(self) -> None:
        """Write the buffered rows as a raw chunk file; the array's metadata follows at the end."""
        rows = np.zeros((self.shard_rows, self.ctx_len), str(self.dtype).removeprefix("torch."))
        rows[: len(self.rows)] = self.rows
        durable.write_bytes(self.path / "tokens" / "c" / str(self.n_written_shards) / "0", [rows.data])
        self.n_written_shards += 1
        self.rows = []

    @property
    def row_capacity(self) -> int:
        """Number of document tokens that fill a row."""
        if self.document == "kept row":
            return self.ctx_len
        return self.ctx_len - len(self.info.prefix_ids) - len(self.info.suffix_ids)

    def to_hold_out(self) -> frozenset[int]:
        """Choose documents to hold out in another pass, where this one filled no held-out row."""
        if self.held_out_fraction == 0 or any(self.held_out):
            return frozenset()
        held = {h for h, out in zip(self.text_hash, self.document_held_out, strict=True) if out}
        chosen = chosen_for_a_row(zip(self.text_hash, self.n_tokens, strict=True), self.row_capacity)
        return frozenset() if chosen <= held else chosen

    def check(self) -> None:
        """Refuse tokens that leave nothing to train on.

        Raises:
            DataError: with the numbers, and the settings that leave something.
        """
        name = self.source.name
        documents = counted(len(self.source_index) + self.n_empty, "document")
        if self.n_empty:
            documents += f" ({self.n_empty} of them empty)"
        if not self.source_index:
            raise DataError(f"{name} has no text: {documents}")
        if not all(self.held_out):
            return
        if self.n_rows and self.n_rows == self._max_rows():
            raise DataError(
                f"max_tokens is reached with {counted(self.n_rows, 'row')}, held out all: nothing is left to "
                "train on; raise --max-tokens, or lower --held-out-fraction"
            )
        sides = zip(self.n_tokens, self.document_held_out, strict=True)
        n_train = sum(n for n, out in sides if not out)
        total = sum(self.n_tokens)
        if total < self.row_capacity:
            longest = (n_train or total) + self.ctx_len - self.row_capacity
            also = "" if n_train else " and --held-out-fraction to 0"
            raise DataError(
                f"{name} has too little text for one row of {self.ctx_len} tokens: {documents}, {total} "
                f"tokens; lower --ctx-len to {longest} or less{also}, or give more text"
            )
        most = largest_fraction(zip(self.text_hash, self.n_tokens, strict=True), self.row_capacity)
        raise DataError(
            f"nothing is left to train on: with a share of {self.held_out_fraction} held out, "
            f"{sum(self.document_held_out)} of {documents} are, and the others have {n_train} tokens, which "
            f"fill no row of {self.ctx_len}; lower --held-out-fraction to {most:g} or less"
        )

    def finish(self, extra: dict[str, Any]) -> None:
        """Write the rest and the manifest.

        Args:
            extra: settings, source and versions.
        """
        if self.n_written_shards == 0:
            self.shard_rows = self.n_rows
        if self.rows:
            self._flush()
        shape = (self.n_rows, self.ctx_len)
        tokens = ShardedArray.create(self.path / "tokens", shape, self.shard_rows, self.dtype, {})
        segments = pa.table({"start": self.starts, "document": self.numbers})
        documents = pa.table(
            {
                "source_index": self.source_index,
                "held_out": self.document_held_out,
                "text_hash": pa.array(self.text_hash, pa.uint64()),
            }
        )
        write_token_store(
            self.path,
            tokens=tokens,
            held_out_R=np.array(self.held_out),
            segments=segments,
            documents=cut_documents(documents, segments, self.n_rows * self.ctx_len),
            tokenizer=self._tokenizer_info(),
            extra={"document": self.document, "n_used_ids": self.n_used_ids}
            | {"n_empty_documents": self.n_empty, "n_padding_tokens": self.n_padding}
            | extra,
        )

    def _tokenizer_info(self) -> TokenizerInfo:
        """Describe the tokenizer with the frame that the rows have. Of rows that are kept as they are, the
        frame is the tokenizer's own only where all have it."""
        if self.document != "kept row":
            return self.info
        prefix = self.info.prefix_ids if self.all_framed[0] else ()
        suffix = self.info.suffix_ids if self.all_framed[1] else ()
        if not prefix and len(self.first_ids) == 1 and self.first_ids <= set(self.info.special_ids):
            prefix = tuple(self.first_ids)
        return self.info.model_copy(update={"prefix_ids": prefix, "suffix_ids": suffix})

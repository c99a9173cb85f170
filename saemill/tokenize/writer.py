"""Documents' token ids become rows, full shards and the tables of a TokenStore."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash

from saemill.common.errors import DataError
from saemill.common.log import counted
from saemill.common.stores import word_labels
from saemill.common.stores.message_roles import MOST_ROLES, RoleWriter
from saemill.common.stores.token_writer import cut_documents, write_token_store
from saemill.common.stores.tokens import MOST_SOURCES, TokenizerInfo
from saemill.common.stores.word_labels import MOST_NAMES, WordLabels
from saemill.tokenize.held_out import chosen_for_a_row, is_held_out, largest_fraction
from saemill.tokenize.ids import check_ids, n_padding, unframed
from saemill.tokenize.mixing import Document
from saemill.tokenize.packing import Mark, Row, RowPacker
from saemill.tokenize.row_files import RowFiles
from saemill.tokenize.source import Source

DOCUMENTS = ("text", "row of ids", "kept row")
"""Kinds of documents: a text; a row of token ids, packed anew; such a row, kept as it is."""


def id_type(vocab_size: int) -> torch.dtype:
    """Choose the type that token ids are stored in: the smallest that holds all."""
    types = (torch.uint8, torch.uint16, torch.uint32)
    return next(t for t in types if vocab_size - 1 <= torch.iinfo(t).max)


@dataclass(slots=True, kw_only=True)
class Writer:
    """A writer that puts train and held-out documents into rows of their own and writes full shards."""

    path: Path
    sources: list[Source]
    names: list[str]
    """Names of the sources, where figures are told by them; a column of names adds its own. Empty of one."""
    info: TokenizerInfo
    ctx_len: int
    max_tokens: int | None
    held_out_fraction: float
    document: str
    """Kind of document, one of `DOCUMENTS`."""
    document_start: int | None = None
    """Id that each document begins with."""
    chosen: frozenset[int] = frozenset()
    """Hashes of documents that are held out whatever the fraction."""
    label_columns: tuple[str, ...] = ()
    """Columns of labels of words."""
    n_empty: int = 0
    n_padding: int = 0
    """Number of ids that were left out as padding."""
    n_special: int = 0
    """Number of documents that write a special token out."""
    n_used_ids: int = 0
    held_out: list[bool] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    source_index: list[int] = field(default_factory=list)
    source: list[int] = field(default_factory=list)
    """Number of each document's source in `names`."""
    role_names: list[str] = field(default_factory=list)
    """Roles of messages, in the order in which they come."""
    roles: RoleWriter = field(default_factory=RoleWriter)
    label_names: dict[str, dict[str, int]] = field(init=False)
    """By column the numbers of its labels, in the order in which they come, from 1."""
    document_held_out: list[bool] = field(default_factory=list)
    text_hash: list[int] = field(default_factory=list)
    n_tokens: list[int] = field(default_factory=list)
    """Tokens of each document, its separator and what it begins with among them."""
    first_ids: set[int] = field(default_factory=set)
    """First ids of the rows that are kept as they are."""
    all_framed: list[bool] = field(default_factory=lambda: [True, True])
    """Whether all rows that are kept begin with the tokenizer's prefix, and whether all end with its
    suffix."""
    packers: dict[bool, RowPacker] = field(init=False)
    tokens: RowFiles = field(init=False)
    labels: dict[str, RowFiles] = field(init=False)
    """By column the numbers of the labels of the tokens."""

    def __post_init__(self) -> None:
        # A mark is the number of a role, and those of the labels of all columns.
        has_chats = any(source.column.holds_chats for source in self.sources)
        length = 1 + len(self.label_columns) if has_chats or self.label_columns else 0
        self.packers = {
            side: RowPacker(self.ctx_len, self.info, self.document_start, length) for side in (False, True)
        }
        self.tokens = RowFiles(self.path / "tokens", self.ctx_len, id_type(self.info.vocab_size))
        self.label_names = {column: {} for column in self.label_columns}
        folder = self.path / word_labels.FOLDER
        self.labels = {
            column: RowFiles(folder / column, self.ctx_len, word_labels.DTYPE)
            for column in self.label_columns
        }

    @property
    def n_rows(self) -> int:
        """Count the rows so far."""
        return self.tokens.n_rows

    @property
    def is_full(self) -> bool:
        """Whether `max_tokens` is reached."""
        return self.max_tokens is not None and self.n_rows == self.max_tokens // self.ctx_len

    def add(self, document: Document) -> int:
        """Pack a document. Return how many tokens it has; 0 of an empty one, which is counted alone."""
        text = document.text
        if text is None:
            document = replace(document, ids=self._content(document))
        elif document.roles:
            document = self._conversation(document)
        if not document.ids or (text is not None and not text.strip()):
            self.n_empty += 1
            return 0
        content = text.encode() if text is not None else np.asarray(document.ids, np.uint32).tobytes()
        self.n_special += document.is_special
        held_out = self._begin(xxhash.xxh3_64_intdigest(content), document)
        self._add_ids(document.ids, self._marks(document), held_out)
        return self.n_tokens[-1]

    def _conversation(self, document: Document) -> Document:
        """Cut off the frame and the separator that a chat template writes, which rows have as well. The role
        of the separator stays."""
        prefix, separator, ids = self.info.prefix_ids, self.info.separator_id, document.ids
        start = len(prefix) if tuple(ids[: len(prefix)]) == prefix else 0
        stop = len(ids) - (ids[start:][-1:] == [separator])
        return replace(document, ids=ids[start:stop], roles=document.roles[start:])

    def _marks(self, document: Document) -> list[Mark]:
        """List the marks of a document's ids; of a conversation that of its separator too. Empty where it has
        none."""
        if document.words is not None:
            columns = zip(self.label_columns, document.words.labels, strict=True)
            labels = [self._labels(column, names, document) for column, names in columns]
            unlabelled: Mark = (0,) * (1 + len(labels))
            marks = [(0, *mark) for mark in zip(*labels, strict=True)]
            return [unlabelled if word < 0 else marks[word] for word in document.token_words]
        return [(role, *[0] * len(self.label_columns)) for role in self._roles(document)]

    def _labels(self, column: str, names: list[str | None], document: Document) -> list[int]:
        """List the numbers of the labels of a document's words in one column."""
        known = self.label_names[column]
        numbers = [0 if name is None else known.setdefault(name, len(known) + 1) for name in names]
        if len(known) > MOST_NAMES:
            raise DataError(
                f"{self._where(document)} has the {len(known):,}th label of the column {column!r}; at most "
                f"{MOST_NAMES:,} are told apart: name another with --word-labels"
            )
        return numbers

    def _roles(self, document: Document) -> list[int]:
        """List the numbers of the roles of a conversation's ids and of its separator."""
        for role in dict.fromkeys(document.roles):
            if role is not None and role not in self.role_names:
                self.role_names.append(role)
        if len(self.role_names) > MOST_ROLES:
            raise DataError(
                f"{self._where(document)} has messages of the {len(self.role_names):,}th role; at most "
                f"{MOST_ROLES} are told apart: rename them in the dataset"
            )
        numbers = {role: number for number, role in enumerate(self.role_names, 1)}
        return [0 if role is None else numbers[role] for role in document.roles]

    def _where(self, document: Document) -> str:
        return self.sources[document.source].where(document.source_index)

    def _content(self, document: Document) -> list[int]:
        """Return the ids of a tokenized dataset's row that go into the store; none of a row of padding
        alone."""
        where, ids = self._where(document), document.ids
        check_ids(ids, self.info.vocab_size, where)
        left, right = (0, 0) if self.sources[document.source].column.masked else n_padding(ids, self.info)
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

    def _begin(self, text_hash: int, document: Document) -> bool:
        """Note a document. Return whether it is held out."""
        held_out = text_hash in self.chosen or is_held_out(text_hash, self.held_out_fraction)
        self.source_index.append(document.source_index)
        self.source.append(self._source(document))
        self.document_held_out.append(held_out)
        self.text_hash.append(text_hash)
        return held_out

    def _source(self, document: Document) -> int:
        """Find the number of a document's source: its dataset's, or by the column of names."""
        if document.label is None:
            return document.source
        if document.label not in self.names:
            self.names.append(document.label)
        if len(self.names) > MOST_SOURCES:
            raise DataError(
                f"{self._where(document)} has the {len(self.names):,}th source, {document.label!r:.40}; at "
                f"most {MOST_SOURCES} are told apart: name another column with --source-column"
            )
        return self.names.index(document.label)

    def _add_ids(self, ids: list[int], marks: list[Mark], held_out: bool) -> None:
        """Put the last document's ids into rows."""
        document = len(self.source_index) - 1
        if self.document == "kept row":
            self.n_tokens.append(len(ids))
            self._note_frame(ids)
            self._add_row(Row(ids, [(0, document)], []), held_out)
            return
        packer = self.packers[held_out]
        self.n_tokens.append(packer.n_tokens(ids))
        for row in packer.add(document, ids, marks):
            self._add_row(row, held_out)
            if self.is_full:
                return

    def _note_frame(self, ids: list[int]) -> None:
        prefix, suffix = self.info.prefix_ids, self.info.suffix_ids
        self.first_ids.add(ids[0])
        self.all_framed[0] &= tuple(ids[: len(prefix)]) == prefix
        self.all_framed[1] &= tuple(ids[len(ids) - len(suffix) :]) == suffix

    def _add_row(self, row: Row, held_out: bool) -> None:
        address = self.n_rows * self.ctx_len
        self.starts += [address + position for position, _ in row.segments]
        self.numbers += [document for _, document in row.segments]
        self.tokens.add(row.ids)
        self.held_out.append(held_out)
        if row.marks:
            roles, *labels = zip(*row.marks, strict=True)
            self.roles.add(roles)
            for array, numbers in zip(self.labels.values(), labels, strict=True):
                array.add(numbers)
        self.n_used_ids = max(self.n_used_ids, max(row.ids) + 1)

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
        name = " and ".join(source.name for source in self.sources)
        documents = counted(len(self.source_index) + self.n_empty, "document")
        if self.n_empty:
            documents += f" ({self.n_empty} of them empty)"
        if not self.source_index:
            raise DataError(f"{name} has no text: {documents}")
        if unused := [column for column, numbers in self.label_names.items() if not numbers]:
            raise DataError(
                f"the column {unused[0]!r} labels no word of {documents}; leave it out of --word-labels"
            )
        if not all(self.held_out):
            return
        if self.n_rows and self.is_full:
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
        for array in self.labels.values():
            array.finish()
        names = self.label_names.items()
        segments = pa.table({"start": self.starts, "document": self.numbers})
        documents = pa.table(
            {
                "source_index": self.source_index,
                "held_out": self.document_held_out,
                "text_hash": pa.array(self.text_hash, pa.uint64()),
                "source": pa.array(self.source, pa.uint8()),
            }
        )
        write_token_store(
            self.path,
            tokens=self.tokens.finish(),
            held_out_R=np.array(self.held_out),
            segments=segments,
            documents=cut_documents(documents, segments, self.n_rows * self.ctx_len),
            roles=self.roles.table() if self.role_names else None,
            labels=[WordLabels(column=column, names=tuple(numbers)) for column, numbers in names],
            tokenizer=self._tokenizer_info(),
            extra={"document": self.document, "n_used_ids": self.n_used_ids}
            | {"n_empty_documents": self.n_empty, "n_padding_tokens": self.n_padding}
            | {"n_special_documents": self.n_special, "roles": tuple(self.role_names)}
            | {"sources": tuple(self.names), "document_start_id": self.document_start}
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

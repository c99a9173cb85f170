"""TokenStore: packed rows of token ids on disk, and the document that each token came from.

A token's address is `row * ctx_len + pos`. Layout of the folder:

    zarr.json          Zarr group
    tokens/            Zarr array [n_rows, ctx_len], the smallest unsigned type that fits
    held_out/          Zarr array [n_rows, 1], 1 where the row holds held-out documents
    segments.parquet   start (address), document: each piece of a document within a row
    tokenizer/         the tokenizer itself, so that tokens can be shown as text anywhere
    documents.parquet  source_index, start (address), n_tokens, held_out, text_hash, and the source of several
    roles.parquet      of chats: start (address), role: whose message each token is of
    labels/            of labelled words: Zarr arrays [n_rows, ctx_len], see `word_labels`
    manifest.json      written last: sizes, hashes, tokenizer, source, settings
"""

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, JsonValue, model_validator

from saemill.common import durable, hub, records
from saemill.common.errors import MissingError, StoreError
from saemill.common.records import Count, Positive, Record
from saemill.common.stores import message_roles, mirror, word_labels
from saemill.common.stores.columns import read_table
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.message_roles import RoleSpans
from saemill.common.stores.shards import ShardedArray
from saemill.common.stores.word_labels import WordLabels

FORMAT: Final = "saemill tokens 2"
REPAIR = "Run the `saemill tokenize` command again."
DESCRIPTIONS = ("zarr.json", "tokens/zarr.json", "held_out/zarr.json")
SEGMENTS = pa.schema([("start", pa.int64()), ("document", pa.int64())])
DOCUMENTS = pa.schema(
    [
        ("source_index", pa.int64()),
        ("held_out", pa.bool_()),
        ("text_hash", pa.uint64()),
        ("start", pa.int64()),
        ("n_tokens", pa.int64()),
    ]
)
DOCUMENTS_OF_SOURCES = DOCUMENTS.append(pa.field("source", pa.uint8()))
"""The same of several sources, each document with the number of its own."""
MOST_SOURCES = 256
TokenId = Annotated[int, Field(ge=0, lt=1 << 32)]


class TokenizerInfo(Record):
    """The facts on the tokenizer that later stages need."""

    name: str
    """Hub id or local folder."""
    hash: str
    """xxh3 of the tokenizer's own serialisation."""
    vocab_size: Positive
    """One more than the largest token id, added tokens included (ids may have gaps)."""
    prefix_ids: tuple[TokenId, ...]
    """Ids that the model expects at a row's start ([CLS], BOS)."""
    suffix_ids: tuple[TokenId, ...]
    """Ids that the model expects at a row's end ([SEP])."""
    separator_id: TokenId | None
    """Id put after each document; None where none is."""
    special_ids: tuple[TokenId, ...]
    """All special token ids."""
    pad_id: TokenId | None
    mask_id: TokenId | None


class Source(Record):
    """The source of tokens or passages."""

    name: str
    """Hub id or local path."""
    fingerprint: str
    column: str | None = None
    """Column of the texts, of the conversations, or `input_ids`."""


class Settings(Record):
    """The user's settings that decided a store's content; each command has its own."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue]
    held_out_fraction: Annotated[float, Field(ge=0, lt=1)]


class TokenManifest(Record):
    """`manifest.json` of a token store: what it holds, and the hash of every file."""

    format: Literal["saemill tokens 2"] = FORMAT
    n_rows: Positive
    ctx_len: Positive
    n_documents: Count
    """Number of documents of which a token was kept."""
    n_held_out_rows: Count
    n_empty_documents: Count = 0
    n_padding_tokens: Count = 0
    """Number of ids at the ends of rows that were left out as padding."""
    document: Literal["text", "row of ids", "kept row"]
    """Kind of document: a text; a row of token ids, packed anew; such a row, kept as it is."""
    n_used_ids: Annotated[int, Field(ge=1, le=1 << 32)]
    """One more than the largest id in any row."""
    document_start_id: TokenId | None = None
    """Id that each document begins with."""
    n_special_documents: Count = 0
    """Number of documents that write a special token out."""
    roles: tuple[str, ...] = ()
    """Roles of the messages of a chat; `roles.parquet` numbers them from 1."""
    labels: tuple[WordLabels, ...] = ()
    """Labels that the corpus gives to its words, by column."""
    sources: tuple[str, ...] = ()
    """Names of the sources of the documents, where there are several; their column `source` numbers them."""
    mixed: tuple[Source, ...] = ()
    """The datasets that were mixed, one for each name."""
    source: Source
    """The dataset; of several that were mixed, all of them in one."""
    settings: Settings
    versions: dict[str, str]
    parent_fingerprint: str | None = None
    """Fingerprint of the store that the rows come from, of a copy."""
    tokenizer: TokenizerInfo
    files: tuple[records.File, ...]
    fingerprint: str

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [file.path for file in self.files]
        if len(set(names)) < len(names):
            raise ValueError("a file is listed twice")
        needed = {*self.descriptions, "held_out/c/0/0", "segments.parquet", "documents.parquet"}
        needed |= {message_roles.FILE} if self.roles else set()
        if missing := sorted(needed - set(names)):
            raise ValueError(f"{missing[0]} is not listed")
        if self.n_held_out_rows > self.n_rows:
            raise ValueError("more rows are held out than there are")
        lists = {"roles": self.roles, "sources": self.sources}
        lists |= {"labels": tuple(labels.column for labels in self.labels)}
        lists |= {labels.array: labels.names for labels in self.labels}
        for name, listed in lists.items():
            if len(set(listed)) < len(listed):
                raise ValueError(f"{name} names one twice")
        if self.mixed and len(self.mixed) != len(self.sources):
            raise ValueError("sources must name each of the datasets that were mixed")
        return self

    @property
    def descriptions(self) -> tuple[str, ...]:
        """Paths of the files that describe the group and its arrays."""
        of_labels = [f"{labels.array}/zarr.json" for labels in self.labels]
        return (*DESCRIPTIONS, *([word_labels.GROUP, *of_labels] if of_labels else []))


def read_manifest(path: Path, repair: str) -> TokenManifest:
    """Read the manifest of the token store in a folder.

    Raises:
        MissingError: there is none.
        StoreError: it is damaged, or of another version.
    """
    try:
        return records.read(path / "manifest.json", TokenManifest, repair)
    except MissingError:
        raise MissingError(
            f"{path} is not a finished token store: manifest.json is missing. Make one with "
            "`saemill tokenize`."
        ) from None


class TokenStore:
    """Read access to a folder made by `saemill tokenize`.

    Sizes of all files and the descriptions of the arrays are checked when the store is opened; the hash of
    every other file when it is first read.

    Args:
        path: the folder, or the address of one in an object store (see `mirror`).
        repair: the sentence on what to do about damage.

    Raises:
        StoreError: the folder is missing, unfinished or damaged; later, that a file that is read is.
    """

    unit, row, document = "token", "row", "document"
    """Words of messages for an address, a row, and a text of its own."""

    def __init__(self, path: Path | str, repair: str = REPAIR) -> None:
        hub.check_local(path)
        (self.path, self.mirror), self.repair = mirror.opened(path), repair
        self.manifest = read_manifest(self.path, repair)
        self.n_rows, self.ctx_len = self.manifest.n_rows, self.manifest.ctx_len
        self.n_tokens = self.n_rows * self.ctx_len
        self.fingerprint, self.tokenizer = self.manifest.fingerprint, self.manifest.tokenizer
        self._files = {file.path: file for file in self.manifest.files}
        if bad := self.problems(hashes=False):
            raise StoreError("\n".join([*bad, repair]))
        for name in self.manifest.descriptions:
            self._checked(name)
        self.ids = self._array("tokens", self.ctx_len, self.tokenizer.vocab_size)
        """Token ids of the rows, shard by shard."""
        self._held_out = self._array("held_out", 1, 2)
        self.labels = {
            labels.column: self._array(labels.array, self.ctx_len, len(labels.names) + 1)
            for labels in self.manifest.labels
        }
        """Numbers of the labels of each token, by column; see `word_labels`."""

    @property
    def named(self) -> str:
        """The folder as it was named, or the address."""
        return str(self.path) if self.mirror is None else self.mirror.known.address

    def _array(self, name: str, width: int, limit: int) -> ShardedArray:
        """Open an array of numbers below a limit whose shards are all there and listed; each is hashed when
        it is first read."""

        def check(shard: int, rows: NDArray[Any]) -> None:
            file = array.shard_path(shard)
            if durable.hash_bytes(rows.data.cast("B")) != self._files[f"{name}/c/{shard}/0"].xxh3:
                raise StoreError(f"{file}: {durable.DIFFERS}. {self.repair}")
            if (largest := int(rows.max())) >= limit:
                raise StoreError(
                    f"{file} is damaged: it holds {largest:,}, expected below {limit:,}. {self.repair}"
                )

        array = ShardedArray(self.path / name, self.repair, check)
        if (array.n_rows, array.width) != (self.n_rows, width) or array.torch_dtype.is_floating_point:
            raise StoreError(
                f"{array.path} has {array.n_rows:,} rows of {array.width}, but the manifest tells of "
                f"{self.n_rows:,} of {width}. {self.repair}"
            )
        unlisted = [shard for shard in range(array.n_shards) if f"{name}/c/{shard}/0" not in self._files]
        if unlisted:
            raise StoreError(
                f"{self.path}/manifest.json is damaged: it does not list {array.shard_path(unlisted[0])}. "
                f"{self.repair}"
            )
        array.check_sizes()
        return array

    def _checked(self, name: str) -> Path:
        """Compare a listed file with its hash. Return its path."""
        file = self.path / name
        if problem := self._files[name].problem(self.path):
            raise StoreError(f"{file}: {problem}. {self.repair}")
        return file

    @cached_property
    def tokenizer_folder(self) -> Path:
        """Folder that the tokenizer is loaded from, its files checked."""
        for name in self._files:
            if name.startswith("tokenizer/"):
                self._checked(name)
        return self.path / "tokenizer"

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Read token ids of rows start..stop. Unsigned [stop - start, ctx_len]."""
        return self.ids.read(start, stop)

    def keep(self, start: int, stop: int, mask: MaskConfig) -> NDArray[np.bool_]:
        """Choose the positions of rows start..stop that count. bool [stop - start, ctx_len].

        Raises:
            ConfigError: the mask cannot be meant for these tokens.
        """
        mask.check(self.tokenizer.vocab_size, self.ctx_len, self.manifest.roles)
        keep_RS = mask.keep(self.rows(start, stop), self.tokenizer.special_ids)
        if mask.roles:
            numbers = [self.manifest.roles.index(role) + 1 for role in mask.roles]
            keep_RS &= np.isin(self.roles_of(start, stop), numbers)
        return keep_RS

    def roles_of(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Look up whose message each token of rows start..stop is of: 0 none's, else the number of a role in
        the manifest, from 1. uint8 [stop - start, ctx_len], of a store of chats."""
        addresses = np.arange(start * self.ctx_len, stop * self.ctx_len)
        return self.roles.at(addresses).reshape(-1, self.ctx_len)

    @cached_property
    def roles(self) -> RoleSpans:
        """Spans of addresses of one role each, of a store of chats."""
        table = read_table(self._checked(message_roles.FILE), message_roles.SCHEMA, self.repair)
        try:
            return RoleSpans(table, self.n_tokens, len(self.manifest.roles))
        except ValueError as error:
            raise StoreError(
                f"{self.path / message_roles.FILE} is damaged: {error}. {self.repair}"
            ) from error

    @cached_property
    def held_out_R(self) -> NDArray[np.bool_]:
        """Rows that hold held-out documents, bool [n_rows]."""
        held_out_R = self._held_out.read(0, self.n_rows)[:, 0].astype(bool)
        if held_out_R.sum() != self.manifest.n_held_out_rows:
            raise StoreError(
                f"{self.path}: the held-out rows are not as many as its manifest says. {self.repair}"
            )
        return held_out_R

    @cached_property
    def documents(self) -> pa.Table:
        """Table with one line per document: source_index, start, n_tokens, held_out, text_hash; of several
        sources, source."""
        n_sources = len(self.manifest.sources)
        schema = DOCUMENTS_OF_SOURCES if n_sources else DOCUMENTS
        table = read_table(self._checked("documents.parquet"), schema, self.repair)
        if n_sources and len(table) and pc.max(table["source"]).as_py() >= n_sources:
            raise StoreError(
                f"{self.path}/documents.parquet is damaged: it names a source that the manifest has not. "
                f"{self.repair}"
            )
        return table

    @property
    def source_tokens(self) -> dict[str, int]:
        """Number of tokens by name of the source, of a store of several; empty of one."""
        if not self.manifest.sources:
            return {}
        sources, n_tokens = (self.documents[name].to_numpy() for name in ("source", "n_tokens"))
        counts = np.bincount(sources, n_tokens, len(self.manifest.sources)).astype(int)
        return dict(zip(self.manifest.sources, counts.tolist(), strict=True))

    @cached_property
    def segments(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Pieces of documents by address: where each starts, and its document. int64 each."""
        table = read_table(self._checked("segments.parquet"), SEGMENTS, self.repair)
        starts, documents = table["start"].to_numpy(), table["document"].to_numpy()
        ascends = len(starts) > 0 and bool((np.diff(starts) > 0).all())
        if not ascends or starts[0] < 0 or starts[-1] >= self.n_tokens or documents.min() < 0:
            raise StoreError(f"{self.path}/segments.parquet is damaged: no list of places. {self.repair}")
        return starts, documents

    def check_content(self) -> None:
        """Check what the hashes do not cover: the rules on the arrays' and tables' content.

        Raises:
            StoreError: something does not fit.
        """
        for array in (self.ids, self._held_out, *self.labels.values()):
            for shard in range(array.n_shards):
                array.shard(shard)
        n_documents = int(self.segments[1].max()) + 1
        if len(self.held_out_R) != self.n_rows or len(self.documents) < n_documents:
            raise StoreError(
                f"{self.path}/documents.parquet has {len(self.documents):,} lines, expected {n_documents:,}. "
                f"{self.repair}"
            )
        if self.manifest.roles:
            self.roles_of(0, 1)

    def document_of(self, addresses: NDArray[np.int64]) -> NDArray[np.int64]:
        """Look up the document (line of `documents`) that each address belongs to. Same shape, int64."""
        starts, documents = self.segments
        return documents[np.searchsorted(starts, addresses, side="right") - 1]

    @property
    def content(self) -> dict[str, str]:
        """Hashes of the files that say which tokens there are, and which rows are held out. Stores of the
        same tokens share them, whatever the tokenizer is called."""
        return {
            name: file.xxh3
            for name, file in self._files.items()
            if name.startswith(("tokens/c/", "held_out/c/"))
        }

    @property
    def n_used_ids(self) -> int:
        """One more than the largest id in any row: a model needs no larger embedding."""
        return self.manifest.n_used_ids

    def problems(self, hashes: bool) -> list[str]:
        """List each file that is missing, of the wrong size or, with `hashes`, of other content."""
        return records.problems(self.path, self.manifest.files, hashes)

    def provenance(self, mask: MaskConfig) -> dict[str, Any]:
        """Collect what an SAE records of its training data."""
        return {
            "dataset": self.manifest.source.name,
            "ctx_len": self.ctx_len,
            "prepend_bos": bool(self.tokenizer.prefix_ids),
            "left_out": {
                "first_positions": mask.first_positions,
                "token_ids": mask.ids(self.tokenizer.special_ids),
            },
            **({"trained_on": list(mask.roles)} if mask.roles else {}),
        }

    @property
    def how_held_out(self) -> str:
        """Sentence on how the held-out rows were chosen, and on what a document is."""
        held_out = self.documents["held_out"]
        n_held_out, n = int(pc.sum(held_out).as_py() or 0), len(held_out)
        of_text = self.manifest.document == "text"
        what = "documents" if of_text else "rows of ids, each taken for a document"
        by = "text" if of_text else "ids"
        return (
            f"rows of documents held out when the tokens were made ({n_held_out:,} of {n:,} {what}, "
            f"chosen by a hash of their {by})"
        )

    hint_to_hold_out = "tokenize with --held-out-fraction above 0, or name other text with --tokens"

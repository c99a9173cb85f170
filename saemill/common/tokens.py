"""TokenStore: packed rows of token ids on disk, and the document that each token came from.

A token's address is `row * ctx_len + pos`. Layout of the folder:

    zarr.json          Zarr group
    tokens/            Zarr array [n_rows, ctx_len], the smallest unsigned type that fits
    held_out/          Zarr array [n_rows, 1], 1 where the row holds held-out documents
    segments.parquet   start (address), document: each piece of a document within a row
    tokenizer/         the tokenizer itself, so that tokens can be shown as text anywhere
    documents.parquet  source_index, start (address), n_tokens, held_out, text_hash
    manifest.json      written last: sizes, hashes, tokenizer, source, settings
"""

import dataclasses
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import zarr
from numpy.typing import NDArray

from saemill.common import durable, hub
from saemill.common.errors import StoreError
from saemill.common.mask import MaskConfig
from saemill.common.shards import ShardedArray

FORMAT = "saemill tokens 1"
COPIED = ("document", "n_used_ids", "source", "settings", "versions")
"""Entries of the manifest that a copy of a store's first rows keeps."""
REPAIR = "Run the `saemill tokenize` command again."


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerInfo:
    """What later stages need to know of the tokenizer."""

    name: str
    """Hub id or local folder."""
    hash: str
    """xxh3 of the tokenizer's own serialisation."""
    vocab_size: int
    """One more than the largest token id, added tokens included (ids may have gaps)."""
    prefix_ids: tuple[int, ...]
    """Ids that the model expects at a row's start ([CLS], BOS)."""
    suffix_ids: tuple[int, ...]
    """Ids that the model expects at a row's end ([SEP])."""
    separator_id: int
    """Id put after each document."""
    special_ids: tuple[int, ...]
    """All special token ids."""
    pad_id: int | None
    mask_id: int | None


class TokenStore:
    """Read access to a folder made by `saemill tokenize`.

    Args:
        path: the folder.

    Raises:
        StoreError: the folder is missing, unfinished or damaged (sizes are checked here; hashes by
            `problems`).
    """

    unit, row, document = "token", "row", "document"
    """What messages call an address, a row, and a text of its own."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        hub.check_here(self.path)
        try:
            self.manifest: dict[str, Any] = durable.read_json(self.path / "manifest.json")
        except (FileNotFoundError, NotADirectoryError):
            raise StoreError(
                f"{self.path} is not a finished token store: manifest.json is missing. "
                "Make one with `saemill tokenize`."
            ) from None
        if self.manifest.get("format") != FORMAT:
            raise StoreError(
                f"{self.path} is no token store of this version: format "
                f"{self.manifest.get('format')!r}, expected {FORMAT!r}"
            )
        self.n_rows = int(self.manifest["n_rows"])
        self.ctx_len = int(self.manifest["ctx_len"])
        self.n_tokens = self.n_rows * self.ctx_len
        self.fingerprint: str = self.manifest["fingerprint"]
        lists = ("prefix_ids", "suffix_ids", "special_ids")
        tokenizer = self.manifest["tokenizer"]
        self.tokenizer = TokenizerInfo(**tokenizer | {key: tuple(tokenizer[key]) for key in lists})
        if bad := self.problems(hashes=False):
            raise StoreError("\n".join([*bad, REPAIR]))
        self._tokens = self._array("tokens", self.ctx_len)
        self._held_out = self._array("held_out", 1)

    def _array(self, name: str, width: int) -> ShardedArray:
        """An array that has all its shards, be they among the manifest's files or not."""
        array = ShardedArray(self.path / name)
        if (array.n_rows, array.width) != (self.n_rows, width):
            raise StoreError(
                f"{array.path} has {array.n_rows:,} rows of {array.width}, but the manifest tells of "
                f"{self.n_rows:,} of {width}. {REPAIR}"
            )
        array.check_sizes(REPAIR)
        return array

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Token ids of rows start..stop. Unsigned [stop - start, ctx_len]."""
        return self._tokens.read(start, stop)

    def keep(self, start: int, stop: int, mask: MaskConfig) -> NDArray[np.bool_]:
        """Which positions of rows start..stop count. bool [stop - start, ctx_len].

        Raises:
            ConfigError: the mask cannot be meant for these tokens.
        """
        mask.check(self.tokenizer.vocab_size, self.ctx_len)
        return mask.keep(self.rows(start, stop), self.tokenizer.special_ids)

    @cached_property
    def held_out_R(self) -> NDArray[np.bool_]:
        """Which rows hold held-out documents. bool [n_rows]."""
        return self._held_out.read(0, self.n_rows)[:, 0].astype(bool)

    @cached_property
    def documents(self) -> pa.Table:
        """One line per document: source_index, start, n_tokens, held_out, text_hash."""
        return pq.read_table(self.path / "documents.parquet")

    @cached_property
    def _segments(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        table = pq.read_table(self.path / "segments.parquet")
        return table["start"].to_numpy(), table["document"].to_numpy()

    def document_of(self, addresses: NDArray[np.int64]) -> NDArray[np.int64]:
        """The document (line of `documents`) that each address belongs to. Same shape, int64."""
        starts, documents = self._segments
        return documents[np.searchsorted(starts, addresses, side="right") - 1]

    @property
    def n_used_ids(self) -> int:
        """One more than the largest id in any row: a model needs no larger embedding."""
        return int(self.manifest["n_used_ids"])

    def problems(self, hashes: bool) -> list[str]:
        """Each file that is missing, of the wrong size or, with `hashes`, of other content."""
        return durable.problems(self.path, self.manifest["files"], hashes)

    def provenance(self, mask: MaskConfig) -> dict[str, Any]:
        """What an SAE tells of what it was trained on."""
        return {
            "dataset": self.manifest["source"]["name"],
            "ctx_len": self.ctx_len,
            "prepend_bos": bool(self.tokenizer.prefix_ids),
            "left_out": {
                "first_positions": mask.first_positions,
                "token_ids": mask.ids(self.tokenizer.special_ids),
            },
        }

    @property
    def how_held_out(self) -> str:
        """How the held-out rows were chosen, and what a document is."""
        held_out = self.documents["held_out"]
        n_held_out, n = int(pc.sum(held_out).as_py() or 0), len(held_out)
        what = (
            "documents" if self.manifest["document"] == "text" else "rows of ids, each taken for a document"
        )
        by = "text" if self.manifest["document"] == "text" else "ids"
        return (
            f"rows of documents held out when the tokens were made ({n_held_out:,} of {n:,} {what}, "
            f"chosen by a hash of their {by}); training never saw them"
        )

    hint_to_hold_out = "tokenize with --held-out-fraction above 0, or name other text with --tokens"


def write_token_store(
    path: Path,
    *,
    tokens: ShardedArray,
    held_out_R: NDArray[np.bool_],
    segments: pa.Table,
    documents: pa.Table,
    tokenizer: TokenizerInfo,
    extra: dict[str, Any],
) -> None:
    """Write all of a token store but the token shards, which lie in place; the manifest last.

    Args:
        path: the store's folder.
        tokens: the array at `path/tokens`, complete.
        held_out_R: bool [n_rows].
        segments: columns start, document (both int64), sorted by start.
        documents: columns source_index, start, n_tokens, held_out, text_hash.
        tokenizer: what made the ids.
        extra: further entries of the manifest (what a document is, `n_used_ids`, source, settings, versions).

    Raises:
        StoreError: a token shard is missing or of the wrong size.
    """
    tokens.check_sizes(REPAIR)
    zarr.create_group(str(path))
    held = ShardedArray.create(path / "held_out", (len(held_out_R), 1), len(held_out_R), torch.uint8, {})
    held.write_shard(0, held_out_R.astype(np.uint8)[:, None])
    pq.write_table(segments, path / "segments.parquet", compression="zstd")
    pq.write_table(documents, path / "documents.parquet", compression="zstd")
    content = {"files": durable.sealed(path), "tokenizer": dataclasses.asdict(tokenizer)}
    durable.write_json(
        path / "manifest.json",
        {
            "format": FORMAT,
            "n_rows": tokens.n_rows,
            "ctx_len": tokens.width,
            "n_documents": int(np.count_nonzero(documents["n_tokens"].to_numpy())),
            "n_held_out_rows": int(held_out_R.sum()),
        }
        | extra
        | {"fingerprint": durable.hash_json([FORMAT, content])}
        | content,
    )


def copy_rows(store: TokenStore, n_rows: int, path: Path) -> TokenStore:
    """Copy a store's first `n_rows` rows to a new folder, so that activations carry their tokens.

    The copy's manifest names the original's fingerprint as `parent_fingerprint`. Documents keep
    their numbers; a document cut by the end loses its later tokens.
    """
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    source = ShardedArray(store.path / "tokens")
    shape = (n_rows, store.ctx_len)
    dtype = getattr(torch, source.dtype.name)
    shard_rows = min(n_rows, source.shard_rows)
    tokens = ShardedArray.create(partial / "tokens", shape, shard_rows, dtype, {})
    for shard in range(tokens.n_shards):
        tokens.write_shard(shard, source.shard(shard)[: tokens.rows_in(shard)])
    shutil.copytree(store.path / "tokenizer", partial / "tokenizer")
    starts, numbers = store._segments
    end = n_rows * store.ctx_len
    kept = starts < end
    segments = pa.table({"start": starts[kept], "document": numbers[kept]})
    extra = {key: store.manifest[key] for key in COPIED}
    write_token_store(
        partial,
        tokens=tokens,
        held_out_R=store.held_out_R[:n_rows],
        segments=segments,
        documents=cut_documents(store.documents, segments, end),
        tokenizer=store.tokenizer,
        extra=extra | {"parent_fingerprint": store.fingerprint},
    )
    partial.replace(path)
    durable.sync_folder(path.parent)
    return TokenStore(path)


def cut_documents(documents: pa.Table, segments: pa.Table, end: int) -> pa.Table:
    """The documents up to the last in `segments`, with `start` and `n_tokens` taken from there.

    Args:
        documents: one line per document, at least as many as `segments` mentions.
        segments: columns start (address, ascending) and document.
        end: the address after the last token.

    Returns: the table with `start` -1 and `n_tokens` 0 where no token of a document was kept.
    """
    starts, numbers = segments["start"].to_numpy(), segments["document"].to_numpy()
    n_documents = int(numbers.max()) + 1
    n_tokens = np.bincount(numbers, np.diff(np.append(starts, end)), n_documents).astype(np.int64)
    first = np.full(n_documents, -1, np.int64)
    first[numbers[::-1]] = starts[::-1]
    columns = {name: documents[name][:n_documents] for name in documents.column_names}
    return pa.table(columns | {"start": first, "n_tokens": n_tokens})

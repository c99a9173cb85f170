"""Writing a TokenStore: its tables and its manifest, and the copy of a store's first rows."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from saemill.common import durable, records
from saemill.common.stores import message_roles, word_labels
from saemill.common.stores.shards import ShardedArray
from saemill.common.stores.tokens import (
    DOCUMENTS,
    DOCUMENTS_OF_SOURCES,
    FORMAT,
    SEGMENTS,
    TokenizerInfo,
    TokenManifest,
    TokenStore,
)
from saemill.common.stores.word_labels import WordLabels

GROUP: Final = {"zarr_format": 3, "node_type": "group", "attributes": {}}
"""Description of a Zarr group."""
COPIED = (
    *("document", "document_start_id", "n_used_ids", "source", "settings", "versions"),
    *("roles", "sources", "mixed"),
)
"""Fields of the manifest that a copy of some of a store's rows repeats."""


def write_token_store(
    path: Path,
    *,
    tokens: ShardedArray,
    held_out_R: NDArray[np.bool_],
    segments: pa.Table,
    documents: pa.Table,
    roles: pa.Table | None = None,
    labels: Sequence[WordLabels] = (),
    tokenizer: TokenizerInfo,
    extra: dict[str, Any],
) -> None:
    """Write all of a token store but the shards of tokens and labels, which lie in place; the manifest last.

    Args:
        path: the store's folder.
        tokens: the array at `path/tokens`, complete.
        held_out_R: bool [n_rows].
        segments: columns start, document (both int64), sorted by start.
        documents: columns source_index, start, n_tokens, held_out, text_hash; of several sources, source.
        roles: columns start, role, sorted by start; None of what is no chat.
        labels: names of the labels of words, by column; their arrays lie at `path/labels`, complete.
        tokenizer: what made the ids.
        extra: further entries of the manifest (what a document is, `n_used_ids`, source, settings, versions;
            names of roles and sources, if there are any).

    Raises:
        StoreError: a shard of tokens or labels is missing or of the wrong size.
    """
    for array in (tokens, *(ShardedArray(path / each.array) for each in labels)):
        array.check_sizes()
    durable.write_json(path / "zarr.json", GROUP)
    if labels:
        durable.write_json(path / word_labels.GROUP, GROUP)
    held = ShardedArray.create(path / "held_out", (len(held_out_R), 1), len(held_out_R), torch.uint8, {})
    held.write_shard(0, held_out_R.astype(np.uint8)[:, None])
    _write_table(path / "segments.parquet", segments, SEGMENTS)
    names = {name: list(extra[name]) for name in ("roles", "sources") if extra.get(name)}
    schema = DOCUMENTS_OF_SOURCES if "sources" in names else DOCUMENTS
    _write_table(path / "documents.parquet", documents, schema)
    if roles is not None:
        _write_table(path / message_roles.FILE, roles, message_roles.SCHEMA)
    files = records.listed(path)
    content = {"files": [file.model_dump() for file in files], "tokenizer": tokenizer.model_dump(), **names}
    content |= {"labels": [each.model_dump() for each in labels]} if labels else {}
    manifest = TokenManifest(
        n_rows=tokens.n_rows,
        ctx_len=tokens.width,
        n_documents=int(np.count_nonzero(documents["n_tokens"].to_numpy())),
        n_held_out_rows=int(held_out_R.sum()),
        labels=tuple(labels),
        tokenizer=tokenizer,
        files=files,
        fingerprint=durable.hash_json([FORMAT, content]),
        **extra,
    )
    records.write(path / "manifest.json", manifest)


def _write_table(file: Path, table: pa.Table, schema: pa.Schema) -> None:
    with durable.writing(file):
        pq.write_table(table.select(schema.names).cast(schema), file, compression="zstd")


def copy_rows(store: TokenStore, n_rows: int, path: Path) -> TokenStore:
    """Copy a store's first `n_rows` rows to a new folder, so that activations carry their tokens.

    The copy's manifest names the original's fingerprint as `parent_fingerprint`. Documents keep
    their numbers; a document cut by the end loses its later tokens. All that is copied is compared with its
    hash first.

    Raises:
        StoreError: the original is damaged.
    """
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokens = _copy_array(store.ids, n_rows, partial / "tokens")
    for labels in store.manifest.labels:
        _copy_array(store.labels[labels.column], n_rows, partial / labels.array)
    with durable.writing(partial / "tokenizer"):
        shutil.copytree(store.tokenizer_folder, partial / "tokenizer")
    starts, numbers = store.segments
    end = n_rows * store.ctx_len
    copied = starts < end
    segments = pa.table({"start": starts[copied], "document": numbers[copied]})
    fields = {name: getattr(store.manifest, name) for name in COPIED}
    write_token_store(
        partial,
        tokens=tokens,
        held_out_R=store.held_out_R[:n_rows],
        segments=segments,
        documents=cut_documents(store.documents, segments, end),
        roles=store.roles.until(end) if store.manifest.roles else None,
        labels=store.manifest.labels,
        tokenizer=store.tokenizer,
        extra=fields | {"parent_fingerprint": store.fingerprint},
    )
    partial.replace(path)
    durable.sync_folder(path.parent)
    return TokenStore(path)


def _copy_array(source: ShardedArray, n_rows: int, path: Path) -> ShardedArray:
    """Copy the first rows of an array, shard by shard."""
    shape, shard_rows = (n_rows, source.width), min(n_rows, source.shard_rows)
    copy = ShardedArray.create(path, shape, shard_rows, source.torch_dtype, {})
    for shard in range(copy.n_shards):
        copy.write_shard(shard, source.shard(shard)[: copy.rows_in(shard)])
    return copy


def cut_documents(documents: pa.Table, segments: pa.Table, end: int) -> pa.Table:
    """Keep the documents up to the last in `segments`, their `start` and `n_tokens` computed from it.

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

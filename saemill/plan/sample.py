"""Some rows of a token store as one of its own, from all over it: so a few of them are of many documents."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from saemill.common.stores.message_roles import RoleWriter
from saemill.common.stores.shards import ShardedArray
from saemill.common.stores.token_writer import COPIED, cut_documents, write_token_store
from saemill.common.stores.tokens import TokenStore


def sample(tokens: TokenStore, most_rows: int, path: Path) -> TokenStore:
    """Copy rows at equal distances; every other one counts as held out, so that a few are enough to train
    and to assess on.

    Args:
        tokens: the original.
        most_rows: how many rows at most.
        path: a new folder.

    Raises:
        StoreError: the original is damaged.
    """
    n_rows = min(most_rows, tokens.n_rows)
    rows_R = np.arange(n_rows) * tokens.n_rows // n_rows
    ids = np.concatenate([tokens.rows(row, row + 1) for row in rows_R.tolist()])
    array = ShardedArray.create(path / "tokens", ids.shape, n_rows, tokens.ids.torch_dtype, {})
    array.write_shard(0, ids)
    shutil.copytree(tokens.tokenizer_folder, path / "tokenizer")
    starts, documents = _segments(tokens, rows_R)
    segments = pa.table({"start": starts, "document": documents})
    roles = RoleWriter()
    for row in rows_R.tolist() if tokens.manifest.roles else ():
        roles.add(tokens.roles_of(row, row + 1)[0].tolist())
    fields = {name: getattr(tokens.manifest, name) for name in COPIED}
    write_token_store(
        path,
        tokens=array,
        held_out_R=np.arange(n_rows) % 2 == 1,
        segments=segments,
        documents=cut_documents(tokens.documents, segments, ids.size),
        roles=roles.table() if tokens.manifest.roles else None,
        tokenizer=tokens.tokenizer,
        extra=fields | {"parent_fingerprint": tokens.fingerprint},
    )
    return TokenStore(path)


def _segments(tokens: TokenStore, rows_R: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """List the pieces of documents in some rows, put one behind the other: where each starts, and of which
    document."""
    ctx_len = tokens.ctx_len
    addresses_RS = rows_R[:, None] * ctx_len + np.arange(ctx_len)
    document_T = tokens.document_of(addresses_RS).reshape(-1)
    is_first_T = np.append(True, document_T[1:] != document_T[:-1])
    return np.flatnonzero(is_first_T), document_T[is_first_T]

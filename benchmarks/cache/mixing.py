"""How well batches mix documents: figures of batches, beside those of a shuffle of all rows.

same        other rows of a row's own document in its batch
next        rows of it in the next batch
documents   documents in a batch
positions   χ² of the places of rows in their documents, per degree of freedom
"""

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.cache.store import DOCUMENT_TOKENS
from saemill.common.stores.forms.packing import BLOCK_TOKENS

Figures = dict[str, float]


def measure(address_BT: NDArray[Any]) -> Figures:
    """Compute figures of consecutive batches, their means.

    Args:
        address_BT: the addresses in each batch, int64 [batches, T].
    """
    n_documents = int(address_BT.max()) // DOCUMENT_TOKENS + 1
    documents = [np.bincount(batch // DOCUMENT_TOKENS, minlength=n_documents) for batch in address_BT]
    places = np.array(
        [np.bincount(batch % DOCUMENT_TOKENS, minlength=DOCUMENT_TOKENS) for batch in address_BT]
    )
    n_tokens = address_BT.shape[1]
    even = n_tokens / DOCUMENT_TOKENS
    return {
        "same": float(np.mean([(rows * (rows - 1)).sum() / n_tokens for rows in documents])),
        "next": float(np.mean([(rows * after).sum() / n_tokens for rows, after in pairwise(documents)])),
        "documents": float(np.mean([np.count_nonzero(rows) for rows in documents])),
        "positions": float(np.mean(((places - even) ** 2 / even).sum(1) / (DOCUMENT_TOKENS - 1))),
    }


def of_full_shuffle(n_rows: int, batch_tokens: int) -> Figures:
    """Compute what a shuffle of all rows gives in the mean."""
    n, t, others = n_rows, batch_tokens, DOCUMENT_TOKENS - 1
    absent = np.prod(1 - t / (n - np.arange(DOCUMENT_TOKENS)))
    return {
        "same": (t - 1) * others / (n - 1),
        "next": t * others / (n - 1),
        "documents": n / DOCUMENT_TOKENS * float(1 - absent),
        "positions": (n - t) / (n - 1),
    }


def of_windows(n_rows: int, shard_tokens: int, batch_tokens: int, buffer_tokens: int) -> Figures:
    """Compute what is expected of rows permuted within shards, whose blocks are shuffled in windows: the
    partners of a full shuffle, and those of the same block."""
    in_block = (BLOCK_TOKENS - 1) * (DOCUMENT_TOKENS - 1) / shard_tokens
    same = of_full_shuffle(n_rows, batch_tokens)["same"] + in_block * batch_tokens / buffer_tokens
    return {"same": same}

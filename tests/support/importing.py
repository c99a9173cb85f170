"""Vectors in files, with and without texts, and an import of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
from numpy.typing import NDArray

from saemill.common.stores.activations import ActivationStore
from saemill.embeddings.config import ImportConfig
from saemill.embeddings.run import run

Floats = NDArray[np.floating[Any]]


def vectors(n: int, d: int, seed: int = 0) -> NDArray[np.float32]:
    """Draw vectors. fp32 [n, d]."""
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def table(x: Floats, **columns: Any) -> pa.Table:
    """Make a table with vectors in `embedding`, and other columns."""
    return pa.table({"embedding": pa.array(list(x)), **columns})


def taken(source: Path | str, out: Path, **options: Any) -> ActivationStore:
    """Import a source."""
    return run(ImportConfig(source=str(source), out=out, **options))


def read(store: ActivationStore, site: str = "embedding") -> NDArray[Any]:
    """Read all vectors of a store. fp32 [n, d]."""
    return store.read(site, 0, store.n_tokens).float().numpy()


def with_texts(folder: Path, n: int = 60) -> tuple[NDArray[np.float32], list[str]]:
    """A table of ids 1000, 999, … and texts, every third of which is a copy."""
    texts = [f"text {i - i % 3 if i % 3 == 1 else i}" for i in range(n)]
    x = vectors(n, 4)
    ids = [1000 - i for i in range(n)]
    pq.write_table(table(x, id=ids, text=texts), folder / "both.parquet")
    pq.write_table(table(x, id=ids), folder / "ids.parquet")
    order = np.random.default_rng(3).permutation(n)
    apart = pa.table({"text": texts, "id": ids}).take(order)
    pq.write_table(apart, folder / "apart.parquet")
    return x, texts

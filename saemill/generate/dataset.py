"""Samples on disk: a file per batch while they are made, one parquet file per model in the end."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saemill.common import durable
from saemill.common.errors import StoreError

SCHEMA = pa.schema(
    {"text": pa.string(), "input_ids": pa.list_(pa.int32()), "n_tokens": pa.int32(), "sample": pa.int64()}
)
Decode = Callable[[list[int]], str]


def rows_of(ids: list[list[int]], first: int, decode: Decode) -> pa.Table:
    """Tabulate samples first, first + 1, …."""
    columns = {
        "text": list(map(decode, ids)),
        "input_ids": ids,
        "n_tokens": list(map(len, ids)),
        "sample": range(first, first + len(ids)),
    }
    return pa.table(columns, schema=SCHEMA)


class Batches:
    """The finished batches of one model, a file each, named by its first sample and its hash."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.n_samples = self.n_tokens = 0
        for table in self.tables():
            self._count(table)

    def add(self, table: pa.Table) -> None:
        """Keep a batch, whole or not at all."""
        content = io.BytesIO()
        pq.write_table(table, content)
        name = f"{self.n_samples:010}-{durable.hash_bytes(content.getbuffer())}.parquet"
        durable.write_bytes(self.folder / name, [content.getbuffer()])
        self._count(table)

    def tables(self) -> Iterator[pa.Table]:
        """Read the batches, in order.

        Raises:
            StoreError: a file is damaged, or one is missing before another.
        """
        first, files = 0, sorted(self.folder.glob("[0-9]*.parquet"))
        for file in files:
            number, _, recorded = file.stem.partition("-")
            if number != f"{first:010}":
                raise StoreError(
                    f"samples {first:,} and following are missing in {self.folder}; remove it to sample again"
                )
            if durable.hash_file(file) != recorded:
                raise StoreError(f"{file} is damaged; remove {self.folder} to sample again")
            table = pq.read_table(file, schema=SCHEMA)
            first += len(table)
            yield table

    def _count(self, table: pa.Table) -> None:
        self.n_samples += len(table)
        self.n_tokens += sum(table["n_tokens"].to_pylist())


def trimmed(tables: Iterator[pa.Table], n_tokens: int, decode: Decode) -> Iterator[pa.Table]:
    """Cut the first samples to `n_tokens` in all. The last one's text is that of the ids left."""
    left = n_tokens
    for table in tables:
        ends = np.cumsum(table["n_tokens"].to_numpy())
        last = int(np.searchsorted(ends, left))
        if last == len(table):
            left -= int(ends[-1])
            yield table
            continue
        yield table.slice(0, last)
        row = table.slice(last, 1).to_pylist()[0]
        excess = int(ends[last]) - left
        yield rows_of([row["input_ids"][: row["n_tokens"] - excess]], row["sample"], decode)
        return


def write(path: Path, tables: Iterator[pa.Table]) -> int:
    """Write tables one after another to one parquet file. Returns: the number of rows."""
    n_rows = 0
    with durable.replacing(path) as partial, pq.ParquetWriter(partial, SCHEMA) as writer:
        for table in tables:
            n_rows += len(table)
            writer.write_table(table)
    return n_rows

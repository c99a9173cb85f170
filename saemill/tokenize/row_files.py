"""Rows become the shards of an array, as they come."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from saemill.common import durable
from saemill.common.stores.shards import ShardedArray

SHARD_TOKENS = 1 << 24


def shard_rows_of(ctx_len: int) -> int:
    """Count the rows of a shard file, where there are as many."""
    return max(1, SHARD_TOKENS // ctx_len)


@dataclass(slots=True)
class RowFiles:
    """A writer of an array [n_rows, ctx_len] that writes each shard when it is full."""

    path: Path
    ctx_len: int
    dtype: torch.dtype
    n_rows: int = 0
    rows: list[NDArray[Any]] = field(default_factory=list)
    """Rows of the shard in hand."""

    @property
    def shard_rows(self) -> int:
        """Rows of a shard; an array of fewer is one shard."""
        return min(max(1, self.n_rows), shard_rows_of(self.ctx_len))

    @property
    def _type(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def add(self, row: Iterable[int]) -> None:
        """Add a row of `ctx_len` numbers."""
        self.rows.append(np.fromiter(row, self._type, self.ctx_len))
        self.n_rows += 1
        if len(self.rows) == shard_rows_of(self.ctx_len):
            self._flush()

    def _flush(self) -> None:
        """Write the rows in hand as a raw chunk file; the array's description follows at the end."""
        rows = np.zeros((self.shard_rows, self.ctx_len), self._type)
        rows[: len(self.rows)] = self.rows
        shard = (self.n_rows - 1) // self.shard_rows
        durable.write_bytes(self.path / "c" / str(shard) / "0", [rows.data])
        self.rows = []

    def finish(self) -> ShardedArray:
        """Write the rest, and the description."""
        if self.rows:
            self._flush()
        shape = (self.n_rows, self.ctx_len)
        return ShardedArray.create(self.path, shape, self.shard_rows, self.dtype, {})

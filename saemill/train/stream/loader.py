"""The stream: shuffled batches over shards on disk, batch i a pure function of (seed, store, i).

Blocks of 256 stored rows, each from a keyed permutation of one shard already, are visited in a keyed
order over the whole store; every `buffer_tokens` of them form a window, whose rows that are trained on
(`rows`) are shuffled again. The stream is the windows of epoch 0, then of epoch 1, …; batch i is its
positions i·T to (i+1)·T. So resuming needs one integer, and memory is two windows per site (three while
one is filled).
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.forms.packing import BLOCK_TOKENS
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.permutation import permutation
from saemill.common.stores.shards import as_numpy, as_tensor
from saemill.train.stream.rows import TrainingRows

BLOCK_ORDER, ROW_ORDER = 1, 2
READERS = 4


@dataclass(frozen=True, slots=True)
class _Epoch:
    """The order of blocks in one epoch, and where in the epoch's stream each window starts."""

    blocks: NDArray[np.int64]
    window_starts: NDArray[np.int64]
    long_before: NDArray[np.int64]
    """Number of rows left out for their norm in the windows before each one, and at last in all."""


class Loader:
    """Batches of training activations, the same addresses at every site.

    Args:
        store: where they are read.
        sites: names of finished sites, or of several joined.
        mask: positions left out; held-out rows always are.
        norm_over_median: rows whose norm is more than so many medians at one of the sites are left out; None
            leaves out none.
        batch_tokens: T.
        buffer_tokens: rows per window, masked ones included; rounded down to whole blocks.
        seed: decides the order.

    Raises:
        StoreError: a site is missing or damaged, or nothing is left to train on.
        ConfigError: the median norm at a site is 0.
    """

    def __init__(
        self,
        store: ActivationStore,
        sites: list[str],
        mask: MaskConfig,
        *,
        norm_over_median: float | None = None,
        batch_tokens: int,
        buffer_tokens: int,
        seed: int,
    ) -> None:
        self.store, self.mask = store, mask
        self.every_site = {name: store.site(name) for name in sites}
        self.sites = self.every_site
        self.batch_tokens, self.seed = batch_tokens, seed
        self.blocks_per_window = max(1, buffer_tokens // BLOCK_TOKENS)
        self.blocks_per_shard = -(-store.shard_tokens // BLOCK_TOKENS)
        parts = {name: part for site in self.every_site.values() for name, part in site.parts.items()}
        self.rows = TrainingRows(store, parts, mask, norm_over_median)
        self.kept_per_block = np.concatenate([self._per_block(shard) for shard in range(store.n_shards)])
        self.epoch_tokens = self.rows.n_tokens
        self._epoch = lru_cache(2)(self._plan_epoch)
        self._pool = ThreadPoolExecutor(1, "saemill-window")
        self._readers = ThreadPoolExecutor(READERS, "saemill-read")
        self._windows: dict[tuple[int, int], Future[Mapping[str, Tensor]]] = {}

    def _per_block(self, shard: int) -> NDArray[np.int64]:
        """Count the rows of each block of a shard that are trained on."""
        keep = self.rows.keep(shard)
        return np.add.reduceat(keep, np.arange(0, len(keep), BLOCK_TOKENS), dtype=np.int64)

    def batch(self, i: int) -> dict[str, Tensor]:
        """Read batch number i.

        Returns: per site [T, D] as the store's rows are read, on the CPU.
        """
        return self.stretch(i * self.batch_tokens, (i + 1) * self.batch_tokens)

    def stretch(self, position: int, end: int) -> dict[str, Tensor]:
        """Read the stream from one position to another, per site [end - position, D]."""
        stored = self._stored_stretch(position, end)
        return {name: self.sites[name].decode(rows_TC) for name, rows_TC in stored.items()}

    def stored(self, i: int) -> dict[str, Tensor]:
        """Read batch number i in stored rows, per site [T, C]; its `decode` makes activations of them."""
        return self._stored_stretch(i * self.batch_tokens, (i + 1) * self.batch_tokens)

    def _stored_stretch(self, position: int, end: int) -> dict[str, Tensor]:
        pieces: dict[str, list[Tensor]] = {name: [] for name in self.sites}
        while position < end:
            epoch, offset = divmod(position, self.epoch_tokens)
            starts = self._epoch(epoch).window_starts
            window = int(np.searchsorted(starts, offset, side="right")) - 1
            stop = min(offset + end - position, int(starts[window + 1]))
            rows = self._window(epoch, window)
            for name in self.sites:
                pieces[name].append(rows[name][offset - starts[window] : stop - starts[window]])
            position += stop - offset
        return {name: torch.cat(tensors) for name, tensors in pieces.items()}

    def n_left_out(self, position: int) -> int:
        """Count the rows left out for their norm in the windows that the stream up to a position is of."""
        if not self.rows.n_long or position == 0:
            return 0
        epoch, offset = divmod(position - 1, self.epoch_tokens)
        plan = self._epoch(epoch)
        window = int(np.searchsorted(plan.window_starts, offset, side="right")) - 1
        return epoch * self.rows.n_long + int(plan.long_before[window + 1])

    def restrict(self, sites: list[str]) -> None:
        """Read these of the sites only from now on; the stream's order does not depend on them."""
        self.sites = {name: self.every_site[name] for name in sites}
        self._windows.clear()

    def close(self) -> None:
        """End the reading threads."""
        self._pool.shutdown(cancel_futures=True)
        self._readers.shutdown(cancel_futures=True)

    def _window(self, epoch: int, window: int) -> Mapping[str, Tensor]:
        """Return a window's shuffled rows; the next one starts to be read in the background."""
        n_windows = len(self._epoch(epoch).window_starts) - 1
        following = (epoch, window + 1) if window + 1 < n_windows else (epoch + 1, 0)
        for key in ((epoch, window), following):
            if key not in self._windows:
                self._windows[key] = self._pool.submit(self._read_window, *key)
        for key in list(self._windows):
            if key not in ((epoch, window), following):
                del self._windows[key]
        return self._windows[epoch, window].result()

    def _plan_epoch(self, epoch: int) -> _Epoch:
        blocks = permutation(len(self.kept_per_block), self.seed, BLOCK_ORDER, epoch)
        edges = np.append(np.arange(0, len(blocks), self.blocks_per_window), len(blocks))
        starts, long_before = (
            np.concatenate([[0], np.cumsum(per_block[blocks])])[edges]
            for per_block in (self.kept_per_block, self._long_per_block())
        )
        return _Epoch(blocks, starts, long_before)

    def _long_per_block(self) -> NDArray[np.int64]:
        """Count the rows of each block that are left out for their norm."""
        counts = np.zeros_like(self.kept_per_block)
        for shard, places in self.rows.long.items():
            np.add.at(counts, shard * self.blocks_per_shard + places // BLOCK_TOKENS, 1)
        return counts

    def _read_window(self, epoch: int, window: int) -> Mapping[str, Tensor]:
        plan = self._epoch(epoch)
        first = window * self.blocks_per_window
        blocks = plan.blocks[first : first + self.blocks_per_window]
        ends = np.cumsum(self.kept_per_block[blocks])
        n_rows = int(ends[-1])
        order = permutation(n_rows, self.seed, ROW_ORDER, epoch, window)
        rows: dict[str, Tensor] = {}
        for name, site in self.sites.items():
            buffer = as_numpy(torch.empty(n_rows, site.columns, dtype=site.stored))
            jobs = zip(blocks, [0, *ends[:-1]], ends, strict=True)
            list(self._readers.map(lambda job, n=name, b=buffer: self._read_block(n, b, *job), jobs))
            shuffled = np.empty_like(buffer)
            np.take(buffer, order, axis=0, out=shuffled, mode="clip")
            rows[name] = as_tensor(shuffled, site.stored)
        return rows

    def _read_block(self, site: str, buffer: NDArray[Any], number: int, start: int, end: int) -> None:
        """Copy a block's rows that are trained on to buffer[start:end]."""
        shard, block = divmod(int(number), self.blocks_per_shard)
        rows = self.sites[site].block(shard, block)
        first = block * BLOCK_TOKENS
        keep = self.rows.keep_places(shard, first, first + len(rows))
        np.compress(keep, rows, axis=0, out=buffer[start:end])

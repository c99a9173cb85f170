"""The stream over a whole store, epoch after epoch.

Blocks of 256 stored rows, each from a keyed permutation of one shard already, are visited in a keyed order
over the whole store; every `buffer_tokens` of them form a window, whose rows that are trained on are shuffled
again. The stream is the windows of epoch 0, then of epoch 1, ….
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.forms.packing import BLOCK_TOKENS
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.permutation import permutation
from saemill.train.stream.loader import Loader
from saemill.train.stream.order import Piece, Window, places_in
from saemill.train.stream.rows import TrainingRows

BLOCK_ORDER, ROW_ORDER = 1, 2


@dataclass(frozen=True, slots=True)
class _Epoch:
    """The order of blocks in one epoch, and where in the epoch's stream each window starts."""

    blocks: NDArray[np.int64]
    window_starts: NDArray[np.int64]
    long_before: NDArray[np.int64]
    """Number of rows left out for their norm in the windows before each one, and at last in all."""


class Epochs:
    """The order of blocks and rows in every epoch.

    Args:
        rows: that are trained on.
        buffer_tokens: rows per window, masked ones included; rounded down to whole blocks.
        seed: decides the order.
    """

    def __init__(self, rows: TrainingRows, buffer_tokens: int, seed: int) -> None:
        self.rows, self.seed = rows, seed
        self.blocks_per_window = max(1, buffer_tokens // BLOCK_TOKENS)
        self._epoch = lru_cache(2)(self._plan)

    @property
    def n_tokens(self) -> int:
        """Number of rows in an epoch."""
        return self.rows.n_tokens

    def pieces(self, position: int, end: int) -> Iterator[Piece]:
        """List where rows `position` to `end` of the stream lie."""
        while position < end:
            epoch, offset = divmod(position, self.n_tokens)
            starts = self._epoch(epoch).window_starts
            window = places_in(starts, offset)
            stop = min(offset + end - position, int(starts[window + 1]))
            start = int(starts[window])
            yield Piece(Window(epoch, window), offset - start, stop - start)
            position += stop - offset

    def blocks(self, window: Window) -> NDArray[np.int64]:
        """List the blocks of a window."""
        first = window.number * self.blocks_per_window
        return self._epoch(window.part).blocks[first : first + self.blocks_per_window]

    def shuffled(self, window: Window, n_rows: int) -> NDArray[np.int64]:
        """Choose the rows of a window: all of them, in a keyed order."""
        return permutation(n_rows, self.seed, ROW_ORDER, *window)

    def after(self, window: Window) -> Window:
        """Return the window that follows."""
        n_windows = len(self._epoch(window.part).window_starts) - 1
        if window.number + 1 < n_windows:
            return Window(window.part, window.number + 1)
        return Window(window.part + 1, 0)

    def is_there(self, end: int) -> bool:
        """Tell that the stream can be read: the whole store is there."""
        return True

    def n_left_out(self, position: int) -> int:
        """Count the rows left out for their norm in the windows that the stream up to a position is of."""
        if not self.rows.n_long or position == 0:
            return 0
        epoch, offset = divmod(position - 1, self.n_tokens)
        plan = self._epoch(epoch)
        window = places_in(plan.window_starts, offset)
        return epoch * self.rows.n_long + int(plan.long_before[window + 1])

    def n_long(self, position: int) -> int:
        """Count the store's rows left out for their norm, each once."""
        return self.rows.n_long

    def sampled(self, position: int) -> range:
        """List the positions of the first epoch, wherever the stream is gone on with."""
        return range(self.n_tokens)

    def _plan(self, epoch: int) -> _Epoch:
        kept_per_block = self.rows.kept.per_block
        blocks = permutation(len(kept_per_block), self.seed, BLOCK_ORDER, epoch)
        edges = np.append(np.arange(0, len(blocks), self.blocks_per_window), len(blocks))
        starts, long_before = (
            np.concatenate([[0], np.cumsum(per_block[blocks])])[edges]
            for per_block in (kept_per_block, self.rows.long_per_block)
        )
        return _Epoch(blocks, starts, long_before)


def open_epochs(
    store: ActivationStore,
    sites: list[str],
    mask: MaskConfig,
    *,
    norm_over_median: float | None = None,
    batch_tokens: int,
    buffer_tokens: int,
    seed: int,
) -> Loader:
    """Open the stream over a finished store.

    Args:
        store: where activations are read.
        sites: names of finished sites, or of several joined.
        mask: positions left out; held-out rows always are.
        norm_over_median: rows whose norm is more than so many medians at one of the sites are left out; None
            leaves out none.
        batch_tokens: rows per batch, T.
        buffer_tokens: rows per window, masked ones included; rounded down to whole blocks.
        seed: decides the order.

    Raises:
        StoreError: a site is missing or damaged, or nothing is left to train on.
        ConfigError: the median norm at a site is 0.
    """
    every_site = {name: store.site(name) for name in sites}
    parts = {name: part for site in every_site.values() for name, part in site.parts.items()}
    rows = TrainingRows(store, parts, mask, norm_over_median)
    return Loader(store, every_site, rows, Epochs(rows, buffer_tokens, seed), batch_tokens)

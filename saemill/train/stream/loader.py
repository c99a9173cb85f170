"""The loader: shuffled batches over shards on disk, batch i a pure function of (seed, store, i).

The stream is the shuffled rows of one window after the other, in the order that `order` says; batch i is its
positions i·T to (i+1)·T. So resuming needs one integer, and memory is two windows per site: each block that
is read is dealt to its rows' places in the shuffled window at once, while it is in the cache.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.forms.packing import BLOCK_TOKENS
from saemill.common.stores.joined import JoinedSite
from saemill.common.stores.mirror import N_READERS
from saemill.common.stores.shards import as_numpy
from saemill.common.stores.site_array import SiteArray
from saemill.train.memory import zeros
from saemill.train.stream.order import Order, Window
from saemill.train.stream.rows import Rows

READERS = 4


class Places(NamedTuple):
    """To which places of a shuffled window its rows go."""

    source_N: NDArray[np.int64]
    """Rows by their number among those that are read, ascending; one may be there twice, or not at all."""
    place_N: NDArray[np.int64]

    @classmethod
    def of(cls, order: NDArray[np.int64]) -> "Places":
        """Turn an order round: entry j is the row that comes to place j."""
        place_N = np.argsort(order)
        return cls(order[place_N], place_N)

    def of_rows(self, start: int, end: int) -> "Places":
        """Select those of some consecutive rows."""
        some = slice(*np.searchsorted(self.source_N, (start, end)))
        return Places(self.source_N[some], self.place_N[some])


class Loader:
    """Batches of training activations, the same addresses at every site.

    Args:
        store: where they are read.
        sites: by name; those that are joined count as one.
        rows: that are trained on.
        order: of the stream.
        batch_tokens: rows per batch, T.
    """

    def __init__(
        self,
        store: ActivationStore,
        sites: Mapping[str, SiteArray | JoinedSite],
        rows: Rows,
        order: Order,
        batch_tokens: int,
    ) -> None:
        self.store, self.every_site, self.sites = store, sites, sites
        self.rows, self.order, self.batch_tokens = rows, order, batch_tokens
        self.mask, self.epoch_tokens = rows.kept.mask, order.n_tokens
        self._pool = ThreadPoolExecutor(1, "saemill-window")
        n_readers = READERS if store.mirror is None else N_READERS
        self._readers = ThreadPoolExecutor(n_readers, "saemill-read")
        self._windows: dict[Window, Future[Mapping[str, Tensor]]] = {}
        self._spare: list[Future[Mapping[str, Tensor]]] = []
        """Windows that are no longer needed, whose memory the next one takes."""

    def batch(self, i: int) -> dict[str, Tensor]:
        """Read batch number i.

        Returns: per site [T, D] as the store's rows are read, on the CPU. They may lie in a window's memory:
        they stay until the loader is read again, and are not to be written to.
        """
        return self._decoded(self.stored(i))

    def is_there(self, i: int) -> bool:
        """Tell whether batch number i can be read by now."""
        return self.order.is_there((i + 1) * self.batch_tokens)

    def stretch(self, position: int, end: int) -> dict[str, Tensor]:
        """Read the stream from one position to another, per site [end - position, D]."""
        return self._decoded(self._copied(position, end))

    def stored(self, i: int) -> dict[str, Tensor]:
        """Read batch number i in stored rows, per site [T, C]; its `decode` makes activations of them. They
        stay as long as those of `batch`."""
        position, end = i * self.batch_tokens, (i + 1) * self.batch_tokens
        first, *others = self.order.pieces(position, end)
        if others:
            return self._copied(position, end)
        rows = self._window(first.window)
        return {name: rows[name][first.start : first.stop] for name in self.sites}

    def _decoded(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.sites[name].decode(rows_TC) for name, rows_TC in stored.items()}

    def _copied(self, position: int, end: int) -> dict[str, Tensor]:
        """Copy stored rows of the stream, of one window or of several."""
        found = {
            name: torch.empty(end - position, site.columns, dtype=site.stored)
            for name, site in self.sites.items()
        }
        start = 0
        for piece in self.order.pieces(position, end):
            stop = start + piece.stop - piece.start
            rows = self._window(piece.window)
            for (
                name,
                out_TC,
            ) in found.items():  # now: the memory of a window is filled again after its last use
                out_TC[start:stop] = rows[name][piece.start : piece.stop]
            start = stop
        return found

    def sample(self, n_tokens: int, position: int) -> dict[str, Tensor]:
        """Read rows from which SAEs start, per site [at most n_tokens, D].

        Args:
            n_tokens: how many, at most.
            position: where the stream is gone on with; its begin may not be there any more.
        """
        positions = self.order.sampled(position)[:n_tokens]
        return self.stretch(positions.start, positions.stop)

    def n_left_out(self, position: int) -> int:
        """Count the rows left out for their norm in what the stream up to a position is of."""
        return self.order.n_left_out(position)

    def n_long(self, position: int) -> int:
        """Count the store's rows left out for their norm, each once, as far as it is known at a position."""
        return self.order.n_long(position)

    def restrict(self, sites: list[str]) -> None:
        """Read these of the sites only from now on; the stream's order does not depend on them."""
        self.sites = {name: self.every_site[name] for name in sites}
        self._windows.clear()
        self._spare.clear()

    def close(self) -> None:
        """End the reading threads."""
        self._pool.shutdown(cancel_futures=True)
        self._readers.shutdown(cancel_futures=True)

    def _window(self, window: Window) -> Mapping[str, Tensor]:
        """Return a window's shuffled rows; the next one starts to be read in the background."""
        following = self.order.after(window)
        wanted = [window] if following is None else [window, following]
        for key in list(self._windows):
            if key not in wanted:
                self._spare = [self._windows.pop(key)]
        for key in wanted:
            if key not in self._windows:
                self._windows[key] = self._pool.submit(self._read_window, key)
        return self._windows[window].result()

    def _read_window(self, window: Window) -> Mapping[str, Tensor]:
        """Read and shuffle a window. Per site, at least as many rows as it has."""
        blocks = self.order.blocks(window)
        ends = np.cumsum(self.rows.kept.per_block[blocks])
        n_rows = int(ends[-1])
        places = Places.of(self.order.shuffled(window, n_rows))
        spare = self._memory()
        rows: dict[str, Tensor] = {}
        for name, site in self.sites.items():
            if name not in spare or len(spare[name]) < n_rows:
                spare[name] = zeros(n_rows, site.columns, dtype=site.stored)
            rows[name] = spare.pop(name)
            shuffled = as_numpy(rows[name])
            jobs = zip(blocks, [0, *ends[:-1]], ends, strict=True)
            deal = partial(self._deal_block, name, shuffled, places)
            list(self._readers.map(lambda job, deal=deal: deal(*job), jobs))
        return rows

    def _memory(self) -> dict[str, Tensor]:
        """Take the memory of a window that is no longer needed: new pages are cleared first."""
        if not self._spare:
            return {}
        dropped = self._spare.pop()
        has_rows = dropped.done() and not dropped.cancelled() and dropped.exception() is None
        return dict(dropped.result()) if has_rows else {}

    def _deal_block(
        self, site: str, shuffled: NDArray[Any], places: Places, number: int, start: int, end: int
    ) -> None:
        """Read a block, whose rows that are trained on are number `start` to `end`, and copy these to their
        places."""
        shard, block = divmod(int(number), self.rows.kept.blocks_per_shard)
        rows = self.sites[site].block(shard, block)
        first = block * BLOCK_TOKENS
        kept = np.flatnonzero(self.rows.kept.of_places(shard, first, first + len(rows)))
        own = places.of_rows(start, end)
        chosen = kept[own.source_N - start]
        is_whole = len(chosen) == len(rows) and bool((np.diff(chosen) == 1).all())
        shuffled[own.place_N] = rows if is_whole else rows[chosen]

"""The stream of a follower: a store from its first shard to its last, while it is being filled.

Consecutive shards of about `follow_tokens` tokens form a group. Within a group blocks are visited in a keyed
order and every `buffer_tokens` of them form a window, whose rows are shuffled, as `epochs` does it over the
whole store. The stream is the windows of group 0, then of group 1, …, once. Nothing in it depends on when a
shard came, so a finished store gives the same one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from saemill.common.errors import StoreError
from saemill.common.stores.followed import FollowedStore
from saemill.common.stores.forms.packing import BLOCK_TOKENS
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.permutation import permutation
from saemill.train.stream.followed_rows import FollowedRows
from saemill.train.stream.loader import Loader
from saemill.train.stream.order import Piece, Window, places_in
from saemill.train.stream.units import Units

GROUP_ORDER, GROUP_ROWS, REPLACED = 5, 6, 7


@dataclass(frozen=True, slots=True)
class _Group:
    """The order of a group's blocks, and where in the stream each of its windows starts."""

    blocks: NDArray[np.int64]
    window_starts: NDArray[np.int64]


class Groups:
    """The order of blocks and rows, group after group.

    Args:
        store: that is followed.
        rows: that are trained on.
        buffer_tokens: rows per window, masked ones included; rounded down to whole blocks.
        seed: decides the order.
    """

    def __init__(self, store: FollowedStore, rows: FollowedRows, buffer_tokens: int, seed: int) -> None:
        self.store, self.rows, self.seed = store, rows, seed
        self.blocks_per_window = max(1, buffer_tokens // BLOCK_TOKENS)
        firsts = np.array([shards.start for shards in store.groups])
        per_group = np.add.reduceat(rows.kept.per_block, firsts * rows.kept.blocks_per_shard)
        self.starts = np.concatenate([[0], np.cumsum(per_group)])
        """Positions at which groups start, and at last the end."""
        self._group = lru_cache(2)(self._plan)
        self._n_there = 0

    @property
    def n_tokens(self) -> int:
        """Number of rows in the stream."""
        return self.rows.kept.n_tokens

    def group_of(self, position: int) -> int:
        """Find the group that a position of the stream lies in."""
        return places_in(self.starts, position)

    def shards_of(self, group: int) -> range:
        """List the shards of a group."""
        return self.store.groups[group]

    def pieces(self, position: int, end: int) -> Iterator[Piece]:
        """List where rows `position` to `end` of the stream lie."""
        while position < end:
            group = self.group_of(position)
            starts = self._group(group).window_starts
            window = places_in(starts, position)
            stop, start = min(end, int(starts[window + 1])), int(starts[window])
            yield Piece(Window(group, window), position - start, stop - start)
            position = stop

    def blocks(self, window: Window) -> NDArray[np.int64]:
        """List the blocks of a window."""
        first = window.number * self.blocks_per_window
        return self._group(window.part).blocks[first : first + self.blocks_per_window]

    def shuffled(self, window: Window, n_rows: int) -> NDArray[np.int64]:
        """Choose the rows of a window: all of them, in a keyed order, but for those that are too long. In the
        place of each of these is another row of the window, chosen by key.

        Raises:
            StoreError: all of them are too long.
        """
        order = permutation(n_rows, self.seed, GROUP_ROWS, *window)
        is_long = self._long(window)[order]
        if is_long.any():
            others = order[~is_long]
            if not len(others):
                raise StoreError(
                    f"{self.store.path}: all {n_rows:,} rows of a window are longer than norm_over_median "
                    "allows by the first shards; train with --set train.mask.norm_over_median=none"
                )
            chosen = permutation(len(others), self.seed, REPLACED, *window)
            order[is_long] = np.resize(others[chosen], int(is_long.sum()))
        return order

    def after(self, window: Window) -> Window | None:
        """Return the window that follows, if its shards are there."""
        n_windows = len(self._group(window.part).window_starts) - 1
        if window.number + 1 < n_windows:
            return Window(window.part, window.number + 1)
        group = window.part + 1
        if group + 1 < len(self.starts) and self.has(group):
            return Window(group, 0)
        return None

    def is_there(self, end: int) -> bool:
        """Tell whether the shards of the stream up to a position are committed."""
        return self.has(self.group_of(min(end, self.n_tokens) - 1))

    def has(self, group: int) -> bool:
        """Tell whether the shards of all groups up to one are committed at all sites."""
        stop = self.shards_of(group).stop
        while self._n_there < stop:
            if not all(self.store.has(site, self._n_there) for site in self.rows.sites):
                return False
            self._n_there += 1
        return True

    def pass_by(self, group: int) -> None:
        """Look for the shards of a group and of those behind it alone: earlier ones are not needed."""
        self._n_there = max(self._n_there, self.shards_of(group).start)

    def at_once(self, batch_tokens: int) -> int:
        """Count the shards that must be there together at most; see `shards_at_once`."""
        return shards_at_once(self.store.groups, self.starts, batch_tokens)

    @property
    def n_there(self) -> int:
        """Number of the first shards that were found to be committed at all sites."""
        return self._n_there

    def n_left_out(self, position: int) -> int:
        """Count the rows left out for their norm in the groups that the stream up to a position is of."""
        if position == 0:
            return 0
        shards = range(self.shards_of(self.group_of(position - 1)).stop)
        return sum(len(self.rows.long(shard)) for shard in shards)

    def n_long(self, position: int) -> int:
        """Count the rows left out for their norm up to a position: the store is gone through once."""
        return self.n_left_out(position)

    def sampled(self, position: int) -> range:
        """List the positions of the group that holds one: it is there, while earlier ones may be gone."""
        group = self.group_of(min(position, self.n_tokens - 1))
        return range(int(self.starts[group]), int(self.starts[group + 1]))

    def _plan(self, group: int) -> _Group:
        shards, per_shard = self.shards_of(group), self.rows.kept.blocks_per_shard
        per_block = self.rows.kept.per_block
        first, stop = shards.start * per_shard, min(shards.stop * per_shard, len(per_block))
        blocks = first + permutation(stop - first, self.seed, GROUP_ORDER, group)
        edges = np.append(np.arange(0, len(blocks), self.blocks_per_window), len(blocks))
        before = np.concatenate([[0], np.cumsum(per_block[blocks])])[edges]
        return _Group(blocks, self.starts[group] + before)

    def _long(self, window: Window) -> NDArray[np.bool_]:
        """Tell which of the rows that are read for a window are too long. bool, in the order of reading."""
        kept, parts = self.rows.kept, []
        for number in self.blocks(window):
            shard, block = divmod(int(number), kept.blocks_per_shard)
            first = block * BLOCK_TOKENS
            stop = min(first + BLOCK_TOKENS, self.store.shard_length(shard))
            is_long = np.isin(np.arange(first, stop), self.rows.long(shard))
            parts.append(is_long[kept.of_places(shard, first, stop)])
        return np.concatenate(parts)


def open_following(
    store: FollowedStore,
    sites: list[str],
    mask: MaskConfig,
    *,
    units: Units | None,
    norm_over_median: float | None = None,
    batch_tokens: int,
    buffer_tokens: int,
    seed: int,
) -> Loader:
    """Open the stream over a store that may still be being filled.

    Args:
        store: where activations are read; its first shards are a group.
        sites: names of its sites, or of several joined.
        mask: positions left out; held-out rows always are.
        units: of the run that is gone on with; None for those of the first group.
        norm_over_median: rows whose norm is more than so many medians at one of the sites give their place to
            others; None for none.
        batch_tokens: rows per batch, T.
        buffer_tokens: rows per window, masked ones included; rounded down to whole blocks.
        seed: decides the order.

    Raises:
        StoreError: a site is missing, or nothing is left to train on.
    """
    every_site = {name: store.site(name) for name in sites}
    parts = {name: part for site in every_site.values() for name, part in site.parts.items()}
    rows = FollowedRows(store, parts, mask, norm_over_median, units)
    order = Groups(store, rows, buffer_tokens, seed)
    return Loader(store, every_site, rows, order, batch_tokens)


def shards_at_once(groups: list[range], starts: NDArray[np.int64], batch_tokens: int) -> int:
    """Count the shards that must be there together at most: those of a group, of the next one, and of as many
    as a batch reaches into.

    Args:
        groups: shards of each group.
        starts: positions of the stream at which groups start, and at last the end. [len(groups) + 1]
        batch_tokens: positions of a batch.
    """
    most, last = 0, len(groups) - 1
    for group in range(last + 1):
        end = min(int(starts[group + 1]) - 1 + batch_tokens, int(starts[-1]))
        reached = max(places_in(starts, end - 1), min(group + 1, last))
        most = max(most, groups[reached].stop - groups[group].start)
    return most

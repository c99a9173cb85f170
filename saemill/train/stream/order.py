"""The order of a stream: in which windows its blocks are read, and how the rows of a window are shuffled.

`epochs` visits the whole store, again in every epoch; `following` goes through it from its first shard to its
last, as they are written.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class Window(NamedTuple):
    """Some blocks, whose rows are shuffled together."""

    part: int
    """Number of the epoch, or of the group of shards, that it is of."""
    number: int
    """Number within that."""


class Piece(NamedTuple):
    """Some consecutive rows of a window's shuffled ones."""

    window: Window
    start: int
    stop: int


class Order(Protocol):
    """The order of one stream, a pure function of seed and store."""

    @property
    def n_tokens(self) -> int:
        """Number of rows in one pass over the store."""

    def pieces(self, position: int, end: int) -> Iterator[Piece]:
        """List where rows `position` to `end` of the stream lie."""

    def blocks(self, window: Window) -> NDArray[np.int64]:
        """List the blocks of a window by their numbers in the store, in the order in which they are read."""

    def shuffled(self, window: Window, n_rows: int) -> NDArray[np.int64]:
        """Choose the rows of a window, by their places among the `n_rows` that are read."""

    def after(self, window: Window) -> Window | None:
        """Return the window that follows, if it can be read by now."""

    def is_there(self, end: int) -> bool:
        """Tell whether the stream can be read up to a position."""

    def n_left_out(self, position: int) -> int:
        """Count the rows left out for their norm in what the stream up to a position is of."""

    def n_long(self, position: int) -> int:
        """Count the store's rows left out for their norm, each once, as far as it is known at a position."""

    def sampled(self, position: int) -> range:
        """List the positions of which a sample may be read where the stream is gone on with at one."""


def places_in(starts: NDArray[np.int64], offset: int) -> int:
    """Find which of the stretches that begin at `starts` holds a position; the last entry is the end."""
    return int(np.searchsorted(starts, offset, side="right")) - 1

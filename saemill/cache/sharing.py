"""Choice of the shard that this process writes next, where any number of processes fill one store."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from saemill.cache.claims.worker import Claim, Worker
from saemill.cache.room import Room
from saemill.cache.writer import SiteWriter
from saemill.common.stores.activations import ActivationStore

ROOM_WAITS = 5
"""Waits in a row after which they grow no longer, at 1.6 s, where a follower may make room at any moment."""
LOOK_SECONDS = 1.0
"""Seconds, at least, between two looks at what other workers have committed."""


@dataclass(frozen=True, slots=True)
class Share:
    """A shard that this worker is to write."""

    shard: int
    writers: list[SiteWriter]
    """Writers of the sites that lack the shard."""
    claim: Claim
    is_new: bool
    """Whether its tokens are not yet counted as progress."""


class Sharing:
    """The shards of a store, as this worker sees them.

    Every worker writes the lowest shard that nobody has written or claimed. So shards come in ascending
    order, but for as many as there are workers, and a run that follows the store waits for none for long.

    Args:
        store: the store.
        writers: of the sites asked for.
        worker: this process.
        room: where shards may lie, and how many.
    """

    def __init__(
        self, store: ActivationStore, writers: list[SiteWriter], worker: Worker, room: Room | None
    ) -> None:
        self.store, self.writers, self.worker, self.room = store, writers, worker, room
        self._counted = self._committed()
        self._lacking: list[int] = []
        self._looked = 0.0
        self._has_claimed, self._n_waits = False, 0

    @property
    def n_tokens_done(self) -> int:
        """Tokens counted as progress."""
        return sum(map(self.store.shard_length, self._counted))

    def _committed(self) -> set[int]:
        """List the shards that all sites have."""
        return set.intersection(*(writer.committed() for writer in self.writers))

    def look(self, advance: Callable[[int], None]) -> list[int]:
        """List the shards that some site lacks and that are wanted. What others have committed is counted as
        progress."""
        self._looked = time.monotonic()
        committed = self._committed()
        self._lacking = [shard for shard in range(self.store.n_shards) if shard not in committed]
        if self.room is not None:
            self._lacking = self.room.wanted(self._lacking)
        for shard in committed - self._counted:
            advance(self.store.shard_length(shard))
        self._counted |= committed
        return self._lacking

    def claimed(self, advance: Callable[[int], None]) -> Iterator[Share]:
        """Claim the lowest shard that can be claimed, again and again until there is none."""
        while share := self._lowest(advance):
            yield share

    def _lowest(self, advance: Callable[[int], None]) -> Share | None:
        """Claim the lowest shard that can be claimed and has room."""
        for shard in tuple(self._lacking):
            self.worker.check_stop()
            if time.monotonic() - self._looked > LOOK_SECONDS:
                self.look(advance)
            if shard not in self._lacking:
                continue
            if self.room is not None and not self.room.has(shard, self._lacking):
                return None
            if not (claim := self.worker.claim(f"shard-{shard}")):
                continue
            mark = self.worker.place.mark
            needing = [writer for writer in self.writers if mark(writer.commit_path(shard)) is None]
            if not needing:  # another worker was quicker, and let go of it
                claim.release()
                continue
            is_new = shard not in self._counted
            self._counted.add(shard)
            # It stays among those that are lacking, and takes room as one of them, until it is committed.
            self._has_claimed = True
            return Share(shard, needing, claim, is_new)
        return None

    def wait(self) -> None:
        """Wait where others hold all shards that are lacking, or where there is no room for one: not after a
        round that gave this worker a shard."""
        if self._has_claimed:
            self._has_claimed, self._n_waits = False, 0
            return
        why = self.room.why if self.room is not None else ""
        if not why:
            holders = self.worker.holders([f"shard-{shard}" for shard in self._lacking]) or "others"
            why = f"waiting for {holders} to write the last shards"
        self.worker.wait(self._n_waits, why)
        self._n_waits = self._n_waits + 1 if self.room is None else min(self._n_waits + 1, ROOM_WAITS)

"""Choice of the shard that this process writes next, where any number of processes fill one store."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from saemill.cache.claims.worker import Claim, Worker
from saemill.cache.writer import SiteWriter
from saemill.common.stores.activations import ActivationStore

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

    Args:
        store: the store.
        writers: of the sites asked for.
        worker: this process.
        first: the shard that it begins at; others begin elsewhere.
    """

    def __init__(self, store: ActivationStore, writers: list[SiteWriter], worker: Worker, first: int) -> None:
        self.store, self.writers, self.worker, self._next = store, writers, worker, first
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
        """List the shards that some site lacks. What others have committed is counted as progress."""
        self._looked = time.monotonic()
        committed = self._committed()
        self._lacking = [shard for shard in range(self.store.n_shards) if shard not in committed]
        for shard in committed - self._counted:
            advance(self.store.shard_length(shard))
        self._counted |= committed
        return self._lacking

    def claimed(self, advance: Callable[[int], None]) -> Iterator[Share]:
        """Claim the unclaimed shards one after the other, beginning where the last round ended."""
        for shard in sorted(self._lacking, key=lambda shard: (shard < self._next, shard)):
            self.worker.check_stop()
            if time.monotonic() - self._looked > LOOK_SECONDS:
                self.look(advance)
            if shard not in self._lacking or not (claim := self.worker.claim(f"shard-{shard}")):
                continue
            needing = [writer for writer in self.writers if not writer.commit_path(shard).exists()]
            if not needing:  # another worker was quicker, and let go of it
                claim.release()
                continue
            is_new = shard not in self._counted
            self._counted.add(shard)
            self._next, self._has_claimed = shard + 1, True
            yield Share(shard, needing, claim, is_new)

    def wait(self) -> None:
        """Wait where others hold all shards that are lacking: not after a round that gave this worker a
        shard."""
        if self._has_claimed:
            self._has_claimed, self._n_waits = False, 0
            return
        holders = self.worker.holders([f"shard-{shard}" for shard in self._lacking]) or "others"
        self.worker.wait(self._n_waits, f"waiting for {holders} to write the last shards")
        self._n_waits += 1

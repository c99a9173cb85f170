"""Room on the disk: shards that all followers are past are removed, so that others can be written.

The lowest shards that are lacking come first, so how many may lie on the disk says which may be written,
whoever writes them: one with a number is written when it, those below it that are lacking, and those that
are there already fit in. No worker has to know what the others are writing.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from saemill.cache.claims.worker import Worker
from saemill.cache.folder import put
from saemill.cache.writer import SiteWriter
from saemill.common import records
from saemill.common.errors import ConfigError, StoreError
from saemill.common.log import counted, say
from saemill.common.sizes import written
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.followers import Consumed, Follower, followers_of, read_consumed
from saemill.common.stores.site_records import CONSUMED


class Room:
    """The room that the shards of some sites have, in a store whose shards may be removed.

    Args:
        store: the store.
        writers: of the sites.
        worker: this process.
        max_bytes: most bytes that these sites' shards take.

    Raises:
        ConfigError: a run that follows the store needs more.
    """

    def __init__(
        self, store: ActivationStore, writers: list[SiteWriter], worker: Worker, max_bytes: int
    ) -> None:
        self.store, self.writers, self.worker = store, writers, worker
        self.shard_bytes = sum(writer.array.shard_bytes for writer in writers)
        self.n_shards: int = max_bytes // self.shard_bytes
        """Number of shards that have room."""
        self.why = ""
        """What is waited for; empty where there is room."""
        self._check(self._followers())
        with worker.hold("store"):
            if read_consumed(store.path, store.settings.identity) is None:
                self._write(self._consumed())  # from now on followers know that shards may go
            self._remove(self._consumed())  # of which a kill may have left some

    @property
    def stays_open(self) -> bool:
        """Whether the sites are not to be finished: shards are removed, or not wanted and so not written."""
        return bool(self._consumed().shards) or any(map(self._lacks, self.writers))

    def _lacks(self, writer: SiteWriter) -> bool:
        lacking = writer.lacking()
        return len(lacking) > 0 and not self.wanted(lacking)

    @property
    def left(self) -> str:
        """What is left of the sites, in words."""
        n_written = min(len(writer.committed()) for writer in self.writers)
        n_removed = len(self._consumed().shards)
        return (
            f"written as far as runs follow it: {n_written:,} of {counted(self.store.n_shards, 'shard')}, "
            f"{n_removed:,} of them removed again when all had read them"
        )

    def wanted(self, shards: list[int]) -> list[int]:
        """Choose the shards that some run will read: where runs follow the store, one of these that has not
        ended; else one that is yet to begin."""
        followers = self._followers().values()
        if not followers:
            return shards
        stop = max((follower.stop for follower in followers if not follower.has_ended), default=0)
        return [shard for shard in shards if shard < stop]

    def has(self, shard: int, lacking: list[int]) -> bool:
        """Tell whether a shard may be written now; what all followers are past is removed for it.

        Raises:
            ConfigError: a run that follows the store needs more shards at once than have room.
        """
        self.why = ""
        if self._fits(shard, lacking):
            return True
        with self.worker.hold("store"):
            if not self._fits(shard, lacking):
                self._free()
        return not self.why and self._fits(shard, lacking)

    def _fits(self, shard: int, lacking: list[int]) -> bool:
        there = {int(place.parent.name) for w in self.writers for place in w.path.glob("c/*/0")}
        return len(there.union(other for other in lacking if other <= shard)) <= self.n_shards

    def _free(self) -> None:
        """Remove what all followers are past; where nothing is, say what is waited for. The caller holds the
        claim on the store."""
        followers = self._followers()
        self._check(followers)
        before, now = self._consumed(), self._removable(followers)
        if len(now.shards) > len(before.shards):
            self._write(now)
            if self._removable(self._followers()) == now:
                self._remove(now)
                return
            self._write(before)  # a run began to follow just now
        self.why = self._waiting(followers)

    def _waiting(self, followers: Mapping[Path, Follower]) -> str:
        """Say whom the store waits for."""
        path, n_bytes = self.store.path, self.n_shards * self.shard_bytes
        full = f"the shards of {path} fill the {written(n_bytes)} of max_disk"
        going = [(f.start, f.run, record) for record, f in followers.items() if not f.has_ended]
        if not going:
            return f"{full}; waiting for a run that reads them: saemill train {path} --follow …"
        start, run, record = min(going)
        return (
            f"{full}; waiting for {run}, which needs those from {start} on. If that run will not go on, "
            f"remove {record}"
        )

    def _removable(self, followers: Mapping[Path, Follower]) -> Consumed:
        """Work out which shards may be removed, those that are removed already included."""
        before, going = self._consumed(), [f for f in followers.values() if not f.has_ended]
        stop = max(before.stop, min((f.start for f in going), default=0))
        first = max((f.n_kept for f in going), default=0)
        if before.shards:
            first = min(first, before.first)
        return before.model_copy(update={"first": min(first, stop), "stop": stop})

    def _consumed(self) -> Consumed:
        """Read which shards are removed already."""
        identity, sites = self.store.settings.identity, {writer.site.name for writer in self.writers}
        known = read_consumed(self.store.path, identity) or Consumed(store=identity, sites=())
        return known.model_copy(update={"sites": tuple(sorted({*known.sites, *sites}))})

    def _write(self, consumed: Consumed) -> None:
        put(self.store.path / CONSUMED, records.content(consumed), self.worker)

    def _remove(self, consumed: Consumed) -> None:
        """Remove the files of the shards that the record names."""
        for writer in self.writers:
            writer.removed = consumed.shards
            for shard in consumed.shards:
                file = writer.array.shard_path(shard)
                file.unlink(missing_ok=True)
                with suppress(OSError):  # its folder is gone; or a file system still has the file in it
                    file.parent.rmdir()

    def _check(self, followers: Mapping[Path, Follower]) -> None:
        """Refuse less room than a run needs."""
        for follower in followers.values():
            n_needed = min(follower.n_kept + follower.at_once, self.store.n_shards)
            if n_needed > self.n_shards and not follower.has_ended:
                needed = written(n_needed * self.shard_bytes)
                raise ConfigError(
                    f"max_disk: {follower.run} needs {counted(n_needed, 'shard')} at once, and there is room "
                    f"for {self.n_shards:,}; give --max-disk {needed} or more, or train with a smaller "
                    "--follow-tokens"
                )

    def _followers(self) -> Mapping[Path, Follower]:
        return followers_of(self.store.path, self.store.settings.identity)


def make_whole(store: ActivationStore, sites: list[str], worker: Worker) -> None:
    """Forget that shards of some sites were removed, so that they are computed again. The caller holds the
    claim on the store.

    Raises:
        StoreError: other processes fill it, and may be removing more.
    """
    consumed = read_consumed(store.path, store.settings.identity)
    if consumed is None or not set(sites) & set(consumed.sites):
        return
    if consumed.shards:
        if not worker.is_alone():
            raise StoreError(
                f"other processes are filling {store.path} with --delete-consumed; stop them first, or give "
                "--delete-consumed and --max-disk here too"
            )
        say(f"{counted(len(consumed.shards), 'shard')} of {store.path} that were removed are computed again")
    if others := tuple(site for site in consumed.sites if site not in sites):
        left = consumed.model_copy(update={"sites": others})
        put(store.path / CONSUMED, records.content(left), worker)
    else:
        (store.path / CONSUMED).unlink()

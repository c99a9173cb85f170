"""Room on the disk: shards that all followers are past are removed, so that others can be written.

The lowest shards that are lacking come first, so how many may lie on the disk says which may be written,
whoever writes them: one with a number is written when it, those below it that are lacking, and those that
are there already fit in. No worker has to know what the others are writing.
"""

import itertools
from collections.abc import Iterable, Mapping
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


def fits(shard: int, lacking: Iterable[int], there: set[int], n_shards: int) -> bool:
    """Tell whether a shard has room beside those that are there and those that come before it.

    Args:
        shard: its number.
        lacking: shards that are not written, whoever may be writing them.
        there: shards on the disk.
        n_shards: number that have room.
    """
    return len(there.union(other for other in lacking if other <= shard)) <= n_shards


class Room:
    """The room that the shards of some sites have, in a store whose shards may be removed.

    Args:
        store: the store.
        writers: of the sites.
        worker: this process.
        max_bytes: most bytes that these sites' shards take.

    Raises:
        ConfigError: a run that follows the store needs more; or shards of other sites were removed.
    """

    def __init__(
        self, store: ActivationStore, writers: list[SiteWriter], worker: Worker, max_bytes: int
    ) -> None:
        self.store, self.writers, self.worker = store, writers, worker
        self.shard_bytes = sum(writer.array.raw_bytes for writer in writers)
        """Bytes that a shard of all sites takes, at most: before compression."""
        self.n_shards: int = max_bytes // self.shard_bytes
        """Number of shards that have room."""
        self.why = ""
        """What is waited for; empty where there is room."""
        self._check(self._followers())
        with worker.hold("store"):
            known = records.if_whole(lambda: read_consumed(store.path, store.settings.identity))
            if known and known.shards and {writer.site.name for writer in writers} - {*known.sites}:
                raise ConfigError(
                    f"shards of {', '.join(known.sites)} in {store.path} were removed already; cache other "
                    "sites into a store of their own"
                )
            # From now on followers know that shards of these sites may go.
            self._write(self._without_needed(self._found_removed() if known is None else known))
            self._remove(self._consumed())  # of which a kill may have left some

    def _without_needed(self, consumed: Consumed) -> Consumed:
        """Take back what a kill has left on the disk, where a run needs it that began to follow just then."""
        followers = self._followers().values()
        first = next((s for s in consumed.shards if any(f.needs(s) for f in followers)), consumed.stop)
        files = [w.array.shard_path(s) for w in self.writers for s in range(first, consumed.stop)]
        if not all(file.exists() for file in files):
            return consumed
        return consumed.model_copy(update={"stop": first})

    def refresh(self) -> None:
        """Read anew which shards are removed, as another worker may have removed more. The caller holds the
        claim on the store."""
        for writer in self.writers:
            writer.removed = self._consumed().shards

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
        return [shard for shard in shards if any(follower.needs(shard) for follower in followers)]

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
        return fits(shard, lacking, there, self.n_shards)

    def _free(self) -> None:
        """Remove what all followers are past; where nothing is, say what is waited for. The caller holds the
        claim on the store."""
        followers = self._followers()
        self._check(followers)
        before = self._consumed()
        if any(writer.removed != before.shards for writer in self.writers):
            self._remove(before)  # which a worker on other sites has written down
            return
        now = _removable(followers, before)
        if len(now.shards) > len(before.shards):
            self._write(now)
            if _removable(self._followers(), before) == now:
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
        gone = "" if Path(run).exists() else ", though there is no such folder here"
        return (
            f"{full}; waiting for {run}, which needs those from {start} on{gone}. If that run will not go "
            f"on, remove {record}"
        )

    def _consumed(self) -> Consumed:
        """Read which shards are removed already; none where another worker has finished the sites."""
        identity = self.store.settings.identity
        return read_consumed(self.store.path, identity) or Consumed(store=identity, sites=())

    def _found_removed(self) -> Consumed:
        """Find the shards that were removed where the record of them is damaged: they have one of their own,
        but no file, and no run needs them. Where there was no record none is."""
        nothing = Consumed(store=self.store.settings.identity, sites=())
        if not (self.store.path / CONSUMED).exists():
            return nothing
        say(f"{self.store.path / CONSUMED} was damaged and is written again")
        writer, followers = self.writers[0], self._followers().values()
        gone = [
            shard
            for shard in sorted(writer.committed())
            if not writer.array.shard_path(shard).exists() and not any(f.needs(shard) for f in followers)
        ]
        if not gone:
            return nothing
        stop = next(shard for shard in itertools.count(gone[0]) if shard not in gone)
        return nothing.model_copy(update={"first": gone[0], "stop": stop})

    def _write(self, consumed: Consumed) -> None:
        sites = {*consumed.sites, *(writer.site.name for writer in self.writers)}
        consumed = consumed.model_copy(update={"sites": tuple(sorted(sites))})
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
        """Refuse less room than the runs need: for what one keeps to its end, and what one needs at once."""
        going = [follower for follower in followers.values() if not follower.has_ended]
        if not going:
            return
        n_kept, largest = max(f.n_kept for f in going), max(going, key=lambda f: f.at_once)
        n_needed = min(n_kept + largest.at_once, self.store.n_shards)
        if n_needed > self.n_shards:
            needed = written(n_needed * self.shard_bytes)
            kept = f", beside the first {n_kept:,} that are kept to measure on" if n_kept else ""
            raise ConfigError(
                f"max_disk: {largest.run} needs {counted(largest.at_once, 'shard')} at once{kept}, and there "
                f"is room for {self.n_shards:,}; give --max-disk {needed} or more, or train with a smaller "
                "--follow-tokens"
            )

    def _followers(self) -> Mapping[Path, Follower]:
        return followers_of(self.store.path, self.store.settings.identity)


def _removable(followers: Mapping[Path, Follower], before: Consumed) -> Consumed:
    """Work out which shards may be removed, those of before included."""
    going = [follower for follower in followers.values() if not follower.has_ended]
    stop = max(before.stop, min((follower.start for follower in going), default=0))
    first = max((follower.n_kept for follower in going), default=0)
    if before.shards:
        first = min(first, before.first)
    return before.model_copy(update={"first": min(first, stop), "stop": stop})


def make_whole(store: ActivationStore, sites: list[str], worker: Worker, *, is_done: bool = False) -> None:
    """Forget that shards of some sites were removed, so that they are computed again. The caller holds the
    claim on the store.

    Args:
        store: the store.
        sites: names of the sites.
        worker: this process.
        is_done: whether the sites are finished, so that nothing is removed any more.

    Raises:
        StoreError: other processes fill it, and may be removing more.
    """
    consumed = records.if_whole(lambda: read_consumed(store.path, store.settings.identity))
    if consumed is None:
        (store.path / CONSUMED).unlink(missing_ok=True)
        return
    if not set(sites) & set(consumed.sites):
        return
    if not is_done and not worker.is_alone():
        raise StoreError(
            f"other processes are filling {store.path} with --delete-consumed; stop them first, or give "
            "--delete-consumed and --max-disk here too"
        )
    if consumed.shards:
        say(f"{counted(len(consumed.shards), 'shard')} of {store.path} that were removed are computed again")
    if others := tuple(site for site in consumed.sites if site not in sites):
        left = consumed.model_copy(update={"sites": others})
        put(store.path / CONSUMED, records.content(left), worker)
    else:
        (store.path / CONSUMED).unlink()

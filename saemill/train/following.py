"""A run that follows a store: it waits for shards, and tells the store which ones it still needs."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from threading import Event

from saemill.common import records
from saemill.common.errors import Interrupted, StoreError
from saemill.common.log import duration, say
from saemill.common.stores.followed import FollowedStore
from saemill.common.stores.followers import Follower, follower_path, read_consumed
from saemill.common.stores.site_records import site_path
from saemill.common.world import Group
from saemill.train.stream import units
from saemill.train.stream.followed_rows import FollowedRows
from saemill.train.stream.following import Groups
from saemill.train.stream.loader import Loader
from saemill.train.stream.whole_rows import WholeRows

LONGEST_WAIT = 2.0
"""Most seconds between two looks at the store."""
LOOKS = (0.1, 0.3, 1.0)
"""Seconds between looks at what is removed, after which it is believed."""
SILENT_WAITS = 4
"""Waits in a row before the user is told."""


class Following:
    """The shards of the store that a run needs, and those that it waits for.

    Args:
        loader: the run's stream.
        run: folder of the run.
        run_hash: the hash that names it.
        n_steps: of the run.
        n_kept: number of the first shards that measurements need to the end.
        stop: event that ends waiting.
    """

    def __init__(
        self, loader: Loader, run: Path, run_hash: str, n_steps: int, n_kept: int, stop: Event
    ) -> None:
        store, order, rows = loader.store, loader.order, loader.rows
        assert isinstance(store, FollowedStore)
        assert isinstance(order, Groups)
        assert isinstance(rows, FollowedRows)
        self.store, self.order, self.rows = store, order, rows
        self.run, self.run_hash, self.n_kept, self.stop = run, run_hash, n_kept, stop
        self.batch_tokens, self.end = loader.batch_tokens, n_steps * loader.batch_tokens
        self.group = 0
        """Group that the run is in, by its latest checkpoint."""
        self.waits = 0
        """Number of waits in a row."""
        self._waited_seconds = 0.0

    def check(self, step: int) -> None:
        """Refuse to begin after so many steps where shards that are needed then are gone.

        Raises:
            StoreError: they are.
        """
        consumed = read_consumed(self.store.path, self.store.settings.identity)
        if consumed is None:
            return
        start = self.order.shards_of(self._group_at(step)).start
        needed = (*range(self.n_kept), *range(start, self.order.shards_of(self._group_at_end).stop))
        for site in self.rows.sites:
            if site in consumed.sites and set(needed) & set(consumed.shards):
                raise StoreError(consumed.refusal(site, self.store.path))

    def begin(self, step: int, everyone: Group) -> None:
        """Tell the store what the run needs, wait for the shards that its units follow from, and write these
        down. All processes call it together.

        Args:
            step: number of steps done.
            everyone: the run's processes.

        Raises:
            StoreError: shards that it needs are gone.
            Interrupted: a signal came.
        """
        self.group = self._group_at(step)
        everyone.first(lambda: self._register_for(step))
        self.order.pass_by(self.group)
        groups = enumerate(self.store.groups)
        of_kept = next((group for group, shards in groups if self.n_kept <= shards.stop), 0)
        self.wait_for(max(self.group, of_kept), everyone)
        everyone.first(self._write_units)

    def wait_for(self, group: int, everyone: Group) -> None:
        """Wait until the shards of all groups up to one are there. All processes call it together.

        Raises:
            Interrupted: a signal came.
        """
        while everyone.any(not self.order.has(group)):
            if everyone.any(self.stop.is_set()):
                raise Interrupted("stopped by a signal while waiting for shards; the same command continues")
            self.wait()
        self.waits = 0

    def wait_at(self, step: int, everyone: Group) -> None:
        """Wait for the group that the batch after `step` steps begins in; see `wait_for`."""
        self.wait_for(self._group_at(step), everyone)

    def wait(self) -> None:
        """Wait for a moment, longer from time to time; say for what where it takes long."""
        if self.waits == SILENT_WAITS:
            say(self._waiting())
        seconds = min(0.05 * 2**self.waits, LONGEST_WAIT)
        self.waits, self._waited_seconds = self.waits + 1, self._waited_seconds + seconds
        self.stop.wait(seconds)

    def enters(self, step: int) -> bool:
        """Tell whether with a step the run comes to shards of another group, and those before it may go."""
        return self._group_at(step) > self.group

    def frees(self) -> bool:
        """Tell whether shards are removed from the store when they are read, so that a checkpoint is worth
        its while."""
        return read_consumed(self.store.path, self.store.settings.identity) is not None

    def saved(self, step: int, everyone: Group) -> None:
        """Tell the store that a checkpoint is on the disk. All processes call it together."""
        group = self._group_at(step)
        if group > self.group:
            self.group = group
            self.store.close_shards()
            everyone.first(self._register)

    def ended(self) -> None:
        """Tell the store that the run needs nothing more."""
        path = self._path
        if not path.exists():
            return
        if self._is_whole():
            path.unlink(missing_ok=True)
        else:
            stop = self.order.shards_of(self._group_at_end).stop
            self._write(start=stop, n_kept=0)
        if self._waited_seconds >= 1:
            say(f"waited {duration(self._waited_seconds)} for shards")

    @property
    def _path(self) -> Path:
        return follower_path(self.store.path, self.run)

    @property
    def _group_at_end(self) -> int:
        return self.order.group_of(self.end - 1)

    def _group_at(self, step: int) -> int:
        """Find the group that the batch after `step` steps begins in; at the end, that of the last one."""
        return self.order.group_of(min(step * self.batch_tokens, self.end - 1))

    def _register(self) -> None:
        """Write the run's record, unless the store is finished: then nothing of it is removed."""
        if self._is_whole():
            return
        self._write(start=self.order.shards_of(self.group).start, n_kept=self.n_kept)

    def _register_for(self, step: int) -> None:
        """Write the run's record, and look once more: what is removed from then on is not needed.

        `cache` may be about to remove shards, and takes that back when it sees the record.

        Raises:
            StoreError: shards that it needs are gone; the record is withdrawn.
        """
        was_there = self._path.exists()
        self._register()
        for seconds in LOOKS:
            with suppress(StoreError):
                self.check(step)
                return
            self.stop.wait(seconds)
        try:
            self.check(step)
        except StoreError:
            if not was_there:
                self._path.unlink(missing_ok=True)
            raise

    def _write(self, start: int, n_kept: int) -> None:
        record = Follower(
            store=self.store.settings.identity,
            run=str(self.run.absolute()),
            start=start,
            stop=self.order.shards_of(self._group_at_end).stop,
            n_kept=n_kept,
            at_once=self.order.at_once(self.batch_tokens),
        )
        self._path.parent.mkdir(exist_ok=True)
        records.write(self._path, record)

    def _write_units(self) -> None:
        if units.read(self.run, self.run_hash) is None:
            units.write(self.run, self.run_hash, self.rows.units)

    def _is_whole(self) -> bool:
        """Tell whether all sites of the run are finished."""
        return all((site_path(self.store.path, site) / "manifest.json").exists() for site in self.rows.sites)

    def _waiting(self) -> str:
        """Say which shard is waited for, and whether anything writes it."""
        shard = self.order.n_there
        if (self.store.path / "claims").is_dir():
            return f"waiting for shard {shard} of {self.store.path}"
        return (
            f"waiting for shard {shard} of {self.store.path}, which nothing is writing: start the same "
            "`saemill cache` again, in another terminal"
        )


def held_out_shards(held_out: Iterable[int], n_tokens: int) -> int:
    """Count the first shards in which so many held-out tokens lie; all where there are fewer.

    Args:
        held_out: numbers of those that are not masked, by shard.
        n_tokens: how many.
    """
    n_shards = 0
    for n_held_out in held_out:
        if n_tokens <= 0:
            break
        n_tokens, n_shards = n_tokens - n_held_out, n_shards + 1
    return n_shards


def following_of(
    loader: Loader | WholeRows, run: Path, run_hash: str, n_steps: int, n_held_out: int, stop: Event
) -> Following | None:
    """Make what follows the store, if the run follows one.

    Args:
        loader: the run's stream.
        run: folder of the run.
        run_hash: the hash that names it.
        n_steps: of the run.
        n_held_out: most held-out tokens that SAEs are measured on; 0 for none.
        stop: event that ends waiting.
    """
    if not isinstance(loader, Loader) or not isinstance(loader.store, FollowedStore):
        return None
    store, mask = loader.store, loader.mask
    held_out = (int(store.keep_addresses(s, mask, held_out=True).sum()) for s in range(store.n_shards))
    n_kept = held_out_shards(held_out, n_held_out)
    return Following(loader, run, run_hash, n_steps, n_kept, stop)

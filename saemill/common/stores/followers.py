"""Who reads a store while it is being filled, and which of its shards are gone since all have read them.

    followers/<hash>.json    a run that trains on the store: the shards that it needs; written by that run
    consumed.json            that shards may be removed, and which are; written by `saemill cache`

A run needs its shards until a checkpoint that is past them is on the disk. The record of what is consumed is
written before a shard is removed, and shards are looked for by it: one that is missing otherwise is damage.
"""

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from saemill.common import durable, records
from saemill.common.errors import MissingError, StoreError
from saemill.common.records import Count, Hash, Positive, Record
from saemill.common.stores.site_records import CONSUMED, FOLLOWERS, REPAIR, SiteName


class Follower(Record):
    """A run that trains on a store that is being filled."""

    format: Literal["saemill follower 1"] = "saemill follower 1"
    store: Hash
    """Identity of the store."""
    run: str
    """Path of the run."""
    start: Count
    """First shard that it still needs."""
    stop: Positive
    """Shard behind the last one that it needs; `start` where it has ended."""
    n_kept: Count
    """Number of the first shards, which it needs to its end: for measurements on held-out text."""
    at_once: Positive
    """Number of consecutive shards that it needs together to go on."""

    @model_validator(mode="after")
    def _check(self) -> "Follower":
        if self.start > self.stop:
            raise ValueError("start must not be behind stop")
        return self

    @property
    def has_ended(self) -> bool:
        """Whether it needs no shard any more."""
        return self.start == self.stop

    def needs(self, shard: int) -> bool:
        """Tell whether it will read a shard."""
        return not self.has_ended and (self.start <= shard < self.stop or shard < self.n_kept)


class Consumed(Record):
    """`consumed.json`: shards `first` to `stop` - 1 are removed, or about to be."""

    format: Literal["saemill consumed shards 1"] = "saemill consumed shards 1"
    store: Hash
    sites: tuple[SiteName, ...]
    first: Count = 0
    stop: Count = 0

    @model_validator(mode="after")
    def _check(self) -> "Consumed":
        if self.first > self.stop:
            raise ValueError("first must not be behind stop")
        return self

    @property
    def shards(self) -> range:
        """Shards that are removed."""
        return range(self.first, self.stop)

    def refusal(self, site: str, store: Path) -> str:
        """Say that a site cannot be read as a whole, why, and what helps."""
        several = f"shards {self.first} to {self.stop - 1} were"
        which = several if len(self.shards) > 1 else f"shard {self.first} was"
        return (
            f"site {site!r} of {store} is consumed: its {which} removed when all runs that followed it "
            "had read them. `saemill cache` without --delete-consumed computes them again"
        )


def follower_path(store: Path, run: Path) -> Path:
    """Name the record of a run in the store that it follows."""
    return store / FOLLOWERS / f"{durable.hash_json(str(run.absolute()))}.json"


def followers_of(store: Path, identity: str) -> dict[Path, Follower]:
    """Read the records of all runs that follow a store, by their paths.

    Raises:
        StoreError: one is damaged, or of another store.
    """
    found = {}
    for path in sorted((store / FOLLOWERS).glob("[!.]*.json")):
        repair = "Remove it if its run will not go on; else the same `saemill train` writes it again."
        try:
            found[path] = records.read(path, Follower, repair)
        except MissingError:  # its run has ended, or it was removed as the message advises
            continue
        if found[path].store != identity:
            raise StoreError(f"{path} is of another store, or of other settings. {repair}")
    return found


def read_consumed(store: Path, identity: str) -> Consumed | None:
    """Read which shards of a store are removed; None where none may be.

    Raises:
        StoreError: the record is damaged, or of another store.
    """
    path = store / CONSUMED
    if not path.exists():
        return None
    record = records.read(path, Consumed, REPAIR)
    if record.store != identity:
        raise StoreError(f"{path} is of another store, or of other settings. {REPAIR}")
    return record

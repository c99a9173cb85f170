"""How the finished files of a store get to their places: on a disk, or in a bucket that has a mirror here.

Both know one act that only one process can do, of any that try at once: to make a file where there is none.
So both have claims too. What is unfinished is on a disk in any case.
"""

import shutil
from pathlib import Path
from typing import Protocol

from platformdirs import user_cache_path

from saemill.cache.claims.board import Board
from saemill.cache.claims.files import Files, remove
from saemill.cache.claims.objects import Objects
from saemill.common import durable
from saemill.common.addresses import address_of
from saemill.common.errors import ConfigError
from saemill.common.outlook import free_bytes, nearest_folder, shown
from saemill.common.sizes import written
from saemill.common.stores import mirror
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.objects import MOST_BYTES
from saemill.common.stores.site_records import CLAIMS
from saemill.common.world import World

Mark = int | str | None
"""What is another one when a file is: its inode, or its object's tag; None where there is none."""


class Place(Protocol):
    """Where a store lies. All paths are those of files in its folder."""

    name: str
    """Name that the user gave it."""
    folder: Path
    """Its folder, or the mirror of its address."""
    claims: Board
    """Claims of its workers."""
    unfinished: Path
    """Folder for what they have not finished writing."""

    def create(self, finished: Path, path: Path) -> Mark:
        """Put a finished file in its place, where there is none.

        Raises:
            FileExistsError: there is one, of other content.
        """

    def replace(self, finished: Path, path: Path) -> Mark:
        """Put a finished file in its place, in place of another too."""

    def replace_text(self, finished: Path, path: Path) -> None:
        """Put a finished folder of tokens or passages in place of what is there."""

    def mark(self, path: Path) -> Mark:
        """Look up the mark of what is there now."""

    def remove(self, path: Path) -> None:
        """Remove a file, or a folder with all its files, if it is there."""

    def refresh(self) -> None:
        """Learn what others have changed."""

    def opened(self) -> ActivationStore:
        """Open the store."""

    def named(self, path: Path) -> str:
        """Name a file as messages do."""

    def check_room(self, n_bytes: float, shard_bytes: float, advice: str) -> None:
        """Refuse what has no room.

        Args:
            n_bytes: of all shards that are lacking.
            shard_bytes: of the largest one.
            advice: what takes less.

        Raises:
            ConfigError: it will not fit.
        """


class OnDisk:
    """A folder.

    Args:
        folder: it.
    """

    def __init__(self, folder: Path) -> None:
        self.name, self.folder, self.unfinished = str(folder), folder, folder / CLAIMS
        self.claims: Board = Files(self.unfinished)

    def create(self, finished: Path, path: Path) -> Mark:
        """Link a file; see `Place`."""
        mark = self.mark(finished)
        durable.place(finished, path)
        return mark

    def replace(self, finished: Path, path: Path) -> Mark:
        """Rename a file; see `Place`."""
        mark = self.mark(finished)
        path.parent.mkdir(parents=True, exist_ok=True)
        finished.replace(path)
        durable.sync_folder(path.parent)
        return mark

    def replace_text(self, finished: Path, path: Path) -> None:
        """Rename a folder; see `Place`."""
        shutil.rmtree(path, ignore_errors=True)
        finished.replace(path)
        durable.sync_folder(path.parent)

    def mark(self, path: Path) -> Mark:
        """Look up an inode; see `Place`."""
        try:
            return path.stat().st_ino
        except FileNotFoundError:
            return None

    def remove(self, path: Path) -> None:
        """Remove a file or folder; see `Place`."""
        remove(path)

    def refresh(self) -> None:
        """Do nothing: the folder is what is there."""

    def opened(self) -> ActivationStore:
        """Open the store; see `Place`."""
        return ActivationStore(self.folder)

    def named(self, path: Path) -> str:
        """Name a file by its path."""
        return str(path)

    def check_room(self, n_bytes: float, shard_bytes: float, advice: str) -> None:
        """Compare with what is free on the disk; see `Place`."""
        free = free_bytes(self.folder)
        if n_bytes > free:
            raise ConfigError(
                f"{n_bytes / 2**20:,.1f} MiB are needed in {nearest_folder(self.folder)}, "
                f"{free / 2**20:,.1f} MiB are free; choose another disk, {advice}"
            )


class InBucket:
    """An address in an object store.

    Args:
        address: it.

    Raises:
        StoreError: other things lie there.
        ConfigError, DiskError: it cannot be read.
    """

    def __init__(self, address: str) -> None:
        self.name, self.mirror = address, mirror.opened_to_write(address)
        self.folder = self.mirror.folder
        self.claims: Board = Objects(self.mirror.remote)
        self.unfinished = spool() / "unfinished" / self.folder.name
        self.unfinished.mkdir(parents=True, exist_ok=True)

    def create(self, finished: Path, path: Path) -> Mark:
        """Upload a file by a conditional PUT; see `Place`."""
        return self.mirror.create(path, finished.read_bytes())

    def replace(self, finished: Path, path: Path) -> Mark:
        """Upload a file; see `Place`."""
        mark = self.mirror.write(path, finished.read_bytes())
        finished.unlink()
        return mark

    def replace_text(self, finished: Path, path: Path) -> None:
        """Upload a folder. Its manifest comes first, by which a store that was begun is known; what lacks
        after a kill is seen by it."""
        self.remove(path)
        files = sorted(file for file in finished.rglob("*") if file.is_file())
        for file in sorted(files, key=lambda file: file != finished / "manifest.json"):
            self.replace(file, path / file.relative_to(finished))
        shutil.rmtree(finished)

    def mark(self, path: Path) -> Mark:
        """Look up a tag; see `Place`."""
        return self.mirror.tag(path)

    def remove(self, path: Path) -> None:
        """Remove an object, or all below a folder; see `Place`."""
        key = self.mirror.key_of(path)
        for other in [other for other in self.mirror.known.objects if other.startswith(f"{key}/")]:
            self.mirror.remove(self.folder / other)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            self.mirror.remove(path)

    def refresh(self) -> None:
        """List the bucket; see `Place`."""
        self.mirror.refresh()

    def opened(self) -> ActivationStore:
        """Open the store; see `Place`. It knows of the objects that are written here."""
        store = ActivationStore(self.folder)
        store.mirror = self.mirror
        return store

    def named(self, path: Path) -> str:
        """Name a file by its address."""
        return self.mirror.name_of(path)

    def check_room(self, n_bytes: float, shard_bytes: float, advice: str) -> None:
        """Compare a shard with the largest object, and with what is free on the disk here; see `Place`."""
        check_bucket(self.name, shard_bytes)


def check_bucket(address: str, shard_bytes: float, mirrored_bytes: int = 0) -> None:
    """Refuse shards that an object store does not take at once, or that have no room on the disk here, where
    each is made before it is sent.

    Args:
        address: where the store is to lie.
        shard_bytes: of the largest shard.
        mirrored_bytes: of what the mirror of the address will hold.

    Raises:
        ConfigError: they are too large.
    """
    if shard_bytes > MOST_BYTES:
        raise ConfigError(
            f"a shard takes {written(int(shard_bytes))}, and an object of {address} at most "
            f"{written(MOST_BYTES)}; {SMALLER}"
        )
    needed, free = spooled_bytes(address, shard_bytes, mirrored_bytes), free_bytes(spool())
    if needed > free:
        raise ConfigError(
            f"{shown(needed)} are needed in {nearest_folder(spool())}, {shown(free)} are free: shards of "
            f"{address} are made there before they are sent, beside the records and the tokens; choose "
            f"another disk by XDG_CACHE_HOME, remove {spool() / 'blocks'}, or {SMALLER}"
        )


SMALLER = "make shards smaller: --shard-tokens, of passages --shard-rows"


def spool() -> Path:
    """Name the folder that holds mirrors of addresses, and what is on its way there."""
    return user_cache_path("saemill")


def spooled_bytes(address: str, shard_bytes: float, mirrored_bytes: int) -> float:
    """Work out how many more bytes are in that folder at once: a shard of each process of this machine, and
    what is not in the mirror yet; arguments as of `check_bucket`."""
    lacking = mirrored_bytes - durable.folder_bytes(mirror.folder_of(address))
    return shard_bytes * World.here().local_size + max(0, lacking)


def place_of(out: Path) -> OnDisk | InBucket:
    """Find where a store is to lie that the user names."""
    address = address_of(out)
    return OnDisk(out) if address is None else InBucket(address)

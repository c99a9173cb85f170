"""A store that lies in an object store: its records in a folder here, its shards read where they are.

    s3://bucket/acts       each file of a store under its own name
    <folder>/              the mirror: tokens and records, as they are there
    <folder>/objects.json  the address, and every object's size
    <folder>.partial/      files that are being written, by any process that has the mirror

A mirror is the store's folder to all that reads one, and to `cache`, which writes one. What is large stays:
the shards of activations, of which blocks are read as they are needed, and the records of single shards,
which few ask for but `cache`. A token store is fetched whole.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal
from uuid import uuid4

import xxhash
from platformdirs import user_cache_path

from saemill.common import durable, records
from saemill.common.addresses import address_of
from saemill.common.errors import MissingError, StoreError
from saemill.common.records import Count, Record
from saemill.common.stores.local_cache import LocalCache
from saemill.common.stores.objects import ObjectContent, ObjectStore, is_tag_of
from saemill.common.stores.site_records import CLAIMS

OBJECTS, GROUP, TOKENS = "objects.json", "zarr.json", "manifest.json"
"""Names of the mirror's own record, of a file that every store has, and of one that a token store has."""
TEXT, SITES = ("tokens/", "passages/"), "sites/"
PIECE_BYTES = 1 << 24
"""Bytes of a large object that are read at a time."""
LEFT_SECONDS = 3600
"""Time without a piece written after which whoever wrote is gone; all attempts at one take 6 minutes."""
N_READERS = 32
"""Threads that read blocks at once: an object store answers late, but many at a time."""


class Object(Record):
    """An object, as it was listed."""

    n_bytes: Count
    tag: str | None
    """What changes with its content, where the provider tells."""


class Objects(Record):
    """What lies at an address."""

    format: Literal["saemill mirror 1"] = "saemill mirror 1"
    address: str
    objects: dict[str, Object]


class Mirror:
    """The mirror in a folder.

    Args:
        folder: with its `objects.json`.
        to_write: whether what lies at the address is changed meanwhile, by this process and others.

    Raises:
        StoreError: that is damaged.
    """

    def __init__(self, folder: Path, to_write: bool = False) -> None:
        self.folder, self.to_write = folder, to_write
        self.known = records.read(folder / OBJECTS, Objects, f"Remove {folder}, it is fetched again.")
        self.remote = ObjectStore(self.known.address)
        self.cache: LocalCache | None = None
        """Where blocks that were read are kept; None where they are not."""

    def cache_locally(self, max_bytes: int | None) -> None:
        """Keep the blocks that are read from now on on a disk here, and read them there again.

        Args:
            max_bytes: see `LocalCache`.
        """
        tags = {key: item.tag for key, item in self.known.objects.items()}
        names = [LocalCache.name_of(key, tag) for key, tag in tags.items() if tag is not None]
        self.cache = LocalCache(self.known.address, names, max_bytes)

    def refresh(self) -> None:
        """Make the mirror as the address is now, with the records of all shards."""
        with durable.exclusive(self.folder, wait=True):
            _refresh(self.remote, self.folder, to_write=True)
            self.known = records.read(self.folder / OBJECTS, Objects, "")

    def key_of(self, path: Path) -> str:
        """Name the object that a file of the folder stands for, below the address."""
        return path.relative_to(self.folder).as_posix()

    def files_in(self, folder: Path) -> list[Path]:
        """List the files of a folder of the store, those that are not fetched too."""
        key = f"{self.key_of(folder)}/"
        return [self.folder / known for known in self.known.objects if known.startswith(key)]

    def fetch(self, path: Path) -> None:
        """Fetch a file of the folder, unless it is there."""
        key = self.key_of(path)
        if not path.exists() and key in self.known.objects:
            _fetch(self.remote, key, self.known.objects[key], self.folder)

    def create(self, path: Path, content: bytes) -> str | None:
        """Write the object that a file of the folder stands for, where there is none, and the file unless it
        is a shard's.

        Returns: its tag.

        Raises:
            FileExistsError: there is one of other content.
        """
        tag = self.remote.create(self.key_of(path), content)
        self._note(path, content, tag)
        return tag

    def write(self, path: Path, content: bytes) -> str | None:
        """Write as `create` does, in place of another object too."""
        tag = self.remote.write(self.key_of(path), content)
        self._note(path, content, tag)
        return tag

    def _note(self, path: Path, content: bytes, tag: str | None) -> None:
        key = self.key_of(path)
        self.known.objects[key] = Object(n_bytes=len(content), tag=tag)
        if not _is_shard(key):
            with _placing(self.folder, key) as own:
                durable.write_bytes(own, [content])

    def remove(self, path: Path) -> None:
        """Remove the object that a file of the folder stands for, and the file."""
        self.remote.delete(self.key_of(path))
        self.known.objects.pop(self.key_of(path), None)
        path.unlink(missing_ok=True)

    def tag(self, path: Path) -> str | None:
        """Ask for the tag of the object that a file of the folder stands for, as it is now; None where there
        is none. A record is fetched that was not here."""
        key, found = self.key_of(path), self.remote.look(self.key_of(path))
        if found is None:
            path.unlink(missing_ok=True)
            return None
        self.known.objects[key] = Object(n_bytes=found.n_bytes, tag=found.tag)
        if not _is_shard(key):
            self.fetch(path)
        return found.tag

    def name_of(self, path: Path) -> str:
        """Return the address of the object that a file of the folder stands for."""
        return f"{self.known.address}/{self.key_of(path)}"

    def content(self, path: Path) -> ObjectContent:
        """Open the object that a file of the folder stands for.

        Raises:
            MissingError: there is none.
        """
        key = self.key_of(path)
        if self.to_write and key not in self.known.objects:
            self.tag(path)
        if (listed := self.known.objects.get(key)) is None:
            raise MissingError(f"{self.name_of(path)}: {durable.MISSING}")
        return ObjectContent(self.remote, key, listed.n_bytes, listed.tag, self.cache)

    def forget(self, path: Path) -> None:
        """Keep nothing here of the object that a file of the folder stands for, so that it is read anew."""
        key = self.key_of(path)
        if self.cache is not None and (tag := self.known.objects[key].tag) is not None:
            self.cache.forget(LocalCache.name_of(key, tag))

    def problem(self, path: Path, n_bytes: int, xxh3: str | None = None) -> str | None:
        """Describe how an object differs from what was written, as `durable.problem` does."""
        try:
            content = self.content(path)
            if len(content) != n_bytes:
                return f"file has {len(content):,} bytes, expected {n_bytes:,}"
            return durable.DIFFERS if xxh3 is not None and _hash(content) != xxh3 else None
        except MissingError:
            return durable.MISSING


def _hash(content: ObjectContent) -> str:
    """Compute xxh3 of an object's bytes, read in pieces."""
    digest = xxhash.xxh3_64()
    for start in range(0, len(content), PIECE_BYTES):
        digest.update(content[start : start + PIECE_BYTES].data)
    return digest.hexdigest()


def opened(path: Path | str, anew: bool = False) -> tuple[Path, Mirror | None]:
    """Find the folder of a store that is to be read: itself, or the mirror of an address, brought up to date.

    Args:
        path: the folder, or the address.
        anew: whether all that the mirror holds is fetched again, in case that it was damaged here.

    Returns: the folder; and where it is a mirror, this.

    Raises:
        MissingError: nothing lies at the address.
        ConfigError, DiskError: it cannot be read.
    """
    if address := address_of(path):
        mirror = _brought_up(address, anew=anew)
        return mirror.folder, mirror
    folder = Path(path)
    return folder, Mirror(folder) if (folder / OBJECTS).exists() else None


def opened_to_write(address: str) -> Mirror:
    """Open the mirror of an address that a store is written to, or added to.

    Raises:
        StoreError: other things lie there.
        ConfigError, DiskError: it cannot be read.
    """
    return _brought_up(address, to_write=True)


def folder_of(address: str) -> Path:
    """Name the folder of the mirror of an address."""
    return user_cache_path("saemill") / "remote" / durable.hash_bytes(address.encode())


def _brought_up(address: str, to_write: bool = False, anew: bool = False) -> Mirror:
    """Open the mirror of an address, brought up to date."""
    folder = folder_of(address)
    with durable.exclusive(folder, wait=True):
        _refresh(ObjectStore(address), folder, to_write, anew)
    return Mirror(folder, to_write)


def _refresh(remote: ObjectStore, folder: Path, to_write: bool = False, anew: bool = False) -> None:
    """Make a mirror as the address is now: fetch files that are new or differ, remove all others."""
    # Looked for first: what another process puts there meanwhile is in the bucket before it is here.
    there = [file for file in folder.rglob("*") if file.is_file() and file.name != OBJECTS]
    found = {key: item for key, item in remote.list().items() if not key.startswith(f"{CLAIMS}/")}
    listed = {key: Object(n_bytes=item.n_bytes, tag=item.tag) for key, item in found.items()}
    _check(remote.address, listed, to_write)
    before = records.if_whole(lambda: records.read(folder / OBJECTS, Objects, ""))
    known = before.objects if before else {}
    for file in there:
        key = file.relative_to(folder).as_posix()
        is_known = key in listed and not (anew and _stays(key, listed, to_write))
        if not (is_known and (listed[key] == known.get(key) or _is_as_listed(file, listed[key]))):
            file.unlink(missing_ok=True)
    for key, item in listed.items():
        if not _stays(key, listed, to_write) and (anew or not (folder / key).exists()):
            _fetch(remote, key, item, folder)
    with _placing(folder, OBJECTS) as own:
        records.write(own, Objects(address=remote.address, objects=listed))
    _clear_away(_partials(folder))


def _check(address: str, listed: Mapping[str, Object], to_write: bool) -> None:
    """Refuse what is no store, or no place for one."""
    if outside := [key for key in listed if {"", ".", ".."} & set(key.split("/"))]:
        raise StoreError(f"{address}/{outside[0]} is no name of a file; choose a folder of a store alone")
    if GROUP in listed:
        return
    if not to_write:
        raise MissingError(f"{address} holds no store; name the folder that has its {GROUP}")
    others = [key for key in listed if not key.startswith(TEXT)]  # tokens come first
    if others and not any(key.startswith(SITES) for key in others):
        raise StoreError(f"{address} holds other files ({others[0]}); choose a new folder")


def _is_as_listed(file: Path, item: Object) -> bool:
    """Tell whether a file has the content of an object, as far as its tag tells."""
    with suppress(FileNotFoundError):
        fits = item.tag is not None and file.stat().st_size == item.n_bytes
        return fits and is_tag_of(file.read_bytes(), str(item.tag))
    return False


def _stays(key: str, listed: Mapping[str, Object], to_write: bool) -> bool:
    """Tell whether an object is read where it is: a shard of activations, or its record."""
    if TOKENS in listed:
        return False
    return _is_shard(key) or ("/commits/" in key and not to_write and not key.startswith(TEXT))


def _is_shard(key: str) -> bool:
    """Tell whether an object of an activation store is a shard of activations."""
    return "/c/" in key and not key.startswith(TEXT)


def _fetch(remote: ObjectStore, key: str, item: Object, folder: Path) -> None:
    """Fetch an object into its file, whole or not at all, some of it at a time."""
    content = ObjectContent(remote, key, item.n_bytes, item.tag)
    with (
        _placing(folder, key) as own,
        durable.replacing(own, item.n_bytes) as partial,
        partial.open("wb") as file,
    ):
        for start in range(0, item.n_bytes, PIECE_BYTES):
            file.write(content[start : start + PIECE_BYTES].data)


@contextmanager
def _placing(folder: Path, key: str) -> Iterator[Path]:
    """Yield where to write a file of a mirror that then takes its place, beside other processes that write it
    too. It is outside of the mirror, where one that makes this as the address is would remove it."""
    own, path = _partials(folder) / uuid4().hex, folder / key
    try:
        yield own
        path.parent.mkdir(parents=True, exist_ok=True)
        own.replace(path)
    finally:
        own.unlink(missing_ok=True)


def _partials(folder: Path) -> Path:
    """Name the folder of what is being written of a mirror."""
    return folder.with_name(f"{folder.name}.partial")


def _clear_away(partials: Path) -> None:
    """Remove what processes that were killed have left half written."""
    for file in partials.glob("*"):
        with suppress(FileNotFoundError):  # it is in its place by now
            if time.time() - file.stat().st_mtime > LEFT_SECONDS:
                file.unlink()

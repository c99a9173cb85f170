"""A store that lies in an object store: its records in a folder here, its shards read where they are.

    s3://bucket/acts       each file of an activation store under its own name
    <folder>/              the mirror: tokens and records, as they are there
    <folder>/objects.json  the address, and every object's size

A mirror is the store's folder to all that reads one. What is large stays: the shards of activations, of which
blocks are read as they are needed, and the records of single shards, which few ask for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
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
from saemill.common.stores.objects import ObjectContent, ObjectStore

OBJECTS = "objects.json"
TEXT = ("tokens/", "passages/")
PIECE_BYTES = 1 << 24
"""Bytes of a large object that are read at a time."""
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

    Raises:
        StoreError: that is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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

    def fetch(self, path: Path) -> None:
        """Fetch a file of the folder, unless it is there."""
        key = path.relative_to(self.folder).as_posix()
        if not path.exists() and key in self.known.objects:
            _fetch(self.remote, key, self.known.objects[key], path)

    def name_of(self, path: Path) -> str:
        """Return the address of the object that a file of the folder stands for."""
        return f"{self.known.address}/{path.relative_to(self.folder).as_posix()}"

    def content(self, path: Path) -> ObjectContent:
        """Open the object that a file of the folder stands for.

        Raises:
            MissingError: there is none.
        """
        key = path.relative_to(self.folder).as_posix()
        if (listed := self.known.objects.get(key)) is None:
            raise MissingError(f"{self.name_of(path)}: {durable.MISSING}")
        return ObjectContent(self.remote, key, listed.n_bytes, listed.tag, self.cache)

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


def opened(path: Path | str) -> tuple[Path, Mirror | None]:
    """Find the folder of a store that is to be read: itself, or the mirror of an address, brought up to date.

    Returns: the folder; and where it is a mirror, this.

    Raises:
        MissingError: nothing lies at the address.
        ConfigError, DiskError: it cannot be read.
    """
    folder = Path(path)
    if address := address_of(path):
        folder = user_cache_path("saemill") / "remote" / durable.hash_bytes(address.encode())
        folder.mkdir(parents=True, exist_ok=True)
        with durable.exclusive(folder, wait=True):
            _refresh(ObjectStore(address), folder)
    return folder, Mirror(folder) if (folder / OBJECTS).exists() else None


def _refresh(remote: ObjectStore, folder: Path) -> None:
    """Make a mirror as the address is now: fetch small files that are new or differ, remove all others."""
    listed = {key: Object(n_bytes=size, tag=tag) for key, (size, tag) in remote.list().items()}
    if outside := [key for key in listed if {"", ".", ".."} & set(key.split("/"))]:
        raise StoreError(
            f"{remote.address}/{outside[0]} is no name of a file; choose a folder of a store alone"
        )
    if "zarr.json" not in listed:
        raise MissingError(
            f"{remote.address} holds no activation store; name the folder that has its zarr.json"
        )
    before = records.if_whole(lambda: records.read(folder / OBJECTS, Objects, ""))
    known = before.objects if before else {}
    for file in [file for file in folder.rglob("*") if file.is_file() and file.name != OBJECTS]:
        key = file.relative_to(folder).as_posix()
        if key not in listed or listed[key] != known.get(key):
            file.unlink(missing_ok=True)
    for key, item in listed.items():
        if not _stays(key) and not (folder / key).exists():
            _fetch(remote, key, item, folder / key)
    with _placing(folder / OBJECTS) as own:
        records.write(own, Objects(address=remote.address, objects=listed))


def _stays(key: str) -> bool:
    """Tell whether an object is read where it is: a shard of activations, or its record."""
    return not key.startswith(TEXT) and ("/c/" in key or "/commits/" in key)


def _fetch(remote: ObjectStore, key: str, item: Object, path: Path) -> None:
    """Fetch an object into a file, whole or not at all."""
    content = ObjectContent(remote, key, item.n_bytes, item.tag)
    pieces = (content[start : start + PIECE_BYTES].data for start in range(0, item.n_bytes, PIECE_BYTES))
    with _placing(path) as own:
        durable.write_bytes(own, pieces)


@contextmanager
def _placing(path: Path) -> Iterator[Path]:
    """Yield where to write a file that then takes its place, beside other processes that write it too."""
    own = path.with_name(f"{path.name}.{uuid4().hex}")
    try:
        yield own
        own.replace(path)
    finally:
        own.unlink(missing_ok=True)

"""Blocks of a store in an object store, kept on a disk here, so that the next epoch reads them from there.

    <cache>/saemill/blocks/used   the bytes that are kept; locked while that changes
    <cache>/saemill/blocks/<store>/<object>/<start>-<stop>   a range of an object, and its xxh3

A folder of an object is named by the tag of its content too, so that a range is never taken for one of an
object that has changed. One that is damaged counts as not there. An epoch reads every block once, in an
order of its own, so none of a store is better to keep than another: the first ones stay, to the bound. Room
is made of stores that no process reads, the one first that was opened longest ago.
"""

import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray
from platformdirs import user_cache_path

from saemill.common import durable
from saemill.common.errors import ConfigError, DiskError, MissingError
from saemill.common.log import say
from saemill.common.outlook import shown

HASH_BYTES = 8
DIGITS = 20
"""Of the count of bytes, which is written in place."""


def _open_locked(path: Path, how: int, flags: int = os.O_RDONLY) -> int:
    """Open a file or folder and lock it. Returns: its descriptor.

    Raises:
        BlockingIOError: `how` waits for nobody, and another holds it.
        ConfigError: the file system has no locks.
    """
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError as error:
        os.close(descriptor)
        raise ConfigError(
            f"blocks of a store cannot be kept in {path.parent}, whose file system has no locks "
            f"({error.strerror}); give --local-cache 0, or a cache folder elsewhere by XDG_CACHE_HOME"
        ) from error
    return descriptor


class LocalCache:
    """The blocks of one store that are kept, beside those of others; any number of processes share them.

    Args:
        address: of the store.
        objects: names of the folders of its objects as they are now; those of others are removed.
        max_bytes: most that is kept of all stores; None for half of the disk's free bytes, what is kept
            already counted among them.

    Raises:
        ConfigError: the cache's file system has no locks.
        DiskError: it may not be written to.
    """

    def __init__(self, address: str, objects: Collection[str], max_bytes: int | None) -> None:
        self.root = user_cache_path("saemill") / "blocks"
        self.folder = self.root / durable.hash_bytes(address.encode())
        self._reading = -1
        with durable.writing(self.folder), self._alone() as count:
            self.folder.mkdir(exist_ok=True)
            self._reading = _open_locked(self.folder, fcntl.LOCK_SH)
            os.utime(self.folder)
            for gone in {folder.name for folder in self.folder.iterdir()} - {*objects}:
                shutil.rmtree(self.folder / gone, ignore_errors=True)
            n_bytes = self._recount(count)
        free = shutil.disk_usage(self.root).free
        self.max_bytes = (free + n_bytes) // 2 if max_bytes is None else max_bytes
        self._is_full = self._is_left = False

    def __del__(self) -> None:
        if self._reading >= 0:
            os.close(self._reading)

    def read(self, name: str, start: int, stop: int) -> NDArray[np.uint8] | None:
        """Read a range of an object, in memory of its own; None unless it is kept and whole.

        Args:
            name: of the object's folder.
            start: of the range, in bytes.
            stop: of the range.
        """
        file = self._file(name, start, stop)
        try:
            with durable.reading(file):
                kept = np.fromfile(file, np.uint8)
        except MissingError:
            return None
        except DiskError as error:
            if not self._is_left:
                say(f"{error}; blocks of the store are read from where it lies from here on")
            self._is_left = True
            return None
        content, written = kept[:-HASH_BYTES], kept[-HASH_BYTES:].tobytes()
        if len(content) == stop - start and xxhash.xxh3_64_digest(content.data) == written:
            return content
        file.unlink(missing_ok=True)
        return None

    def keep(self, name: str, start: int, content: NDArray[np.uint8]) -> None:
        """Keep a range of an object that was read, if there is room; see `read`."""
        file, n_bytes = self._file(name, start, start + len(content)), len(content) + HASH_BYTES
        if self._is_full or self._is_left:
            return
        with durable.writing(file, n_bytes), self._alone() as count:
            if self._is_full or file.exists():  # by another thread, while this one waited
                return
            if self._has_room(count, n_bytes) and self._write(file, content):
                _put(count, _used(count) + n_bytes)

    def forget(self, name: str) -> None:
        """Remove what is kept of an object: it arrived otherwise than it was written."""
        with self._alone() as count:
            shutil.rmtree(self.folder / name, ignore_errors=True)
            self._recount(count)

    @staticmethod
    def name_of(key: str, tag: str) -> str:
        """Name the folder of an object."""
        return durable.hash_bytes(f"{tag} {key}".encode())

    def _file(self, name: str, start: int, stop: int) -> Path:
        return self.folder / name / f"{start}-{stop}"

    @contextmanager
    def _alone(self) -> Iterator[int]:
        """Keep other threads and processes from changing what is kept while the block runs.

        Yields: the descriptor of the count.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        count = _open_locked(self.root / "used", fcntl.LOCK_EX, os.O_RDWR | os.O_CREAT)
        try:
            yield count
        finally:
            os.close(count)

    def _recount(self, count: int) -> int:
        """Count what is kept of all stores, in bytes, and remove what a kill has left half written."""
        for partial in self.root.glob("*/*/*.partial"):
            partial.unlink()
        n_bytes = sum(durable.folder_bytes(folder) for folder in self._stores())
        _put(count, n_bytes)
        return n_bytes

    def _stores(self) -> list[Path]:
        """List the folders of all stores, the one first that was opened longest ago."""
        return sorted((f for f in self.root.iterdir() if f.is_dir()), key=lambda f: f.stat().st_mtime)

    def _has_room(self, count: int, n_bytes: int) -> bool:
        """Tell whether so many bytes more may be kept; stores that no process reads make room for them."""
        if _used(count) + n_bytes <= self.max_bytes:
            return True
        for folder in self._stores():
            with suppress(BlockingIOError):
                unread = _open_locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
                os.close(unread)
            if self._recount(count) + n_bytes <= self.max_bytes:
                return True
        self._is_full = True
        say(
            f"the local cache {self.root} is full, at {shown(_used(count))}: other blocks are read over the "
            "network in each epoch; --local-cache gives it more room"
        )
        return False

    def _write(self, file: Path, content: NDArray[np.uint8]) -> bool:
        """Write a range, whole or not at all as its readers see it. Return False where the disk is full."""
        partial = file.with_name(f"{file.name}.partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)  # all of it may have been cleared away meanwhile
            with partial.open("wb") as written:
                written.write(content.data)
                written.write(xxhash.xxh3_64_digest(content.data))
            partial.replace(file)
        except OSError as error:
            partial.unlink(missing_ok=True)
            if error.errno not in durable.FULL_ERRNOS:
                raise
            self._is_full = True
            say(f"the disk of the local cache {self.root} is full: no more is kept there")
        return not self._is_full


def _used(count: int) -> int:
    """Read the bytes that are kept, by the descriptor of their count."""
    return int(os.pread(count, DIGITS, 0) or b"0")


def _put(count: int, n_bytes: int) -> None:
    """Write how many bytes are kept."""
    os.pwrite(count, f"{n_bytes:0{DIGITS}}".encode(), 0)

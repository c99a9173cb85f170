"""Objects of an object store (S3, Google Cloud, Azure), read range by range and written whole, with patience.

What fails for a moment, or falls short, is tried again after a while that doubles each time. Wrong bytes that
are read are found by their hashes, as on a disk; what is written is compared with what arrived.
"""

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from saemill.common.errors import ConfigError, DiskError, MissingError, StoreError
from saemill.common.stores.local_cache import LocalCache

T = TypeVar("T")
N_ATTEMPTS = 6
FIRST_WAIT_SECONDS = 0.25
READ_SECONDS, WRITE_SECONDS = 60, 600
"""Time that one request may take: of 16 MiB that are read, and of a whole shard that is written."""
SMALL_BYTES = 1 << 16
"""Most bytes of an object that is written in the time of a read: claims must not wait for longer."""
MOST_BYTES = 5_000_000_000
"""Of an object that is written at once, in S3."""


class Listed(NamedTuple):
    """An object as it is listed."""

    n_bytes: int
    tag: str | None
    """What changes with its content, where the provider tells."""
    version: str | None
    """What else changes with each write of it, where the provider tells."""
    seconds: float
    """When it was written, by the provider's clock, in seconds since 1970; in a list it may be told by the
    millisecond, and otherwise by the second."""

    @classmethod
    def of(cls, found: Any) -> "Listed":
        """Take what obstore tells of it."""
        return cls(found["size"], found["e_tag"], found["version"], found["last_modified"].timestamp())

    @property
    def as_mode(self) -> dict[str, str]:
        """What tells a conditional write that this is to be replaced and no other."""
        marks = {"e_tag": self.tag, "version": self.version}
        return {name: mark for name, mark in marks.items() if mark is not None}


class ObjectStore:
    """The objects below an address.

    Args:
        address: such as `s3://bucket/folder`. Credentials and endpoint are taken from the environment, under
            the names that the provider's own tools have (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, …).

    Raises:
        ConfigError: it is no address, or obstore is not installed.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        try:
            from obstore.store import from_url
        except ImportError as error:
            raise ConfigError(f"{address} needs obstore: pip install 'saemill[remote]'") from error
        endpoint = next((os.environ[name] for name in ENDPOINTS if name in os.environ), "")
        options: Any = {"allow_http": endpoint.startswith("http://")}
        try:
            self._store, self._to_write = (
                from_url(address, client_options=options | {"timeout": f"{n}s"}, retry_config=NO_RETRIES)
                for n in (READ_SECONDS, WRITE_SECONDS)
            )
        except Exception as error:  # of types that obstore has for each provider
            raise ConfigError(f"{address} cannot be opened: {_first_line(error)}") from error

    def list(self, folder: str | None = None) -> dict[str, Listed]:
        """List all objects, or those in a folder, by key.

        Raises:
            ConfigError, DiskError: as of `read`.
        """
        import obstore

        def listed() -> dict[str, Listed]:
            pages = obstore.list(self._store, folder)
            return {str(o["path"]): Listed.of(o) for page in pages for o in page}

        return self._patiently(listed, "")

    def read(self, key: str, tag: str | None, start: int, stop: int) -> bytes:
        """Read consecutive bytes of an object whose tag is still that.

        Raises:
            MissingError: there is no such object.
            StoreError: its content is another by now.
            ConfigError: it may not be read.
            DiskError: it cannot be read, also after some attempts.
        """
        import obstore

        def ranged() -> bytes:
            if start == stop:
                return b""
            wanted: Any = {"range": (start, stop)} | ({"if_match": tag} if tag else {})
            content = bytes(obstore.get(self._store, key, options=wanted).bytes())
            if len(content) != stop - start:
                raise OSError(f"{len(content):,} bytes came, not {stop - start:,}")
            return content

        return self._patiently(ranged, key)

    def content(self, key: str) -> bytes | None:
        """Read an object as it is now, whole; None where there is none.

        Raises:
            ConfigError, DiskError: as of `read`.
        """
        import obstore

        with suppress(MissingError):
            return self._patiently(lambda: bytes(obstore.get(self._store, key).bytes()), key)
        return None

    def look(self, key: str) -> Listed | None:
        """Ask for an object as it is now; None where there is none.

        Raises:
            ConfigError, DiskError: as of `read`.
        """
        import obstore

        try:
            return Listed.of(self._patiently(lambda: obstore.head(self._store, key), key))
        except MissingError:
            return None

    def create(self, key: str, content: bytes) -> str | None:
        """Write an object where there is none, all of it or nothing. One that is there with the same content
        counts as written: by an attempt of which the answer was lost, or by another process.

        Returns: its tag.

        Raises:
            FileExistsError: there is one of other content.
            ConfigError, DiskError: as of `read`.
        """
        from obstore import exceptions

        mode: Any = "create"

        def attempt() -> str | None:
            nonlocal mode
            try:
                put = self._put(key, content, mode)
            except (FileExistsError, exceptions.AlreadyExistsError, exceptions.PreconditionError):
                if (found := self.look(key)) is None:
                    raise OSError("another process is writing it") from None
                if not self._holds(key, found.tag, content):
                    raise FileExistsError(f"{self.address}/{key}") from None
                return found.tag
            if not self._holds(key, put.get("e_tag"), content):
                mode = (
                    put  # over what this attempt has left there: S3 and Azure by its tag, GCS by its version
                )
                raise OSError(ARRIVED_OTHERWISE)
            return put.get("e_tag")

        return self._patiently(attempt, key, "written")

    def write(self, key: str, content: bytes) -> str | None:
        """Write an object, in place of another too. Returns: its tag.

        Raises:
            ConfigError, DiskError: as of `read`.
        """

        def attempt() -> str | None:
            tag = self._put(key, content, "overwrite").get("e_tag")
            if not self._holds(key, tag, content):
                raise OSError(ARRIVED_OTHERWISE)
            return tag

        return self._patiently(attempt, key, "written")

    def replace(self, key: str, content: bytes, before: Listed) -> Listed | None:
        """Write an object in place of one, unless that has changed or is gone: only one of those who try at
        once can.

        Args:
            key: its name.
            content: unlike any other that was ever written there.
            before: what it was.

        Returns: what it is now; None if another process has changed or removed it.

        Raises:
            ConfigError, DiskError: as of `read`.
        """
        from obstore import exceptions

        mode: Any = before.as_mode
        changed = (FileNotFoundError, exceptions.NotFoundError, exceptions.PreconditionError)

        def attempt() -> Listed | None:
            nonlocal mode
            put: dict[str, str] = {}
            with suppress(*changed):  # or an attempt succeeded of which the answer was lost
                put = self._put(key, content, mode)
            found = self.look(key)
            if found is None or self._holds(key, found.tag, content):
                return found
            if put and put.get("e_tag") == found.tag:
                mode = put
                raise OSError(ARRIVED_OTHERWISE)
            return None

        return self._patiently(attempt, key, "written")

    def delete(self, key: str) -> None:
        """Remove an object, if there is one.

        Raises:
            ConfigError, DiskError: as of `read`.
        """
        import obstore

        def attempt() -> None:
            with suppress(FileNotFoundError):
                obstore.delete(self._store, key)

        self._patiently(attempt, key, "removed")

    def _put(self, key: str, content: bytes, mode: Any) -> dict[str, str]:
        """Write an object. Returns: its `e_tag` and `version`, as far as there are any; as a mode they say
        what is to be replaced."""
        import obstore

        store = self._store if len(content) <= SMALL_BYTES else self._to_write
        put = obstore.put(store, key, content, mode=mode, use_multipart=False)
        return {name: value for name, value in put.items() if isinstance(value, str)}

    def _holds(self, key: str, tag: str | None, content: bytes) -> bool:
        """Tell whether an object has some content: by its tag where that is the content's MD5, as it is in S3
        unless the bucket is encrypted by a key of its own; else it is read."""
        import obstore

        if tag is not None and is_tag_of(content, tag):
            return True
        return bytes(obstore.get(self._store, key).bytes()) == content

    def _patiently(self, action: Callable[[], T], key: str, done: str = "read") -> T:
        """Do something, again where it fails for a moment; `done` says in messages what."""
        from obstore import exceptions

        what = f"{self.address}/{key}".rstrip("/")
        refused = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
        for attempt in range(N_ATTEMPTS):
            try:
                return action()
            except FileExistsError:
                raise
            except (FileNotFoundError, exceptions.NotFoundError) as error:
                raise MissingError(f"{what}: there is no such object or bucket") from error
            except exceptions.PreconditionError as error:
                raise StoreError(
                    f"{what} has changed since it was listed; run the same command again"
                ) from error
            except refused as error:
                raise ConfigError(
                    f"{what} may not be {done}: {_first_line(error)}; give credentials that may, in the "
                    "environment"
                ) from error
            except Exception as error:  # each kind of failure of a network has a type of its own
                if NO_BUCKET in str(error):
                    raise MissingError(f"{what}: there is no such bucket; make it first") from error
                if attempt == N_ATTEMPTS - 1:
                    raise DiskError(
                        f"{what} cannot be {done} after {N_ATTEMPTS} attempts: {_first_line(error)}; run the "
                        "same command again when it can be reached"
                    ) from error
                time.sleep(FIRST_WAIT_SECONDS * 2**attempt)
        raise AssertionError


class ObjectContent:
    """The bytes of an object, of which slices are read when they are asked for, by several threads or one.

    Args:
        store: where it is.
        key: its name.
        n_bytes: its size.
        tag: as it was listed.
        cache: where what was read is kept. An object without a tag, by which a change would be seen, is not.
    """

    def __init__(
        self, store: ObjectStore, key: str, n_bytes: int, tag: str | None, cache: LocalCache | None = None
    ) -> None:
        self.store, self.key, self.n_bytes, self.tag = store, key, n_bytes, tag
        self.cache = cache

    def __len__(self) -> int:
        return self.n_bytes

    def __getitem__(self, span: slice) -> NDArray[np.uint8]:
        """Read consecutive bytes, in memory of their own; fewer where the object ends before."""
        start, stop, _ = span.indices(self.n_bytes)
        stop = max(start, stop)
        if self.cache is None or self.tag is None:
            return self._read(start, stop)
        name = LocalCache.name_of(self.key, self.tag)
        kept = self.cache.read(name, start, stop)
        if kept is None:
            kept = self._read(start, stop)
            self.cache.keep(name, start, kept)
        return kept

    def _read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Read consecutive bytes where the object is."""
        return np.frombuffer(bytearray(self.store.read(self.key, self.tag, start, stop)), np.uint8)


ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
NO_RETRIES: Any = {"max_retries": 0}
"""obstore's own attempts, which do not cover a body that falls short."""
NO_BUCKET = "NoSuchBucket"
"""Code of S3's answer, which listing does not tell from other failures."""
ARRIVED_OTHERWISE = "other bytes arrived than were sent"


def is_tag_of(content: bytes, tag: str) -> bool:
    """Tell whether a tag is the MD5 of some content, which S3 makes it of most objects."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest() == tag.strip('"')


def _first_line(error: Exception) -> str:
    """Return what an error says first; below are the request and its answer."""
    return str(error).strip().split("\n")[0][:300]

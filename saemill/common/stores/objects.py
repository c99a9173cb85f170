"""Objects of an object store (S3, Google Cloud, Azure), read range by range, with patience.

A read that fails for a moment, or falls short, is tried again after a while that doubles each time. Wrong
bytes are found by the hashes of what is read, as on a disk.
"""

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from saemill.common.errors import ConfigError, DiskError, MissingError, StoreError
from saemill.common.stores.local_cache import LocalCache

T = TypeVar("T")
N_ATTEMPTS = 6
FIRST_WAIT_SECONDS = 0.25


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
        options: Any = {"timeout": "60s", "allow_http": endpoint.startswith("http://")}
        try:
            self._store: Any = from_url(address, client_options=options, retry_config=NO_RETRIES)
        except Exception as error:  # of types that obstore has for each provider
            raise ConfigError(f"{address} cannot be opened: {_first_line(error)}") from error

    def list(self) -> dict[str, tuple[int, str | None]]:
        """List all objects: their size in bytes and the tag that changes with their content, by key.

        Raises:
            ConfigError, DiskError: as of `read`.
        """
        import obstore

        def listed() -> dict[str, tuple[int, str | None]]:
            pages = obstore.list(self._store)
            return {str(o["path"]): (o["size"], o["e_tag"]) for page in pages for o in page}

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

    def _patiently(self, action: Callable[[], T], key: str) -> T:
        """Do something, again where it fails for a moment."""
        from obstore import exceptions

        what = f"{self.address}/{key}".rstrip("/")
        refused = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
        for attempt in range(N_ATTEMPTS):
            try:
                return action()
            except (FileNotFoundError, exceptions.NotFoundError) as error:
                raise MissingError(f"{what}: there is no such object or bucket") from error
            except exceptions.PreconditionError as error:
                raise StoreError(
                    f"{what} has changed since it was listed; run the same command again"
                ) from error
            except refused as error:
                raise ConfigError(
                    f"{what} may not be read: {_first_line(error)}; give credentials that may, in the "
                    "environment"
                ) from error
            except Exception as error:  # each kind of failure of a network has a type of its own
                if attempt == N_ATTEMPTS - 1:
                    raise DiskError(
                        f"{what} cannot be read after {N_ATTEMPTS} attempts: {_first_line(error)}; run the "
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


def _first_line(error: Exception) -> str:
    """Return what an error says first; below are the request and its answer."""
    return str(error).strip().split("\n")[0][:300]

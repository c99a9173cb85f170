"""Questions and answers on disk, a line of JSON each, so that nothing is asked twice.

A question is known by the hash of all that is sent, so an answer serves wherever the same is asked again:
after a stop, for more latents, at another address of the same model. Each line has a hash of itself. A line
that a crash cut off counts as not written.
"""

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from saemill.common import durable
from saemill.common.errors import StoreError
from saemill.common.records import CHECKSUM, sealed


class Answers:
    """The answers in a file, and those that are added to it; threads may share it.

    Args:
        path: the file, which need not be there.

    Raises:
        StoreError: a line of it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        self._known: dict[str, dict[str, Any]] = {}
        content = path.read_bytes() if path.exists() else b""
        self._n_whole_bytes = content.rfind(b"\n") + 1
        for number, line in enumerate(content[: self._n_whole_bytes].splitlines()):
            entry = self._entry(line, number + 1)
            self._known[durable.hash_json(entry["request"])] = entry["answer"]

    def _entry(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            values = json.loads(line)
            fields = {name: value for name, value in values.items() if name != CHECKSUM}
            whole = values[CHECKSUM] == durable.hash_json(fields) and {"request", "answer"} <= fields.keys()
        except (ValueError, AttributeError, KeyError):
            whole = False
        if not whole:
            raise StoreError(
                f"{self.path} is damaged in line {number}: its content differs from its checksum. Remove the "
                "line, whose question is then asked again"
            )
        return fields

    def of(self, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """Find the answer to a question; None if it was not asked."""
        return self._known.get(durable.hash_json(dict(request)))

    def add(self, request: Mapping[str, Any], answer: dict[str, Any]) -> None:
        """Write an answer, and flush it to the disk."""
        line = json.dumps(sealed({"request": dict(request), "answer": answer}))
        with self._lock, durable.writing(self.path):
            file = self._opened()
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self._known[durable.hash_json(dict(request))] = answer

    def _opened(self) -> IO[bytes]:
        """Open the file to add to it, without a line that was cut off."""
        if self._file is None:
            self._file = self.path.open("ab")
            self._file.truncate(self._n_whole_bytes)
        return self._file

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

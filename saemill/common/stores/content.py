"""The content of a shard's file, read range by range.

It is not mapped: as far as they were read, mapped files count as their process's memory, which schedulers
limit; and a mapped file that is cut off kills its reader, where a read falls short.
"""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from saemill.common import durable


class FileContent:
    """The bytes of an open file, of which slices are read when they are asked for, by several threads or one.

    Args:
        path: of the file.
        repair: the sentence on what to do where it is missing.

    Raises:
        MissingError: there is no such file.
        DiskError: it cannot be read.
    """

    def __init__(self, path: Path, repair: str = "") -> None:
        self.path, self.repair = path, repair
        self._file = -1
        with durable.reading(path, repair):
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.n_bytes = os.fstat(self._file).st_size

    def __len__(self) -> int:
        return self.n_bytes

    def __getitem__(self, span: slice) -> NDArray[np.uint8]:
        """Read consecutive bytes, in memory of their own; fewer where the file ends before."""
        start, stop, _ = span.indices(self.n_bytes)
        content = np.empty(max(0, stop - start), np.uint8)
        n_read = 0
        with durable.reading(self.path, self.repair):
            while n_read < len(content):
                n_more = os.preadv(self._file, [content[n_read:].data], start + n_read)
                if n_more == 0:  # it was cut off since it was opened
                    break
                n_read += n_more
        return content[:n_read]

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)

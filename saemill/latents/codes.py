"""Codes on disk while they are exported: a file for the latents of each part, so that one part is in memory.

They come by token and are needed by latent. Each chunk's codes are appended to the files of their parts, and
a part is read whole when it is its turn.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from saemill.common import durable
from saemill.latents.rows import Entries

ENTRY = np.dtype([("place", "<i8"), ("latent", "<i4"), ("act", "<f4")])


class Codes:
    """Codes of some latents, by parts.

    Args:
        folder: new; where the files go.
        latents: the latents that are kept, ascending.
        firsts: the first latent of each part, ascending; a part goes up to the next one.
    """

    def __init__(self, folder: Path, latents: NDArray[np.int64], firsts: NDArray[np.int64]) -> None:
        self.folder, self.latents, self.firsts = folder, latents, firsts
        self.n_entries = np.zeros(len(firsts), np.int64)
        folder.mkdir(parents=True)

    def add(self, entries: Entries) -> None:
        """Append codes of tokens behind those that were added before.

        Raises:
            DiskError: the disk is full.
        """
        wanted = np.isin(entries.latent_N, self.latents)
        part_N = np.searchsorted(self.firsts, entries.latent_N[wanted], side="right") - 1
        order = np.argsort(part_N, kind="stable")
        content = np.empty(len(part_N), ENTRY)
        content["place"], content["latent"] = entries.place_N[wanted], entries.latent_N[wanted]
        content["act"] = entries.act_N[wanted]
        content, n_of = content[order], np.bincount(part_N, minlength=len(self.firsts))
        ends = np.cumsum(n_of)
        for part in np.flatnonzero(n_of):
            path = self._path(int(part))
            with durable.writing(path), path.open("ab") as file:
                file.write(content[ends[part] - n_of[part] : ends[part]].tobytes())
        self.n_entries += n_of

    def take(self, part: int) -> Entries:
        """Read the codes of a part, by ascending place, and remove them from the disk."""
        path, n = self._path(part), self.n_entries[part]
        content = np.fromfile(path, ENTRY) if n else np.empty(0, ENTRY)
        assert len(content) == n, f"{path} holds {len(content)} codes of the {n} that were written"
        path.unlink(missing_ok=True)
        return Entries(content["place"], content["latent"].astype(np.int64), content["act"])

    def _path(self, part: int) -> Path:
        return self.folder / f"{part}.bin"

"""A site's stored rows by address, each shard read once as long as ranges follow one another."""

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saemill.common.stores.site_array import SiteArray


class Addressed:
    """The stored rows of a site, in the order of their addresses.

    Args:
        site: where they are read; every block is checked.
    """

    def __init__(self, site: SiteArray) -> None:
        self.site = site
        self._shard = lru_cache(1)(self._read_shard)

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Return the stored rows of addresses start..stop. [stop - start, C]."""
        size, pieces = self.site.store.shard_tokens, []
        for shard in range(start // size, -(-stop // size)):
            first = shard * size
            pieces.append(self._shard(shard)[max(start - first, 0) : stop - first])
        return np.concatenate(pieces)

    def _read_shard(self, shard: int) -> NDArray[Any]:
        start = shard * self.site.store.shard_tokens
        return self.site.read_stored(start, start + self.site.store.shard_length(shard))

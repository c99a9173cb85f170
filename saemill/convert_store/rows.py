"""The stored rows of a site: by address, each shard read once as long as ranges follow one another; and in
another form."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saemill.cache.writer import ROWS_AT_ONCE
from saemill.common.stores.forms.form import Form, empty
from saemill.common.stores.shards import as_tensor
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


def stored_again(site: SiteArray, rows_TC: NDArray[Any], form: Form) -> Tensor:
    """Turn stored rows of the source into those of the new store: the same, where the type is."""
    stored_TC = as_tensor(rows_TC, site.stored)
    if form.stored == site.stored:
        return stored_TC
    again_TC = empty(form, len(stored_TC))
    for piece, into in zip(*(torch.split(x, ROWS_AT_ONCE) for x in (stored_TC, again_TC)), strict=True):
        form.encode(site.decode(piece), into)
    return again_TC

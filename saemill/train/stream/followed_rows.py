"""Which rows a follower trains on, of a store that is still being filled.

What the mask leaves is known from the text, so that windows and steps are planned before a shard is there.
Which of these rows are too long is told by their norms, which come with their shard. Such a row gives its
place to another one of its window (`following.Groups`), and the stream stays as long as it was planned.
"Too long" and the units of training are those of the store's first shards, written down in the run.
"""

from collections.abc import Mapping
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from saemill.common.stores.followed import FollowedStore
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.site_array import SiteArray
from saemill.common.stores.statistics import Statistics
from saemill.train.stream.kept import Kept
from saemill.train.stream.rows import TrainingRows, long_in
from saemill.train.stream.units import Units


class FollowedRows:
    """The rows of a store that a follower trains on.

    Args:
        store: where they are, or will be.
        sites: all sites of the run, by name; those that are joined one by one.
        mask: positions left out; held-out rows always are.
        norm_over_median: norms of more than so many medians of a site are too long; None where none is. The
            median is that of the first shards.
        units: of the run that is gone on with; None for those of the first shards, which must be there when
            they are asked for.

    Raises:
        StoreError: nothing is left.
    """

    def __init__(
        self,
        store: FollowedStore,
        sites: Mapping[str, SiteArray],
        mask: MaskConfig,
        norm_over_median: float | None,
        units: Units | None,
    ) -> None:
        self.store, self.sites, self.norm_over_median = store, sites, norm_over_median
        self.kept = Kept(store, mask, store.n_shards)
        self._known = units
        self.long = cache(self._long)

    @cached_property
    def units(self) -> Units:
        """Units of the run: those that are written down, or those of the first shards."""
        if self._known is not None:
            return self._known
        n_first = self.store.n_first
        first = TrainingRows(self.store, self.sites, self.kept.mask, self.norm_over_median, n_first)
        return Units.of({site: first.statistics(site) for site in self.sites}, first.limits, n_first)

    def statistics(self, site: str) -> Statistics:
        """Return the moments of the first shards' rows that are trained on."""
        return self.units.of_site(site)

    def _long(self, shard: int) -> NDArray[np.int64]:
        """List the places of a shard's rows that are left out since they are too long at some site."""
        limits = self.units.limits
        found = long_in(self.kept.of_shard(shard), shard, self.sites, limits).values()
        return np.flatnonzero(np.logical_or.reduce(list(found))) if limits else np.zeros(0, np.int64)

    def describe(self) -> list[str]:
        """Say what the first shards decide, and of which roles tokens are where not all are trained on."""
        n_first = self.store.n_first
        lines = [
            f"units of training are those of the first {n_first:,} of {self.store.n_shards:,} shards",
            self.kept.describe_roles(self.kept.n_tokens),
        ]
        return [line for line in lines if line]

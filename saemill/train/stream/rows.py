"""Which rows are trained on: not held out, not masked, and at no site of the run far longer than its median.

A row that is too long at one of the sites is left out at all of them. So a batch holds the same tokens at
every site, and one order of the stream serves them all; where a model puts such a row at one layer, it mostly
does so at the next ones too. All of it is known before the first batch, from the norms that the store keeps:
the epoch's length and the stream are planned as for any other mask, whichever process reads which sites, and
no step pays for it.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from saemill.common.errors import ConfigError, StoreError
from saemill.common.log import counted, say
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.norms import SMALLEST_NORM, NormSketch, norms_from
from saemill.common.stores.site_array import SiteArray
from saemill.common.stores.statistics import Moments, Statistics

LEAST_SHARE = 1e-6
"""Share of a site's variance that must be left to be told by subtraction: ten of float64's digits."""


class TrainingRows:
    """The rows of a store that a run trains on.

    Args:
        store: where they are.
        sites: all sites of the run, by name; those that are joined one by one.
        mask: positions left out; held-out rows always are.
        norm_over_median: norms of more than so many medians of a site are too long; None where none is. The
            median is that of the store's training positions, by its own mask.

    Raises:
        StoreError: nothing is left, or a record of norms is damaged.
        ConfigError: the median norm of a site is 0.
    """

    def __init__(
        self,
        store: ActivationStore,
        sites: Mapping[str, SiteArray],
        mask: MaskConfig,
        norm_over_median: float | None,
    ) -> None:
        self.store, self.sites, self.mask, self.norm_over_median = store, sites, mask, norm_over_median
        kept = (store.keep(shard, mask, held_out=False) for shard in range(store.n_shards))
        self._bits = [np.packbits(keep) for keep in kept]
        self.long: dict[int, NDArray[np.int64]] = {}
        """Places of the rows left out since they are too long at some site, by shard."""
        self.n_long_at = dict.fromkeys(sites, 0)
        """Number of rows that are too long at each site."""
        if norm_over_median is not None:
            self._leave_out_long(norm_over_median)
        self.n_long = sum(map(len, self.long.values()))
        """Number of rows left out since they are too long at some site."""
        self.n_tokens = sum(int(np.bitwise_count(bits).sum()) for bits in self._bits)
        """Number of rows that are trained on: the tokens of an epoch."""
        if self.n_tokens == 0:
            what = "passage is" if store.text.unit == "passage" else "position is masked or"
            raise StoreError(f"{store.path}: every {what} held out; nothing to train on")
        self.statistics = cache(self._statistics)

    def keep(self, shard: int) -> NDArray[np.bool_]:
        """Choose the places of a shard that are trained on. bool [tokens in the shard], in stored order."""
        return self.keep_places(shard, 0, self.store.shard_length(shard))

    def keep_places(self, shard: int, start: int, stop: int) -> NDArray[np.bool_]:
        """Choose as `keep` does, from place `start`, a multiple of 8, to `stop`."""
        bits = self._bits[shard][start // 8 : (stop + 7) // 8]
        return np.unpackbits(bits, count=stop - start).astype(bool)

    def describe_roles(self) -> str:
        """Say how many of the tokens are those of the roles that are trained on; empty where all are."""
        if not self.mask.roles:
            return ""
        everyones = replace(self.mask, roles=())
        store = self.store
        n = sum(int(store.keep(shard, everyones, held_out=False).sum()) for shard in range(store.n_shards))
        n_theirs = self.n_tokens + self.n_long
        return (
            f"trained on {counted(n_theirs, 'token')} of {', '.join(self.mask.roles)} alone, "
            f"{100 * n_theirs / n:.3g}% of {n:,}"
        )

    def describe_long(self) -> str:
        """Say how many rows are left out since they are too long, and where; empty where none is."""
        if not self.n_long:
            return ""
        share = self.n_long / (self.n_long + self.n_tokens)
        sites = ", ".join(f"{n:,} at {name}" for name, n in self.n_long_at.items() if n)
        return (
            f"{counted(self.n_long, self.store.text.unit)} ({100 * share:.2g}%) of more than "
            f"{self.norm_over_median:g} times the median norm left out: {sites}"
        )

    def _leave_out_long(self, norm_over_median: float) -> None:
        """Take the rows whose norm is too long at some site out of those that are kept."""
        limits: dict[str, float] = {}
        for name, array in self.sites.items():
            sketch = array.sketch or self._counted_now(array)
            limit = max(norm_over_median * sketch.median, SMALLEST_NORM)
            n_beyond = sketch.n_beyond(limit)
            if sketch.median < SMALLEST_NORM and n_beyond:
                raise ConfigError(
                    f"half of the {self.store.text.unit}s at {name} are 0 in all dimensions, and so is the "
                    "median norm, which then does not tell what is too long; train on all of them with --set "
                    "train.mask.norm_over_median=none"
                )
            if n_beyond or self.mask != array.store.mask:
                limits[name] = limit
        for shard in range(self.store.n_shards if limits else 0):
            self._leave_out_of(shard, limits)

    def _leave_out_of(self, shard: int, limits: Mapping[str, float]) -> None:
        """Take the rows of a shard that are too long out."""
        keep = self.keep(shard)
        long = np.zeros_like(keep)
        for name, limit in limits.items():
            long_here = keep & (norms_from(self.sites[name].norms(shard)) > limit)
            self.n_long_at[name] += int(long_here.sum())
            long |= long_here
        if long.any():
            self.long[shard] = np.flatnonzero(long)
            self._bits[shard] = np.packbits(keep & ~long)

    def _counted_now(self, array: SiteArray) -> NormSketch:
        """Count the norms of a site whose records have none: in one pass over it."""
        say(
            f"{array.name}: its records hold no norms, as those of earlier versions; all its shards are read "
            "for them now, and at each training until the command that made the store is run again"
        )
        sketch = NormSketch()
        for shard in range(self.store.n_shards):
            sketch.add(array.norms(shard)[self.store.keep(shard, array.store.mask, held_out=False)])
        return sketch

    def _statistics(self, site: str) -> Statistics:
        """Compute the moments of the rows that are trained on: those that the store keeps, less those of the
        rows left out for their norm, of which only the blocks that hold them are read."""
        array = self.sites[site]
        if self.mask == array.store.mask:
            if not self.n_long:
                return array.statistics
            rest = array.statistics.without(self._long_rows(array).statistics())
            if rest.total_variance > LEAST_SHARE * array.statistics.total_variance:
                return rest
        say(f"{site}: all its shards are read once for the mean and variance of the rows that are trained on")
        return array.statistics_over(self.keep)

    def _long_rows(self, array: SiteArray) -> Moments:
        """Compute the moments of the rows left out for their norm."""
        moments = Moments(array.width)
        for shard, places in self.long.items():
            moments.add(array.at_places(shard, places))
        return moments

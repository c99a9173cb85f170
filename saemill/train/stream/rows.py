"""Which rows are trained on: not held out, not masked, and at no site of the run far longer than its median.

A row that is too long at one of the sites is left out at all of them. So a batch holds the same tokens at
every site, and one order of the stream serves them all; where a model puts such a row at one layer, it mostly
does so at the next ones too. All of it is known before the first batch, from the norms that the store keeps:
the epoch's length and the stream are planned as for any other mask, whichever process reads which sites, and
no step pays for it.
"""

from collections.abc import Mapping
from functools import cache, cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from saemill.common.errors import ConfigError
from saemill.common.log import counted, say
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.forms.packing import BLOCK_TOKENS
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.norms import SMALLEST_NORM, NormSketch, norms_from
from saemill.common.stores.site_array import SiteArray
from saemill.common.stores.statistics import Moments, Statistics
from saemill.train.stream.kept import Kept

LEAST_SHARE = 1e-6
"""Share of a site's variance that must be left to be told by subtraction: ten of float64's digits."""


class Rows(Protocol):
    """The rows that a run trains on, as its stream and its SAEs need them."""

    sites: Mapping[str, SiteArray]
    kept: Kept
    """Rows that are read."""
    norm_over_median: float | None

    def statistics(self, site: str) -> Statistics:
        """Return the moments from which a site's units follow."""

    def describe(self) -> list[str]:
        """Say what is left out beside the mask, as far as it is known."""


def limit_of(site: str, sketch: NormSketch, norm_over_median: float, unit: str) -> float:
    """Compute the norm beyond which a row is too long.

    Args:
        site: its name.
        sketch: of the norms there.
        norm_over_median: how many medians are too many.
        unit: what the store holds.

    Raises:
        ConfigError: the median norm is 0.
    """
    limit = max(norm_over_median * sketch.median, SMALLEST_NORM)
    if sketch.median < SMALLEST_NORM and sketch.n_beyond(limit):
        raise ConfigError(
            f"half of the {unit}s at {site} are 0 in all dimensions, and so is the median norm, which then "
            "does not tell what is too long; train on all of them with --set "
            "train.mask.norm_over_median=none"
        )
    return limit


def long_in(
    keep_T: NDArray[np.bool_], shard: int, sites: Mapping[str, SiteArray], limits: Mapping[str, float]
) -> dict[str, NDArray[np.bool_]]:
    """Find the rows of a shard that are kept and longer than a site's limit. bool [tokens], by site."""
    return {name: keep_T & (norms_from(sites[name].norms(shard)) > limit) for name, limit in limits.items()}


class TrainingRows:
    """The rows of a store's shards that a run trains on.

    Args:
        store: where they are.
        sites: all sites of the run, by name; those that are joined one by one.
        mask: positions left out; held-out rows always are.
        norm_over_median: norms of more than so many medians of a site are too long; None where none is. The
            median is that of the store's training positions, by its own mask.
        n_shards: number of the shards; None for all.

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
        n_shards: int | None = None,
    ) -> None:
        self.store, self.sites, self.norm_over_median = store, sites, norm_over_median
        self.n_shards = store.n_shards if n_shards is None else n_shards
        self.kept = Kept(store, mask, self.n_shards)
        self.long: dict[int, NDArray[np.int64]] = {}
        """Places of the rows left out since they are too long at some site, by shard."""
        self.n_long_at = dict.fromkeys(sites, 0)
        """Number of rows that are too long at each site."""
        self.limits: dict[str, float] = {}
        """Norm beyond which rows are too long, by site; none where that does not matter."""
        if norm_over_median is not None:
            self._leave_out_long(norm_over_median)
        self.n_long = sum(map(len, self.long.values()))
        """Number of rows left out since they are too long at some site."""
        self.n_tokens = self.kept.n_tokens
        """Number of rows that are trained on: the tokens of an epoch."""
        self.statistics = cache(self._statistics)

    @cached_property
    def long_per_block(self) -> NDArray[np.int64]:
        """Numbers of rows that are left out for their norm, by block."""
        counts = np.zeros_like(self.kept.per_block)
        for shard, places in self.long.items():
            np.add.at(counts, shard * self.kept.blocks_per_shard + places // BLOCK_TOKENS, 1)
        return counts

    def describe(self) -> list[str]:
        """Say how many of the tokens are those of the roles that are trained on, where not all are; and how
        many rows are left out since they are too long, where any is."""
        roles = self.kept.describe_roles(self.n_tokens + self.n_long)
        return [line for line in (roles, self._describe_long()) if line]

    def _describe_long(self) -> str:
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
        may_be_long = False
        for name, array in self.sites.items():
            sketch = array.sketch or self._counted_now(array)
            self.limits[name] = limit_of(name, sketch, norm_over_median, self.store.text.unit)
            may_be_long |= bool(sketch.n_beyond(self.limits[name])) or self.kept.mask != array.store.mask
        for shard in range(self.n_shards if may_be_long else 0):
            self._leave_out_of(shard)

    def _leave_out_of(self, shard: int) -> None:
        """Take the rows of a shard that are too long out."""
        places = {}
        for name, long_T in long_in(self.kept.of_shard(shard), shard, self.sites, self.limits).items():
            places[name] = np.flatnonzero(long_T)
            self.n_long_at[name] += len(places[name])
        long = np.unique(np.concatenate(list(places.values())))
        if len(long):
            self.long[shard] = long
            self.kept.take_out(shard, long)

    def _counted_now(self, array: SiteArray) -> NormSketch:
        """Count the norms of a site whose records have none: in one pass over it."""
        say(
            f"{array.name}: its records hold no norms, as those of earlier versions; all its shards are read "
            "for them now, and at each training until the command that made the store is run again"
        )
        sketch = NormSketch()
        for shard in range(self.n_shards):
            sketch.add(array.norms(shard)[self.store.keep(shard, array.store.mask, held_out=False)])
        return sketch

    def _statistics(self, site: str) -> Statistics:
        """Compute the moments of the rows that are trained on: those that the store keeps, less those of the
        rows left out for their norm, of which only the blocks that hold them are read."""
        array = self.sites[site]
        if self.kept.mask == array.store.mask:
            if not self.n_long:
                return array.statistics
            rest = array.statistics.without(self._long_rows(array).statistics())
            if rest.total_variance > LEAST_SHARE * array.statistics.total_variance:
                return rest
        say(f"{site}: all its shards are read once for the mean and variance of the rows that are trained on")
        return array.statistics_over(self.kept.of_shard)

    def _long_rows(self, array: SiteArray) -> Moments:
        """Compute the moments of the rows left out for their norm."""
        moments = Moments(array.width)
        for shard, places in self.long.items():
            moments.add(array.at_places(shard, places))
        return moments

"""A store that may still be being filled: its sites are read shard by shard, as their records commit them.

What a finished site's manifest says of all shards, a follower takes from the records of the first ones: so it
does not depend on how far the store is.
"""

from collections.abc import Iterable
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from saemill.common.errors import StoreError
from saemill.common.records import decode_array
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.norms import NormSketch, norms_of
from saemill.common.stores.site_array import SiteArray
from saemill.common.stores.site_records import REPAIR, Commit, site_path, sites_in
from saemill.common.stores.statistics import Moments, Statistics


def grouped(n_shards: int, shard_tokens: int, group_tokens: int) -> list[range]:
    """Put shards into groups of consecutive ones, as even as they can be: a short last group would count for
    too much at the end of a run.

    Args:
        n_shards: of the store.
        shard_tokens: tokens per shard.
        group_tokens: most tokens per group, in whole shards.
    """
    n_groups = -(-n_shards // -(-group_tokens // shard_tokens))
    edges = [n_shards * group // n_groups for group in range(n_groups + 1)]
    return [range(*edge) for edge in pairwise(edges)]


class FollowedStore(ActivationStore):
    """Read access to what is there of a store.

    Args:
        path: the folder.
        group_tokens: tokens of a group of shards, in whole shards; statistics of the first group stand for
            the store's. None for those of all shards that are committed one after the other.

    Raises:
        StoreError: the folder is no activation store, or its settings or tokens are damaged.
    """

    def __init__(self, path: Path | str, group_tokens: int | None = None) -> None:
        super().__init__(path)
        self._group_tokens = group_tokens
        self._arrays: dict[str, FollowedSite] = {}

    @property
    def sites(self) -> list[str]:
        """Names of the sites, finished or not."""
        return sites_in(self.path)

    def array(self, name: str) -> "FollowedSite":
        """Open a site's array, finished or not.

        Raises:
            StoreError: there is no such site, or its records are damaged.
        """
        if name not in self.sites:
            there = ", ".join(self.sites) or "none"
            raise StoreError(
                f"site {name!r} is not in {self.path}; there are: {there}. `saemill cache` with the site "
                "adds it"
            )
        if name not in self._arrays:
            self._arrays[name] = FollowedSite(self, name)
        return self._arrays[name]

    @property
    def n_first(self) -> int:
        """Number of the first shards, whose statistics stand for the store's."""
        if self._group_tokens is not None:
            return self.groups[0].stop
        there = (all(self.has(site, shard) for site in self.sites) for shard in range(self.n_shards))
        return next((shard for shard, is_there in enumerate(there) if not is_there), self.n_shards)

    @cached_property
    def groups(self) -> list[range]:
        """Shards in groups of at most `group_tokens`."""
        assert self._group_tokens is not None
        return grouped(self.n_shards, self.shard_tokens, self._group_tokens)

    def has(self, site: str, shard: int) -> bool:
        """Tell whether a shard of a site is committed."""
        return (site_path(self.path, site) / "commits" / f"{shard}.json").exists()

    def sites_with(self, shard: int) -> list[str]:
        """List the sites of which a shard's rows can be read: written by now, and not removed."""
        return [site for site in self.sites if self.array(site).array.shard_path(shard).exists()]

    def close_shards(self) -> None:
        """Close the files that are open: one that is removed then leaves the disk."""
        for array in self._arrays.values():
            array.array.content.cache_clear()


class FollowedSite(SiteArray):
    """One site: rows of the shards that are committed, and the statistics of the first ones."""

    def __init__(self, store: FollowedStore, name: str) -> None:
        self.followed = store
        self._describe(store, name)

    def commit(self, shard: int) -> Commit:
        """Read the record of a shard.

        Raises:
            StoreError: it is missing, damaged, or of another calibration than the site's.
        """
        commit = self.store.commit(self.name, shard)
        calibration = self.store.record(self.name).calibration
        if commit.calibration != (calibration.hash if calibration else None):
            raise StoreError(
                f"{site_path(self.store.path, self.name)}: shard {shard} was calibrated otherwise than the "
                f"site's record says. {REPAIR}"
            )
        return commit

    @cached_property
    def statistics(self) -> Statistics:
        """Moments over the training positions of the first shards, by the store's own mask."""
        moments = Moments(self.width)
        for shard in self._shards():
            commit = self.commit(shard)
            mean_D, deviations_D = (decode_array(text, "f8") for text in (commit.mean, commit.deviations))
            moments.merge(commit.n_counted, mean_D, deviations_D, commit.distances)
        return moments.statistics()

    @property
    def sketch(self) -> NormSketch | None:
        """Norms of the training positions of the first shards; None where a record has none."""
        sketch = NormSketch()
        for shard in self._shards():
            lengths = self.commit(shard).lengths
            if lengths is None:
                return None
            sketch.merge(NormSketch(lengths))
        return sketch

    def norms(self, shard: int) -> NDArray[np.uint16]:
        """Read the norms of a shard's rows from its record, or compute them where that has none."""
        norms = self.commit(shard).norms
        if norms is not None:
            return decode_array(norms, "u2")
        return norms_of(self._decoded(self._rows(shard)))

    def _shards(self) -> Iterable[int]:
        return range(self.followed.n_first)

    @cached_property
    def _hashes(self) -> "_Hashes":
        return _Hashes(self)


class _Hashes(dict[int, NDArray[np.uint64]]):
    """Hashes of blocks by shard, each shard's read from its record when it is asked for."""

    def __init__(self, site: FollowedSite) -> None:
        super().__init__()
        self.site = site

    def __missing__(self, shard: int) -> NDArray[np.uint64]:
        commit = self.site.commit(shard)
        self[shard] = decode_array(commit.block_hashes, "u8")
        return self[shard]

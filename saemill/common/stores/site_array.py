"""SiteArray: the rows of one finished site, and its statistics."""

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from saemill.common.errors import StoreError
from saemill.common.records import decode_array
from saemill.common.stores.forms.form import Form, rounded
from saemill.common.stores.forms.packing import BLOCK_TOKENS
from saemill.common.stores.norms import NormSketch, norms_of
from saemill.common.stores.permutation import inverse
from saemill.common.stores.shards import as_tensor
from saemill.common.stores.site_records import REPAIR, SiteRecord, site_path
from saemill.common.stores.site_roles import Role
from saemill.common.stores.statistics import Moments, Statistics

if TYPE_CHECKING:
    from saemill.common.stores.activations import ActivationStore


class SiteArray:
    """One finished site: its rows, checked block by block as they are read, and its statistics.

    Stored rows are as the array holds them, decompressed; `decode` makes activations of them.
    """

    def __init__(self, store: "ActivationStore", name: str) -> None:
        record = self._describe(store, name)
        self.manifest = store.manifest(record)
        self.array.check_sizes([shard.bytes for shard in self.manifest.shards])
        self._computed_norms: dict[int, NDArray[np.uint16]] = {}

    def _describe(self, store: "ActivationStore", name: str) -> SiteRecord:
        """Open the array by what the site's record says of it."""
        self.store, self.name = store, name
        record = store.record(name)
        self.width, form = record.width, record.form
        self.array = store.open_array(name, self.width)
        self.dtype, self.stored, self.columns = form.dtype, form.stored, form.columns
        return record

    @cached_property
    def form(self) -> Form:
        """Form of its activations."""
        return self.store.record(self.name).form

    @property
    def role(self) -> Role | None:
        """What is at the site, as far as it is known."""
        return self.store.record(self.name).role

    @property
    def parts(self) -> "dict[str, SiteArray]":
        """Sites that it is made of: itself."""
        return {self.name: self}

    @cached_property
    def statistics(self) -> Statistics:
        """Moments over the training positions by the store's own mask."""
        return self.manifest.statistics.statistics()

    @property
    def n_bytes(self) -> int:
        """Bytes of all its shards on disk."""
        return sum(shard.bytes for shard in self.manifest.shards)

    @property
    def sketch(self) -> NormSketch | None:
        """Norms of the training positions by the store's own mask; None where no record has them."""
        lengths = self.manifest.statistics.lengths
        return None if lengths is None else NormSketch(lengths)

    def norms(self, shard: int) -> NDArray[np.uint16]:
        """Read the norms of a shard's rows from its record, or compute them where that has none.

        Returns: bits as of `norms_of` [tokens in the shard], in stored order.
        """
        commit = self.store.commit(self.name, shard)
        if commit.xxh3 != self.manifest.shards[shard].xxh3:
            raise StoreError(
                f"{site_path(self.store.path, self.name)}: the record of shard {shard} is of another shard "
                f"than the manifest's. {REPAIR}"
            )
        if commit.norms is not None:
            return decode_array(commit.norms, "u2")
        if shard not in self._computed_norms:
            self._computed_norms[shard] = norms_of(self._decoded(self._rows(shard)))
        return self._computed_norms[shard]

    def statistics_over(self, keep: Callable[[int], NDArray[np.bool_]]) -> Statistics:
        """Compute moments of chosen rows, in one pass over the shards that statistics are of.

        Args:
            keep: chooses places of the shard of a number, in stored order.
        """
        moments = Moments(self.width)
        for shard in self._shards():
            moments.add(self._decoded(self._rows(shard)[keep(shard)]))
        return moments.statistics()

    def _shards(self) -> Iterable[int]:
        """List the shards that statistics are of: all."""
        return range(self.store.n_shards)

    def _rows(self, shard: int) -> NDArray[Any]:
        """Read all stored rows of a shard, block by block, each compared with its hash."""
        return np.concatenate([self.block(shard, block) for block in range(self.array.n_blocks(shard))])

    @cached_property
    def _hashes(self) -> Mapping[int, NDArray[np.uint64]]:
        """Hashes of blocks, by shard."""
        entries = enumerate(self.manifest.shards)
        return {number: decode_array(shard.block_hashes, "u8") for number, shard in entries}

    def block(self, shard: int, block: int) -> NDArray[Any]:
        """Read one block of stored rows, compared with its hash, in memory of its own.

        Raises:
            StoreError: the content is not what was written.
        """
        rows_TC = self.array.block(shard, block)
        if xxhash.xxh3_64_intdigest(rows_TC.data) != self._hashes[shard][block]:
            self.array.forget(shard)
            raise StoreError(
                f"{self.array.shard_name(shard)}: block {block} differs from its hash. "
                f"`saemill verify {self.store.named}` names all bad shards. {REPAIR}"
            )
        return rows_TC

    def decode(self, stored_TC: Tensor) -> Tensor:
        """Make activations of stored rows: [T, D] of `dtype`, on their device; floats share memory."""
        return self.form.decode(stored_TC)

    def _decoded(self, stored_TC: NDArray[Any]) -> Tensor:
        """Make activations of stored rows that were read. [T, D]."""
        return self.decode(as_tensor(stored_TC, self.stored))

    def rounded(self, x_TD: Tensor) -> Tensor:
        """Round activations that were computed again to what the store would read. [T, D], on the CPU."""
        return rounded(self.form, x_TD)

    def read(self, start: int, stop: int) -> Tensor:
        """Read activations of addresses start..stop in address order, [stop - start, D]."""
        return self._decoded(self.read_stored(start, stop))

    def read_stored(self, start: int, stop: int) -> NDArray[Any]:
        """Read the stored rows of addresses start..stop in address order, [stop - start, C]."""
        if not 0 <= start <= stop <= self.store.n_tokens:
            raise IndexError(f"addresses must be within 0..{self.store.n_tokens}, got {start}..{stop}")
        size = self.store.shard_tokens
        pieces = [np.empty((0, self.columns), self.array.dtype)]
        for shard in range(start // size, -(-stop // size)):
            first, last = max(start - shard * size, 0), min(stop - shard * size, size)
            pieces.append(self.stored_at(shard, self._places(shard)[first:last]))
        return np.concatenate(pieces)

    def _places(self, shard: int) -> NDArray[np.int64]:
        """Find the place of each address in a shard. int64 [tokens in the shard]."""
        return inverse(self.store.permutation(shard))

    def gather(self, shard: int, offsets: NDArray[np.int64]) -> Tensor:
        """Read rows of one shard by their addresses' offsets in it; each block that is read is checked.

        Returns: [len(offsets), D].
        """
        return self.at_places(shard, self._places(shard)[offsets])

    def at_places(self, shard: int, places: NDArray[np.int64]) -> Tensor:
        """Read rows of one shard by their places in it; each block that is read is checked.

        Returns: [len(places), D].
        """
        return self._decoded(self.stored_at(shard, places))

    def stored_at(self, shard: int, places: NDArray[np.int64]) -> NDArray[Any]:
        """Read stored rows as `at_places` does. [len(places), C]."""
        order = np.argsort(places)
        edges = np.searchsorted(
            places[order], np.arange(0, self.store.shard_tokens + BLOCK_TOKENS, BLOCK_TOKENS)
        )
        out = np.empty((len(places), self.columns), self.array.dtype)
        for block in np.flatnonzero(np.diff(edges)):
            in_block = order[edges[block] : edges[block + 1]]
            out[in_block] = self.block(shard, int(block))[places[in_block] - block * BLOCK_TOKENS]
        return out

"""The rows that a mask leaves: not held out and not masked, shard by shard; known from the text alone."""

from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from saemill.common.errors import StoreError
from saemill.common.log import counted
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.forms.packing import BLOCK_TOKENS
from saemill.common.stores.mask import MaskConfig


class Kept:
    """The rows of a store's first shards that are neither held out nor masked.

    Args:
        store: where they are.
        mask: positions left out; held-out rows always are.
        n_shards: number of the shards.

    Raises:
        StoreError: nothing is left.
    """

    def __init__(self, store: ActivationStore, mask: MaskConfig, n_shards: int) -> None:
        self.store, self.mask, self.n_shards = store, mask, n_shards
        kept = (store.keep(shard, mask, held_out=False) for shard in range(n_shards))
        self._bits = [np.packbits(keep) for keep in kept]
        self.blocks_per_shard = -(-store.shard_tokens // BLOCK_TOKENS)

    def of_shard(self, shard: int) -> NDArray[np.bool_]:
        """Choose the places of a shard that are kept. bool [tokens in the shard], in stored order."""
        return self.of_places(shard, 0, self.store.shard_length(shard))

    def of_places(self, shard: int, start: int, stop: int) -> NDArray[np.bool_]:
        """Choose as `of_shard` does, from place `start`, a multiple of 8, to `stop`."""
        bits = self._bits[shard][start // 8 : (stop + 7) // 8]
        return np.unpackbits(bits, count=stop - start).astype(bool)

    def take_out(self, shard: int, places: NDArray[np.int64]) -> None:
        """Leave out more places of a shard; before anything is counted."""
        keep = self.of_shard(shard)
        keep[places] = False
        self._bits[shard] = np.packbits(keep)

    @cached_property
    def n_tokens(self) -> int:
        """Number of rows that are kept; at least one."""
        n_tokens = sum(int(np.bitwise_count(bits).sum()) for bits in self._bits)
        if n_tokens == 0:
            what = "passage is" if self.store.text.unit == "passage" else "position is masked or"
            raise StoreError(f"{self.store.path}: every {what} held out; nothing to train on")
        return n_tokens

    @cached_property
    def per_block(self) -> NDArray[np.int64]:
        """Numbers of rows that are kept, by block."""
        return np.concatenate([self._per_block(shard) for shard in range(self.n_shards)])

    def _per_block(self, shard: int) -> NDArray[np.int64]:
        keep = self.of_shard(shard)
        return np.add.reduceat(keep, np.arange(0, len(keep), BLOCK_TOKENS), dtype=np.int64)

    def describe_roles(self, n_theirs: int) -> str:
        """Say how many of the tokens are those of the roles that are trained on; empty where all are.

        Args:
            n_theirs: number of those, also of rows that are left out for another reason.
        """
        if not self.mask.roles:
            return ""
        everyones, shards = replace(self.mask, roles=()), range(self.n_shards)
        n = sum(int(self.store.keep(shard, everyones, held_out=False).sum()) for shard in shards)
        return (
            f"trained on {counted(n_theirs, 'token')} of {', '.join(self.mask.roles)} alone, "
            f"{100 * n_theirs / n:.3g}% of {n:,}"
        )

"""ActivationStore: one Zarr array per site, and the tokens or passages that the activations belong to.

Layout of the folder (a Zarr v3 group):

    zarr.json                group; its attributes hold the settings of the store
    tokens/                  a TokenStore of the rows that were cached; or, of embeddings,
    passages/                a PassageStore
    <site>/zarr.json         array [n_tokens, D]
    <site>/c/<shard>/0       raw rows of one shard, in the shard's permuted order
    <site>/commits/<shard>.json   written after the shard: size, hashes, sums
    <site>/manifest.json     written when all shards are there: the commits and statistics merged

Place and address: the row stored at place `p` of a shard is the token of address
`shard * shard_tokens + permutation(n, SHUFFLE_KEY, shard)[p]`, n being the tokens in that shard.
All sites share the permutation. Where the store holds embeddings, a passage takes a token's place.
"""

import base64
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from saemill.common import durable, hub
from saemill.common.errors import StoreError
from saemill.common.mask import MaskConfig
from saemill.common.passages import PassageStore
from saemill.common.permutation import inverse, permutation
from saemill.common.shards import ShardedArray, as_tensor
from saemill.common.statistics import Moments, Statistics
from saemill.common.tokens import TokenStore

FORMAT = "saemill activations 1"
BLOCK_TOKENS = 256
"""Rows per block: the unit of reading and of checksums."""
SHUFFLE_KEY = 0x5AE
EMBEDDINGS = "embeddings"
"""The `kind` in the settings of a store that holds passages in place of tokens."""
TEXT_FOLDERS = ("tokens", "passages")
REPAIR = "Run the command that made it (`saemill cache`, …) again: it rebuilds only what is damaged."


def encode_array(values: NDArray[Any]) -> str:
    """A little-endian array as base64 text for JSON."""
    return base64.b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode()


def decode_array(text: str, dtype: str) -> NDArray[Any]:
    """The array that `encode_array` wrote."""
    return np.frombuffer(base64.b64decode(text), np.dtype(dtype).newbyteorder("<"))


def hash_blocks(rows_TD: NDArray[Any]) -> NDArray[np.uint64]:
    """xxh3 of each block of 256 rows; the last block may be short. uint64 [n_blocks]."""
    starts = range(0, len(rows_TD), BLOCK_TOKENS)
    hashed = [xxhash.xxh3_64_intdigest(rows_TD[i : i + BLOCK_TOKENS].data) for i in starts]
    return np.array(hashed, np.uint64)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of the activation store in a folder.

    Raises:
        StoreError: there is none, or one of another format.
    """
    hub.check_here(path)
    try:
        settings: dict[str, Any] = durable.read_json(path / "zarr.json")["attributes"]["saemill"]
    except (FileNotFoundError, KeyError):
        raise StoreError(f"{path} is no activation store; make one with `saemill cache`") from None
    if settings.get("format") != FORMAT:
        raise StoreError(f"{path}: format {settings.get('format')!r}, expected {FORMAT!r}")
    return settings


class ActivationStore:
    """Read access to a folder made by `saemill cache`, `import-activations` or `embed`.

    Args:
        path: the folder.

    Raises:
        StoreError: the folder is no activation store, or its tokens are damaged.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.settings = read_settings(self.path)
        mask = self.settings["mask"]
        self.mask = MaskConfig(**mask | {"token_ids": tuple(mask["token_ids"])})
        self.shard_tokens = int(self.settings["shard_tokens"])
        self.text = self._open_text()
        self.n_tokens = self.text.n_tokens
        self.ctx_len = self.text.ctx_len
        self.permutation = lru_cache(16)(self._permutation)

    def _open_text(self) -> TokenStore | PassageStore:
        """What is at each address: a token, or a passage."""
        holds_embeddings = self.settings.get("kind") == EMBEDDINGS
        try:
            return (
                PassageStore(self.path / "passages") if holds_embeddings else TokenStore(self.path / "tokens")
            )
        except StoreError as error:
            what = "list of the passages" if holds_embeddings else "copy of the tokens"
            raise StoreError(f"the {what} in {self.path} is damaged. {REPAIR}") from error

    @property
    def tokens(self) -> TokenStore:
        """The tokens that were cached.

        Raises:
            StoreError: the store holds embeddings of passages, which have none.
        """
        if isinstance(self.text, PassageStore):
            raise StoreError(f"{self.path} holds embeddings of passages, without tokens or a language model")
        return self.text

    @property
    def sites(self) -> list[str]:
        """Names of the finished sites."""
        return sorted(
            file.parent.name
            for file in self.path.glob("*/manifest.json")
            if file.parent.name not in TEXT_FOLDERS
        )

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the content: settings and tokens, or passages. A store that was published with names
        in place of paths kept the one it had, so that SAEs trained on it still know it."""
        kept: str | None = self.settings.get("fingerprint")
        return kept or durable.hash_json([self.settings, self.text.fingerprint])

    def site(self, name: str) -> "SiteArray":
        """A finished site's array.

        Raises:
            StoreError: there is no such site (the message lists those there), or it is damaged.
        """
        if name not in self.sites:
            state = "unfinished" if (self.path / name).is_dir() else "not in the store"
            finished = ", ".join(self.sites) or "none"
            advice = "Run `saemill cache` with the site to add or finish it."
            if self.settings.get("kind") == EMBEDDINGS:
                advice = "If it is unfinished, run the command that made the store again."
            raise StoreError(f"site {name!r} of {self.path} is {state}; finished: {finished}. {advice}")
        return SiteArray(self, name)

    def read(self, site: str, start: int, stop: int) -> Tensor:
        """Activations of the addresses start..stop, in address order.

        Returns: [stop - start, D] in the stored dtype; every block read is checked.
        """
        return self.site(site).read(start, stop)

    def shard_length(self, shard: int) -> int:
        """Tokens in a shard."""
        return min(self.shard_tokens, self.n_tokens - shard * self.shard_tokens)

    @property
    def n_shards(self) -> int:
        """Shards per site."""
        return -(-self.n_tokens // self.shard_tokens)

    def _permutation(self, shard: int) -> NDArray[np.int64]:
        """Address within the shard of each place in it. int64 [tokens in the shard]."""
        return permutation(self.shard_length(shard), SHUFFLE_KEY, shard)

    def keep(self, shard: int, mask: MaskConfig, held_out: bool) -> NDArray[np.bool_]:
        """Which places of a shard count: unmasked, and in held-out rows or not as asked.

        Returns: bool [tokens in the shard], in stored order.
        """
        return self.keep_addresses(shard, mask, held_out)[self.permutation(shard)]

    def keep_addresses(self, shard: int, mask: MaskConfig, held_out: bool) -> NDArray[np.bool_]:
        """As `keep`, in address order."""
        first = shard * self.shard_tokens // self.ctx_len
        last = first + self.shard_length(shard) // self.ctx_len
        keep_RS = self.text.keep(first, last, mask)
        keep_RS &= (self.text.held_out_R[first:last] == held_out)[:, None]
        return keep_RS.reshape(-1)


class SiteArray:
    """One finished site: its rows, checked block by block as they are read, and its statistics."""

    def __init__(self, store: ActivationStore, name: str) -> None:
        self.store, self.name = store, name
        self.array = ShardedArray(store.path / name)
        if self.array.n_rows != store.n_tokens or self.array.shard_rows != store.shard_tokens:
            raise StoreError(f"{self.array.path}/zarr.json does not fit the store's settings. {REPAIR}")
        self.width = self.array.width
        self.dtype = self.array.torch_dtype
        self.manifest: dict[str, Any] = durable.read_json(self.array.path / "manifest.json")
        self.array.check_sizes(REPAIR)

    @cached_property
    def statistics(self) -> Statistics:
        """Moments over the training positions by the store's own mask."""
        entry = self.manifest["statistics"]
        mean, variance = (
            torch.from_numpy(decode_array(entry[key], "f8").copy()) for key in ("mean", "variance")
        )
        distances = {int(step): count for step, count in entry["distances"].items()}
        return Statistics(entry["n_tokens"], mean, variance, entry["mean_squared_norm"], distances)

    def statistics_under(self, mask: MaskConfig) -> Statistics:
        """Moments under another mask: read from the store's manifest, or one pass over the site."""
        if mask == self.store.mask:
            return self.statistics
        moments = Moments(self.width)
        for shard in range(self.store.n_shards):
            keep = self.store.keep(shard, mask, held_out=False)
            rows = np.concatenate([self.block(shard, b) for b in range(-(-len(keep) // BLOCK_TOKENS))])
            moments.add(as_tensor(rows[keep], self.dtype))
        return moments.statistics()

    @cached_property
    def _hashes(self) -> list[NDArray[np.uint64]]:
        return [decode_array(entry["block_hashes"], "u8") for entry in self.manifest["shards"]]

    def block(self, shard: int, block: int) -> NDArray[Any]:
        """One block of stored rows, compared with its hash; a view of the mapped file.

        Raises:
            StoreError: the content is not what was written.
        """
        rows = self.array.shard(shard)[block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS]
        if xxhash.xxh3_64_intdigest(rows.data) != self._hashes[shard][block]:
            raise StoreError(
                f"{self.array.shard_path(shard)}: block {block} differs from its hash. "
                f"`saemill verify {self.store.path}` names all bad shards. {REPAIR}"
            )
        return rows

    def read(self, start: int, stop: int) -> Tensor:
        """Activations of addresses start..stop in address order, [stop - start, D]."""
        if not 0 <= start <= stop <= self.store.n_tokens:
            raise IndexError(f"addresses must be within 0..{self.store.n_tokens}, got {start}..{stop}")
        size = self.store.shard_tokens
        parts = [np.empty((0, self.width), self.array.dtype)]
        for shard in range(start // size, -(-stop // size)):
            first, last = max(start - shard * size, 0), min(stop - shard * size, size)
            parts.append(self.gather(shard, np.arange(first, last)))
        return as_tensor(np.concatenate(parts), self.dtype)

    def gather(self, shard: int, offsets: NDArray[np.int64]) -> NDArray[Any]:
        """Rows of one shard by their addresses' offsets in it, each block that is read checked.

        Returns: [len(offsets), D] in the array's dtype.
        """
        places = inverse(self.store.permutation(shard))[offsets]
        order = np.argsort(places)
        edges = np.searchsorted(
            places[order], np.arange(0, self.store.shard_tokens + BLOCK_TOKENS, BLOCK_TOKENS)
        )
        out = np.empty((len(offsets), self.width), self.array.dtype)
        for block in np.flatnonzero(np.diff(edges)):
            here = order[edges[block] : edges[block + 1]]
            out[here] = self.block(shard, int(block))[places[here] - block * BLOCK_TOKENS]
        return out

    def problem(self, shard: int) -> str | None:
        """What is wrong with a shard by size and hash, or None."""
        problem = self.array.problem(shard)
        if problem is None:
            entry = self.manifest["shards"][shard]
            if durable.hash_file(self.array.shard_path(shard)) != entry["xxh3"]:
                return "content differs from its hash"
        return problem

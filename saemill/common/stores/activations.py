"""ActivationStore: one Zarr array per site, and the tokens or passages that the activations belong to.

Layout of the folder (a Zarr v3 group):

    zarr.json                group; its attributes hold the settings of the store
    sites/<site>.json        a record of each site, finished or not; it repeats the settings
    tokens/                  a TokenStore of the rows that were cached; or, of embeddings,
    passages/                a PassageStore
    <site>/zarr.json         array [n_tokens, D]
    <site>/c/<shard>/0       raw rows of one shard, in the shard's permuted order
    <site>/commits/<shard>.json   written after the shard: size, hashes, sums
    <site>/manifest.json     written when all shards are there: the commits and statistics merged

A site that is a module's input, `layers.4.mlp:in`, has the folder `layers.4.mlp~in`.

Place and address: the row stored at place `p` of a shard is the token of address
`shard * shard_tokens + permutation(n, SHUFFLE_KEY, shard)[p]`, n being the tokens in that shard.
All sites share the permutation. Where the store holds embeddings, a passage takes a token's place.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from saemill.common import durable, records
from saemill.common.errors import StoreError
from saemill.common.stores import joined, site_names
from saemill.common.stores.followers import Consumed, read_consumed
from saemill.common.stores.joined import JoinedSite
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.norms import NormSketch, norms_of
from saemill.common.stores.passages import PassageStore
from saemill.common.stores.permutation import inverse, permutation
from saemill.common.stores.shards import ShardedArray, as_tensor, described
from saemill.common.stores.site_records import (
    BLOCK_TOKENS,
    EMBEDDINGS,
    REPAIR,
    Commit,
    SiteManifest,
    SiteRecord,
    StoreSettings,
    decode_array,
    read_settings,
    read_site,
    record_path,
    site_path,
    sites_in,
)
from saemill.common.stores.site_roles import Role
from saemill.common.stores.statistics import Moments, Statistics
from saemill.common.stores.tokens import TokenStore

SHUFFLE_KEY = 0x5AE


def describe_site(settings: StoreSettings, n_tokens: int, site: str, width: int) -> dict[str, Any]:
    """Describe a site's array, as its `zarr.json` does."""
    attributes = {"site": site, "order": "permuted within each shard; see saemill"}
    return described((n_tokens, width), settings.shard_tokens, settings.torch_dtype, attributes)


class ActivationStore:
    """Read access to a folder made by `saemill cache`, `import-activations` or `embed`.

    Args:
        path: the folder.
        beside: a store of another model's activations at the same tokens. Its sites are called
            `with.<site>`; both masks count together.

    Raises:
        StoreError: the folder is no activation store, or its settings or tokens are damaged.
        ConfigError: the store beside it has other tokens, or these in other places.
    """

    def __init__(self, path: Path | str, beside: Path | str | None = None) -> None:
        self.path = Path(path)
        self.settings = read_settings(self.path)
        self.mask = self.settings.mask
        self.shard_tokens = self.settings.shard_tokens
        self.text = self._open_text()
        self.n_tokens = self.text.n_tokens
        self.ctx_len = self.text.ctx_len
        self.permutation = lru_cache(16)(self._permutation)
        self.beside = None if beside is None else ActivationStore(beside)
        if self.beside is not None:
            joined.check_beside(self, self.beside)
            self.mask = joined.combined(self.mask, self.beside.mask)

    def _open_text(self) -> TokenStore | PassageStore:
        """Open the tokens, or the passages, that the addresses name."""
        holds_embeddings = self.settings.kind == EMBEDDINGS
        text: TokenStore | PassageStore
        known: str | None
        try:
            if holds_embeddings:
                text = PassageStore(self.path / "passages", REPAIR)
                known, wanted = text.fingerprint, self.settings.passages_fingerprint
            else:
                text = TokenStore(self.path / "tokens", REPAIR)
                known, wanted = text.manifest.parent_fingerprint, self.settings.tokens_fingerprint
            if (known, text.n_rows) != (wanted, self.settings.n_rows) or self.shard_tokens % text.ctx_len:
                raise StoreError(f"{text.path} is of another store")
        except StoreError as error:
            what = "list of the passages" if holds_embeddings else "copy of the tokens"
            message = str(error).removesuffix(REPAIR).rstrip().removesuffix(".")
            raise StoreError(f"the {what} in {self.path} is damaged: {message}. {REPAIR}") from error
        return text

    @property
    def tokens(self) -> TokenStore:
        """Tokens that were cached.

        Raises:
            StoreError: the store holds embeddings of passages, which have none.
        """
        if isinstance(self.text, PassageStore):
            raise StoreError(f"{self.path} holds embeddings of passages, without tokens or a language model")
        return self.text

    @property
    def sites(self) -> list[str]:
        """Names of the finished sites."""
        return [
            name for name in sites_in(self.path) if (site_path(self.path, name) / "manifest.json").exists()
        ]

    def sites_with(self, shard: int) -> list[str]:
        """List the sites of which a shard's rows can be read."""
        return self.sites

    @property
    def consumed(self) -> Consumed | None:
        """Which shards of which sites were removed when all runs that follow the store had read them; None
        where none was."""
        consumed = read_consumed(self.path, self.settings.identity)
        return consumed if consumed is not None and consumed.shards else None

    @property
    def unfinished(self) -> dict[str, int]:
        """Shards committed, by the name of each unfinished site."""
        return {
            name: len(list(site_path(self.path, name).glob("commits/*.json")))
            for name in sites_in(self.path)
            if not (site_path(self.path, name) / "manifest.json").exists()
        }

    @property
    def fingerprint(self) -> str:
        """Hash of the content: settings and tokens, or passages; with a store beside, of both. A store that
        was published with names in place of paths has its original fingerprint, so that SAEs trained on it
        still match it."""
        own = self.own_fingerprint
        return own if self.beside is None else durable.hash_json([own, self.beside.fingerprint])

    @cached_property
    def own_fingerprint(self) -> str:
        """Hash of the content without that of the store beside."""
        settings = self.settings.plain({"fingerprint", "source_hash"})
        return self.settings.fingerprint or durable.hash_json([settings, self.text.fingerprint])

    def record(self, name: str) -> SiteRecord:
        """Read the record of a site, finished or not.

        Raises:
            StoreError: nothing is, or its record is damaged or of another store.
        """
        record = read_site(self.path, name)
        if record.settings != self.settings:
            raise StoreError(f"{record_path(self.path, name)} is of another store than zarr.json. {REPAIR}")
        return record

    def manifest(self, record: SiteRecord) -> SiteManifest:
        """Read the manifest of a finished site.

        Raises:
            StoreError: it is missing, damaged, or another site's.
        """
        folder = site_path(self.path, record.site)
        manifest = records.read(folder / "manifest.json", SiteManifest, REPAIR)
        self._check_owner(folder / "manifest.json", manifest, record.site)
        lengths = [self.shard_length(shard) for shard in range(self.n_shards)]
        if manifest.width != record.width or [shard.n_tokens for shard in manifest.shards] != lengths:
            raise StoreError(f"{folder}/manifest.json lists other shards than there are. {REPAIR}")
        return manifest

    def commit(self, site: str, shard: int) -> Commit:
        """Read the record of one shard of a site.

        Raises:
            StoreError: it is missing, damaged, or another shard's.
        """
        file = site_path(self.path, site) / "commits" / f"{shard}.json"
        commit = records.read(file, Commit, REPAIR)
        self._check_owner(file, commit, site)
        if (commit.shard, commit.n_tokens) != (shard, self.shard_length(shard)):
            raise StoreError(f"{file} is the record of shard {commit.shard}. {REPAIR}")
        return commit

    def _check_owner(self, file: Path, record: SiteManifest | Commit, site: str) -> None:
        """Refuse a record of another site, whose folder may have been renamed."""
        if record.store != self.settings.identity:
            raise StoreError(f"{file} is of another store, or of other settings. {REPAIR}")
        if record.site != site:
            raise StoreError(f"{file} is of the site {record.site!r}; name folders as they were. {REPAIR}")

    def site(self, name: str) -> "SiteArray | JoinedSite":
        """Open a finished site, or several of them as one: `layers.2+layers.4`.

        Raises:
            StoreError: there is no such site (the message lists those there), or it is damaged.
            ConfigError: sites that cannot be joined.
        """
        if site_names.is_joined(name):
            return JoinedSite(name, {part: self.array(part) for part in site_names.parts_of(name)})
        return self.array(name)

    def array(self, name: str) -> "SiteArray":
        """Open a finished site's array, of the store beside where its name begins with `with.`.

        Raises:
            StoreError: there is no such site (the message lists those there), or it is damaged.
        """
        if self.beside is not None and name.startswith(site_names.BESIDE):
            return self.beside.array(name.removeprefix(site_names.BESIDE))
        if name not in self.sites:
            if (consumed := self.consumed) and name in consumed.sites:
                raise StoreError(consumed.refusal(name, self.path))
            state = "unfinished" if name in self.unfinished else "not in the store"
            finished = ", ".join(self.sites) or "none"
            advice = "Run `saemill cache` with the site to add or finish it."
            if self.settings.kind == EMBEDDINGS:
                advice = "If it is unfinished, run the command that made the store again."
            raise StoreError(f"site {name!r} of {self.path} is {state}; finished: {finished}. {advice}")
        return SiteArray(self, name)

    def read(self, site: str, start: int, stop: int) -> Tensor:
        """Read activations of the addresses start..stop, in address order.

        Returns: [stop - start, D] in the stored dtype; every block read is checked.
        """
        return self.site(site).read(start, stop)

    def shard_length(self, shard: int) -> int:
        """Count the tokens in a shard."""
        return min(self.shard_tokens, self.n_tokens - shard * self.shard_tokens)

    def rows_of(self, shard: int) -> range:
        """List the rows whose tokens, or the passages that, lie in a shard."""
        first = shard * self.shard_tokens // self.ctx_len
        return range(first, first + self.shard_length(shard) // self.ctx_len)

    @property
    def n_shards(self) -> int:
        """Number of shards per site."""
        return -(-self.n_tokens // self.shard_tokens)

    def _permutation(self, shard: int) -> NDArray[np.int64]:
        """Compute the address within the shard of each place in it. int64 [tokens in the shard]."""
        return permutation(self.shard_length(shard), SHUFFLE_KEY, shard)

    def keep(self, shard: int, mask: MaskConfig, held_out: bool) -> NDArray[np.bool_]:
        """Choose the places of a shard that count: unmasked, and in held-out rows or not, by `held_out`.

        Returns: bool [tokens in the shard], in stored order.
        """
        return self.keep_addresses(shard, mask, held_out)[self.permutation(shard)]

    def keep_addresses(self, shard: int, mask: MaskConfig, held_out: bool) -> NDArray[np.bool_]:
        """Choose as `keep` does, in address order."""
        rows = self.rows_of(shard)
        keep_RS = self.text.keep(rows.start, rows.stop, mask)
        keep_RS &= (self.text.held_out_R[rows.start : rows.stop] == held_out)[:, None]
        return keep_RS.reshape(-1)


class SiteArray:
    """One finished site: its rows, checked block by block as they are read, and its statistics."""

    def __init__(self, store: ActivationStore, name: str) -> None:
        record = self._describe(store, name)
        self.manifest = store.manifest(record)
        self.array.check_sizes()
        self._computed_norms: dict[int, NDArray[np.uint16]] = {}

    def _describe(self, store: ActivationStore, name: str) -> SiteRecord:
        """Open the array by what the site's record says of it."""
        self.store, self.name = store, name
        record = store.record(name)
        self.width = record.width
        self.array = ShardedArray(site_path(store.path, name), REPAIR)
        self.array.expect(describe_site(store.settings, store.n_tokens, name, self.width))
        self.dtype, self.stored_dtype = self.array.torch_dtype, self.array.dtype
        return record

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
            self._computed_norms[shard] = norms_of(as_tensor(self._rows(shard), self.dtype))
        return self._computed_norms[shard]

    def statistics_over(self, keep: Callable[[int], NDArray[np.bool_]]) -> Statistics:
        """Compute moments of chosen rows, in one pass over the shards that statistics are of.

        Args:
            keep: chooses places of the shard of a number, in stored order.
        """
        moments = Moments(self.width)
        for shard in self._shards():
            moments.add(as_tensor(self._rows(shard)[keep(shard)], self.dtype))
        return moments.statistics()

    def _shards(self) -> Iterable[int]:
        """List the shards that statistics are of: all."""
        return range(self.store.n_shards)

    def _rows(self, shard: int) -> NDArray[Any]:
        """Read all rows of a shard, block by block, each compared with its hash."""
        n_blocks = -(-self.store.shard_length(shard) // BLOCK_TOKENS)
        return np.concatenate([self.block(shard, block) for block in range(n_blocks)])

    @cached_property
    def _hashes(self) -> Mapping[int, NDArray[np.uint64]]:
        """Hashes of blocks, by shard."""
        entries = enumerate(self.manifest.shards)
        return {number: decode_array(shard.block_hashes, "u8") for number, shard in entries}

    def block(self, shard: int, block: int) -> NDArray[Any]:
        """Read one block of stored rows, compared with its hash; a view of the mapped file.

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
        """Read activations of addresses start..stop in address order, [stop - start, D]."""
        if not 0 <= start <= stop <= self.store.n_tokens:
            raise IndexError(f"addresses must be within 0..{self.store.n_tokens}, got {start}..{stop}")
        size = self.store.shard_tokens
        pieces = [np.empty((0, self.width), self.array.dtype)]
        for shard in range(start // size, -(-stop // size)):
            first, last = max(start - shard * size, 0), min(stop - shard * size, size)
            pieces.append(self.gather(shard, np.arange(first, last)))
        return as_tensor(np.concatenate(pieces), self.dtype)

    def gather(self, shard: int, offsets: NDArray[np.int64]) -> NDArray[Any]:
        """Read rows of one shard by their addresses' offsets in it; each block that is read is checked.

        Returns: [len(offsets), D] in the array's dtype.
        """
        return self.at_places(shard, inverse(self.store.permutation(shard))[offsets])

    def at_places(self, shard: int, places: NDArray[np.int64]) -> NDArray[Any]:
        """Read rows of one shard by their places in it; each block that is read is checked.

        Returns: [len(places), D] in the array's dtype.
        """
        order = np.argsort(places)
        edges = np.searchsorted(
            places[order], np.arange(0, self.store.shard_tokens + BLOCK_TOKENS, BLOCK_TOKENS)
        )
        out = np.empty((len(places), self.width), self.array.dtype)
        for block in np.flatnonzero(np.diff(edges)):
            in_block = order[edges[block] : edges[block + 1]]
            out[in_block] = self.block(shard, int(block))[places[in_block] - block * BLOCK_TOKENS]
        return out

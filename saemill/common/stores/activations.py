"""ActivationStore: one Zarr array per site, and the tokens or passages that the activations belong to.

Layout of the folder (a Zarr v3 group):

    zarr.json                group; its attributes hold the settings of the store
    sites/<site>.json        a record of each site, finished or not; it repeats the settings
    tokens/                  a TokenStore of the rows that were cached; or, of embeddings,
    passages/                a PassageStore
    <site>/zarr.json         array [n_tokens, C] of stored rows (`forms`); C is D, of int8 more
    <site>/c/<shard>/0       stored rows of one shard, in the shard's permuted order
    <site>/commits/<shard>.json   written after the shard: size, hashes, sums
    <site>/manifest.json     written when all shards are there: the commits and statistics merged

A site that is a module's input, `layers.4.mlp:in`, has the folder `layers.4.mlp~in`.

Place and address: the row stored at place `p` of a shard is the token of address
`shard * shard_tokens + permutation(n, SHUFFLE_KEY, shard)[p]`, n being the tokens in that shard.
All sites share the permutation. Where the store holds embeddings, a passage takes a token's place.
"""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from saemill.common import durable, records
from saemill.common.errors import ConfigError, StoreError
from saemill.common.stores import joined, mirror, site_names
from saemill.common.stores.followers import Consumed, read_consumed
from saemill.common.stores.joined import JoinedSite
from saemill.common.stores.kept_locally import KeptLocally
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.passages import PassageStore
from saemill.common.stores.permutation import permutation
from saemill.common.stores.shards import ShardedArray, described
from saemill.common.stores.site_array import SiteArray
from saemill.common.stores.site_records import (
    EMBEDDINGS,
    REPAIR,
    Commit,
    SiteManifest,
    SiteRecord,
    StoreSettings,
    read_settings,
    read_site,
    record_path,
    site_path,
    sites_in,
)
from saemill.common.stores.tokens import TokenStore

SHUFFLE_KEY = 0x5AE


def describe_site(settings: StoreSettings, n_tokens: int, site: str, width: int) -> dict[str, Any]:
    """Describe a site's array, as its `zarr.json` does."""
    form = settings.form(width)
    attributes = {"site": site, "order": "permuted within each shard; see saemill"} | form.attributes
    shape, size = (n_tokens, form.columns), settings.shard_tokens
    return described(shape, size, form.stored, attributes, settings.compression)


class ActivationStore:
    """Read access to a folder made by `saemill cache`, `import-activations` or `embed`.

    Args:
        path: the folder, or the address of one in an object store: `s3://bucket/acts` (see `mirror`).
        beside: a store of another model's activations at the same tokens. Its sites are called
            `with.<site>`; both masks count together.

    Raises:
        StoreError: the folder is no activation store, or its settings or tokens are damaged.
        ConfigError: the store beside it has other tokens, or these in other places.
    """

    def __init__(self, path: Path | str, beside: Path | str | None = None) -> None:
        self.path, self.mirror = mirror.opened(path)
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

    @property
    def named(self) -> str:
        """The folder as it was named, or the address."""
        return str(self.path) if self.mirror is None else self.mirror.known.address

    @property
    def place(self) -> str:
        """Where the store lies: its folder, from anywhere on this machine, or its address."""
        return str(self.path.absolute()) if self.mirror is None else self.mirror.known.address

    def cache_locally(self, max_bytes: int | None) -> bool:
        """Keep blocks that are read over the network on a disk here, and read them there again.

        Args:
            max_bytes: see `LocalCache`; 0 keeps none.

        Returns: whether any are read so, of this store or the one beside it.
        """
        stores = (self, self.beside)
        remote = [s.mirror for s in stores if s is not None and s.mirror is not None]
        for each in remote if max_bytes != 0 else []:
            each.cache_locally(max_bytes)
        return bool(remote)

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
            raise StoreError(f"the {what} in {self.named} is damaged: {message}. {REPAIR}") from error
        return text

    @property
    def tokens(self) -> TokenStore:
        """Tokens that were cached.

        Raises:
            StoreError: the store holds embeddings of passages, which have none.
        """
        if isinstance(self.text, PassageStore):
            raise StoreError(f"{self.named} holds embeddings of passages, without tokens or a language model")
        return self.text

    @property
    def sites(self) -> list[str]:
        """Names of the finished sites."""
        return [
            name for name in sites_in(self.path) if (site_path(self.path, name) / "manifest.json").exists()
        ]

    def check_finished(self) -> None:
        """Refuse a store that has no finished site.

        Raises:
            StoreError: it has none; of one whose shards were removed, which.
        """
        if self.sites:
            return
        if consumed := self.consumed:
            raise StoreError(consumed.refusal(consumed.sites[0], self.path))
        raise StoreError(f"no site of {self.named} is finished; finish one with `saemill cache`")

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
            name: len(self.committed(name))
            for name in sites_in(self.path)
            if not (site_path(self.path, name) / "manifest.json").exists()
        }

    def committed(self, site: str) -> set[int]:
        """List the shards of a site that have a record, in whatever state."""
        folder = site_path(self.path, site) / "commits"
        files = folder.glob("*.json") if self.mirror is None else self.mirror.files_in(folder)
        return {int(file.stem) for file in files if file.stem.isdecimal()}

    @property
    def fingerprint(self) -> str:
        """Hash of the content: settings and tokens, or passages; with a store beside, of both. A store that
        was published with names in place of paths has its original fingerprint, so that SAEs trained on it
        still match it."""
        own = self.own_fingerprint
        return own if self.beside is None else durable.hash_json([own, self.beside.fingerprint])

    @cached_property
    def own_fingerprint(self) -> str:
        """Hash of the content without that of the store beside. However it is compressed, it is the same."""
        settings = self.settings.plain({"fingerprint", "source_hash", "compression"})
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
        if manifest.calibration != record.calibration:
            raise StoreError(f"{folder}/manifest.json has another calibration than its site. {REPAIR}")
        return manifest

    def commit(self, site: str, shard: int) -> Commit:
        """Read the record of one shard of a site.

        Raises:
            StoreError: it is missing, damaged, or another shard's.
        """
        file = site_path(self.path, site) / "commits" / f"{shard}.json"
        if self.mirror is not None:
            self.mirror.fetch(file)
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

    def open_array(self, name: str, width: int) -> ShardedArray:
        """Open the array of a site, finished or not, whose activations have D = `width` values.

        Raises:
            StoreError: there is none, or its description is not as the settings say.
        """
        folder, compression = site_path(self.path, name), self.settings.compression
        array = ShardedArray(folder, REPAIR, compression=compression, mirror=self.mirror)
        array.expect(describe_site(self.settings, self.n_tokens, name, width))
        return array

    def site(self, name: str) -> SiteArray | JoinedSite:
        """Open a finished site, or several of them as one: `layers.2+layers.4`.

        Raises:
            StoreError: there is no such site (the message lists those there), or it is damaged.
            ConfigError: sites that cannot be joined.
        """
        if site_names.is_joined(name):
            return JoinedSite(name, {part: self.array(part) for part in site_names.parts_of(name)})
        return self.array(name)

    def array(self, name: str) -> SiteArray:
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
            raise StoreError(f"site {name!r} of {self.named} is {state}; finished: {finished}. {advice}")
        return SiteArray(self, name)

    def read(self, site: str, start: int, stop: int) -> Tensor:
        """Read activations of the addresses start..stop, in address order.

        Returns: [stop - start, D] as the form's rows are read; every block read is checked.
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


def keep_locally(stores: Sequence[ActivationStore], local_cache: str | None) -> None:
    """Keep blocks of those of a command's stores that lie in a bucket; see `KeptLocally`.

    Raises:
        ConfigError: the setting is no size, or has no effect.
    """
    max_bytes = KeptLocally(local_cache=local_cache).max_bytes
    in_buckets = [store.cache_locally(max_bytes) for store in stores]
    if local_cache is not None and not any(in_buckets):
        names = ", ".join(store.named for store in stores)
        raise ConfigError(f"local_cache has no effect: {names} is on a disk; leave it out")

"""Writing one site: a shard is permuted, written, hashed, summed, and only then committed."""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from saemill.cache.claims import Claim, Lost, Worker
from saemill.common import config as settings
from saemill.common import durable, records
from saemill.common.errors import ConfigError, DataError, DiskError, MissingError, StoreError
from saemill.common.log import say
from saemill.common.stores.activations import ActivationStore, describe_site
from saemill.common.stores.shards import ShardedArray, as_numpy, as_tensor
from saemill.common.stores.site_records import (
    REPAIR,
    Commit,
    Site,
    SiteManifest,
    SiteRecord,
    SiteStatistics,
    StoreSettings,
    decode_array,
    encode_array,
    group_of,
    hash_blocks,
    read_settings,
    record_path,
    sites_in,
)
from saemill.common.stores.statistics import Moments

T = TypeVar("T")
COMMIT = re.compile(r"(0|[1-9]\d{0,17})\.json")


def has_shards(path: Path) -> bool:
    """Whether any shard of any site in a store's folder is committed."""
    return any(path.glob("*/commits/[0-9]*.json"))


class SiteWriter:
    """Writes the shards of one site; each shard becomes part of the store by its commit record.

    Others may be writing other shards. A shard is written by the worker that has claimed it, elsewhere,
    and is linked into its place where no other file is; then its record is, in the same way. All else is
    made by the worker that has claimed the store: what is known of a site is written anew where it is
    damaged, and no shard is given up for it.

    Args:
        store: the store; its settings and tokens are on disk already.
        site: where the activations come from.
        dtype: how they are stored.
        worker: this process, holding the claim on the store.

    Raises:
        StoreError: the site's folder holds another site.
    """

    def __init__(self, store: ActivationStore, site: Site, dtype: torch.dtype, worker: Worker) -> None:
        self.store, self.site, self.dtype, self.worker = store, site, dtype, worker
        self.path = store.path / site.name
        self._identity = store.settings.identity
        self._check_folder()
        self._known = SiteRecord(site=site.name, width=site.width, settings=store.settings)
        if records.if_whole(lambda: store.record(site.name)) != self._known:
            _put(record_path(store.path, site.name), records.content(self._known), self.worker)
        self.array = self._array()

    def _array(self) -> ShardedArray:
        """The site's array, its description written where it is missing or damaged."""
        description = describe_site(self.store.settings, self.store.n_tokens, self.site.name, self.site.width)
        try:
            array = ShardedArray(self.path, REPAIR)
            array.expect(description)
        except DiskError:
            raise
        except StoreError as error:
            if self.path.is_dir():
                say(f"written again: {error}".removesuffix(REPAIR).rstrip())
            _put(self.path / "zarr.json", description, self.worker)
            array = ShardedArray(self.path, REPAIR)
        return array

    def _check_folder(self) -> None:
        """Refuse a folder whose records are all of another site or store: folders were exchanged."""
        mine, owner = (self._identity, self.site.name), None
        for owner in self._owners():
            if owner == mine:
                return
        if owner is not None:
            of = f"of the site {owner[1]!r}" if owner[1] != self.site.name else "of another store"
            raise StoreError(
                f"{self.path} holds shards {of}. If folders were exchanged, rename them as they were; else "
                "remove this one. Then run the same command again"
            )

    def _owners(self) -> Iterator[tuple[str, str]]:
        """Of which store and site the records in the folder say they are."""
        if manifest := records.if_whole(lambda: records.read(self.manifest_path, SiteManifest, REPAIR)):
            yield manifest.store, manifest.site
        for file in self._commits().values():
            if commit := records.if_whole(partial(records.read, file, Commit, REPAIR)):
                yield commit.store, commit.site

    def commit_path(self, shard: int) -> Path:
        """The record that makes a shard part of the store."""
        return self.path / "commits" / f"{shard}.json"

    @property
    def manifest_path(self) -> Path:
        """The record that makes the site readable."""
        return self.path / "manifest.json"

    def _commits(self) -> dict[int, Path]:
        """The records of shards, whatever they say."""
        found = ((COMMIT.fullmatch(file.name), file) for file in self.path.glob("commits/*.json"))
        numbered = {int(match[1]): file for match, file in found if match}
        return {shard: file for shard, file in sorted(numbered.items()) if shard < self.store.n_shards}

    def committed(self) -> set[int]:
        """Shards that have a record."""
        return set(self._commits())

    def lacking(self) -> list[int]:
        """Shards that have none."""
        there = self.committed()
        return [shard for shard in range(self.store.n_shards) if shard not in there]

    def damaged(self) -> list[int]:
        """Shards still to be written, and those whose file or record is bad.

        An unfinished site is checked by file sizes, a finished one by the hashes of its files.
        """
        hashes = self.manifest_path.exists()
        return [shard for shard in range(self.store.n_shards) if not self._is_good(shard, hashes)]

    def mend(self, shards: list[int]) -> None:
        """Look again at shards that were found damaged, and at the manifest; the claim on the store is held.

        A shard whose file the manifest answers for gets its record anew; others are taken out of the store.
        The manifest goes last, so that a crash in between leaves a site whose hashes are checked again.
        """
        hashes = self.manifest_path.exists()
        manifest = self._manifest()
        is_whole = manifest is not None
        if hashes and not is_whole:
            say(f"{self.manifest_path} was damaged and is written again")
        for shard in shards:
            was_there = self.commit_path(shard).exists()
            if self._is_good(shard, hashes):
                continue
            if manifest and self._holds(shard, manifest.shards[shard].xxh3):
                record = self._record_again(shard, manifest.shards[shard].xxh3)
                say(f"{self.commit_path(shard)} was missing or damaged and is written again")
                _put(self.commit_path(shard), records.content(record), self.worker)
                continue
            is_whole = False
            if was_there:  # else another worker may be about to put a good one there
                self.commit_path(shard).unlink(missing_ok=True)
        if manifest and is_whole and not self._agrees(manifest):
            say(f"{self.manifest_path} tells of other shards than their records and is written again")
            is_whole = False
        if not is_whole:
            self.manifest_path.unlink(missing_ok=True)

    def _agrees(self, manifest: SiteManifest) -> bool:
        """Whether a manifest repeats what the shards' records say. Each may be whole by itself, and of
        another time: one was brought back from a backup."""
        commits = (self._commit(shard) for shard in range(self.store.n_shards))
        return all(
            commit is not None and commit.entry() == entry
            for commit, entry in zip(commits, manifest.shards, strict=True)
        )

    def _is_good(self, shard: int, hashes: bool) -> bool:
        self.worker.check_stop()
        commit = self._commit(shard)
        if commit is None:
            return False
        return self._holds(shard, commit.xxh3) if hashes else self.array.problem(shard) is None

    def _holds(self, shard: int, xxh3: str) -> bool:
        """Whether a shard's file is there, whole, with this hash."""
        if self.array.problem(shard):
            return False
        try:
            return durable.hash_file(self.array.shard_path(shard)) == xxh3
        except MissingError:  # another worker has just replaced it
            return False

    def _commit(self, shard: int) -> Commit | None:
        """The record of a shard, if it is there, whole and this shard's."""
        commit = records.if_whole(lambda: self.store.commit(self.site.name, shard))
        fits = commit and (commit.width, commit.bytes) == (self.site.width, self.array.shard_bytes)
        return commit if fits else None

    def _manifest(self) -> SiteManifest | None:
        """The site's manifest, if it is there, whole and this site's."""
        return records.if_whole(lambda: self.store.manifest(self._known))

    def write(self, shard: int, x_TD: Tensor, claim: Claim) -> None:
        """Write and commit one shard.

        Args:
            shard: its number.
            x_TD: activations in address order, on the CPU, in the stored dtype.
            claim: the right to do so.

        Raises:
            DataError: some value is NaN or infinite.
            Lost: another worker took the shard over; nothing of this one's is in the store.
        """
        self._check_finite(shard, x_TD)
        permuted_TD = x_TD[torch.from_numpy(self.store.permutation(shard))]
        data, record = self.worker.partial(), self.worker.partial()
        try:
            self.array.write_shard(shard, as_numpy(permuted_TD), data)
            records.write(record, self._record(shard, permuted_TD, durable.hash_file(data)))
            claim.check()
            self._publish(shard, data, record)
        except OSError:
            claim.check()  # the files of a worker that was taken for dead are cleared away
            raise
        finally:
            for partial in (data, record):
                partial.unlink(missing_ok=True)

    def _record(self, shard: int, permuted_TD: Tensor, xxh3: str) -> Commit:
        """What is to be known of a shard: its file's size and hash, and sums over its training positions."""
        rows = as_numpy(permuted_TD)
        moments = Moments(self.site.width)
        keep = self.store.keep(shard, self.store.mask, held_out=False)
        moments.add(permuted_TD[torch.from_numpy(keep)])
        return Commit(
            store=self._identity,
            site=self.site.name,
            shard=shard,
            width=self.site.width,
            n_tokens=len(rows),
            bytes=self.array.shard_bytes,
            xxh3=xxh3,
            block_hashes=encode_array(hash_blocks(rows)),
            n_counted=moments.n,
            mean=encode_array(moments.mean_D),
            deviations=encode_array(moments.deviations_D),
            distances=dict(sorted(moments.distances.items())),
        )

    def _record_again(self, shard: int, xxh3: str) -> Commit:
        """The record of a shard whose file is whole, from the file."""
        rows_TD = as_tensor(np.array(self.array.shard(shard)), self.dtype)
        return self._record(shard, rows_TD, xxh3)

    def _publish(self, shard: int, data: Path, record: Path) -> None:
        """Put a shard and its record in place.

        A worker that was stopped after its claim was checked may meet its successor's files here. It
        replaces none that has a record; where data and record are of both, the record is withdrawn.
        """
        place, commit = self.array.shard_path(shard), self.commit_path(shard)
        inode = data.stat().st_ino
        try:
            durable.place(data, place)
        except FileExistsError:
            if commit.exists():
                raise Lost(f"shard {shard} of {self.site.name} is there already") from None
            data.replace(place)  # over a damaged one, or of a worker that died before its record
            durable.sync_folder(place.parent)
        try:
            durable.place(record, commit)
            mixed = place.stat().st_ino != inode
        except FileExistsError:
            mixed = not commit.exists() or commit.read_bytes() != record.read_bytes()
        if mixed:
            commit.unlink(missing_ok=True)
            self.manifest_path.unlink(missing_ok=True)
            raise Lost(f"two workers wrote shard {shard} of {self.site.name}; it is written again")

    def _check_finite(self, shard: int, x_TD: Tensor) -> None:
        finite = torch.isfinite(x_TD)
        if bool(finite.all()):
            return
        n_bad = int((~finite).sum())
        n_rows = int((~finite).any(1).sum())
        advice = (
            "fp16 ends at 65,504: store with --dtype bf16"
            if self.dtype is torch.float16 and not bool(x_TD.isnan().any())
            else "the model itself computes them: try --model-dtype fp32"
        )
        if has_shards(self.store.path):
            advice += ", in another folder, as this store has shards already"
        raise DataError(
            f"{n_bad:,} values of {n_rows:,} tokens are NaN or infinite at {self.site.name}, "
            f"shard {shard}; {advice}. The shard was not written; the store keeps its finished ones."
        )

    def finish(self) -> bool:
        """Merge the commits into the manifest, which makes the site readable.

        Returns: False if shards are missing or damaged, which `damaged` tells and `mend` withdraws.
        """
        if self._manifest():
            return True
        merged = self._merged()
        if merged is None:
            return False
        _put(self.manifest_path, records.content(merged), self.worker)
        if not self.lacking():
            return True
        self.manifest_path.unlink(missing_ok=True)
        return False

    def _merged(self) -> SiteManifest | None:
        """The manifest that follows from the commits; None if one is missing or damaged, or its shard is."""
        moments, shards = Moments(self.site.width), []
        for shard in range(self.store.n_shards):
            commit = self._commit(shard)
            if commit is None or self.array.problem(shard):
                return None
            mean_D, deviations_D = (decode_array(text, "f8") for text in (commit.mean, commit.deviations))
            moments.merge(commit.n_counted, mean_D, deviations_D, commit.distances)
            shards.append(commit.entry())
        return SiteManifest(
            store=self._identity,
            site=self.site.name,
            width=self.site.width,
            statistics=SiteStatistics.of(moments),
            shards=tuple(shards),
        )


def check_same_store(out: Path, there: StoreSettings | None, identity: Mapping[str, Any]) -> None:
    """Refuse to go on in a folder that was made with other settings.

    Args:
        out: the store's folder.
        there: its settings; None where there is no store, or where no copy of them is left: then the
            records of shards tell whether these are the same.
        identity: the settings now, of those that decide the content.

    Raises:
        ConfigError: some are others.
    """
    if there is not None:
        settings.check_same(there.model_dump(mode="json"), identity, out)
        return
    now = StoreSettings.made(identity, model=None, revision=None, versions={}).identity
    for file in out.glob("*/commits/*.json"):
        commit = records.if_whole(partial(records.read, file, Commit, REPAIR))
        if commit is not None and commit.store != now:
            raise ConfigError(
                f"{out} was made with other settings than these, and no copy of them is left: give those "
                "that it was made with, or another output folder, or remove that one"
            )


def write_group(out: Path, known: StoreSettings, worker: Worker) -> None:
    """Write a store's `zarr.json` where it is missing or damaged; the claim on the store is held."""
    if records.if_whole(lambda: read_settings(out)) != known:
        if sites_in(out):
            say(f"{out / 'zarr.json'} was missing or damaged and is written again")
        _put(out / "zarr.json", group_of(known), worker)


def _put(path: Path, content: Mapping[str, Any], worker: Worker) -> None:
    """Write a file of the store's own, elsewhere first, by the worker that holds the claim on the store."""
    written = worker.partial()
    durable.write_json(written, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    written.replace(path)
    durable.sync_folder(path.parent)

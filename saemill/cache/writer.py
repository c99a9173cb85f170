"""Writing one site: a shard is permuted, written, hashed, summed, and only then committed."""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saemill.cache.claims.worker import Claim, Lost, Worker
from saemill.cache.folder import has_shards, put
from saemill.cache.spare import Spare
from saemill.common import records
from saemill.common.errors import DataError, DiskError, StoreError
from saemill.common.log import say
from saemill.common.records import decode_array, encode_array
from saemill.common.stores.activations import ActivationStore, describe_site
from saemill.common.stores.forms.form import Form
from saemill.common.stores.forms.int8 import Calibration
from saemill.common.stores.norms import NormSketch, norms_from_squares
from saemill.common.stores.rounding import largest
from saemill.common.stores.shards import ShardedArray, as_numpy
from saemill.common.stores.site_records import (
    REPAIR,
    Commit,
    Site,
    SiteManifest,
    SiteRecord,
    hash_blocks,
    record_path,
    site_path,
)
from saemill.common.stores.site_roles import Role
from saemill.common.stores.statistics import Moments
from saemill.common.stores.statistics_records import SiteStatistics

ROWS_AT_ONCE = 8192
"""Stored rows decoded at a time."""
COMMIT = re.compile(r"(0|[1-9]\d{0,17})\.json")


class SiteWriter:
    """A writer of one site's shards; each shard becomes part of the store by its commit record.

    Others may be writing other shards. A shard is written by the worker that has claimed it, elsewhere,
    and is linked into its place where no other file is; then its record is, in the same way. All else is
    made by the worker that has claimed the store: a site's description is written anew where it is
    damaged, and no shard is given up for it.

    Args:
        store: the store; its settings and tokens are on disk already.
        site: where the activations come from.
        worker: this process, holding the claim on the store.

    Raises:
        StoreError: the site's folder holds another site.
    """

    def __init__(self, store: ActivationStore, site: Site, worker: Worker) -> None:
        self.store, self.site, self.worker = store, site, worker
        self.path = site_path(store.path, site.name)
        self.identity = store.settings.identity
        """Identity of the store, by which its records name it."""
        self._check_owner()
        found = records.if_whole(lambda: store.record(site.name))
        kept = found or records.if_whole(lambda: records.read(self.manifest_path, SiteManifest, REPAIR))
        self.known = SiteRecord(
            site=site.name,
            width=site.width,
            role=kept.role if kept else None,
            calibration=kept.calibration if kept else None,
            settings=store.settings,
        )
        if found != self.known:
            put(record_path(store.path, site.name), records.content(self.known), self.worker)
        self.array = self._array()
        self.removed = range(0)
        """Shards whose files were removed when all runs that follow the store had read them."""

    @property
    def form(self) -> Form:
        """Form of the site's activations."""
        return self.known.form

    @property
    def is_calibrated(self) -> bool:
        """Whether shards can be written: int8 needs a calibration first."""
        return self.known.calibration is not None or self.store.settings.dtype != "int8"

    def note(self, role: Role | None, calibration: Calibration | None = None) -> None:
        """Write down what is at the site and, unless another worker has done so already, how int8 is
        calibrated there. The caller holds the claim on the store."""
        found = records.if_whole(lambda: self.store.record(self.site.name))
        calibration = (found.calibration if found else None) or self.known.calibration or calibration
        self.known = self.known.model_copy(update={"role": role, "calibration": calibration})
        if found != self.known:
            put(record_path(self.store.path, self.site.name), records.content(self.known), self.worker)

    def write(
        self, shard: int, stored_TC: Tensor, claim: Claim, spare: Spare, batch_rows: int | None = None
    ) -> None:
        """Write and commit one shard.

        Args:
            shard: its number.
            stored_TC: stored rows in address order, on the CPU.
            claim: the right to do so.
            spare: memory for the same rows in the file's order.
            batch_rows: rows per forward pass that computed them; None where no model did, or nobody knows.

        Raises:
            DataError: some value is NaN or infinite.
            Lost: another worker took the shard over; nothing of this one's is in the store.
        """
        permuted_TC = self._permuted(shard, stored_TC, spare)
        data, record = self.worker.partial(), self.worker.partial()
        try:
            file = self.array.write_shard(shard, as_numpy(permuted_TC), data)
            records.write(record, self.record(shard, permuted_TC, *file, batch_rows))
            claim.check()
            self._publish(shard, data, record, file.xxh3)
        except OSError:
            claim.check()  # the files of a worker that was taken for dead are cleared away
            raise
        finally:
            for partial in (data, record):
                partial.unlink(missing_ok=True)

    def restore(self, shard: int, stored_TC: Tensor, xxh3: str) -> bool:
        """Write the file of a shard again, if it comes out as it was. The caller holds the claim on the
        store.

        Args:
            shard: its number.
            stored_TC: stored rows in address order, on the CPU.
            xxh3: hash of what it was.

        Returns: whether it did.
        """
        data = self.worker.partial()
        permuted_TC = self._permuted(shard, stored_TC, Spare())
        try:
            is_same = self.array.write_shard(shard, as_numpy(permuted_TC), data).xxh3 == xxh3
            if is_same:
                self.worker.place.replace(data, self.array.shard_path(shard))
        finally:
            data.unlink(missing_ok=True)
        return is_same

    def _permuted(self, shard: int, stored_TC: Tensor, spare: Spare) -> Tensor:
        """Bring stored rows from the order of addresses into that of the file."""
        places_T = torch.from_numpy(self.store.permutation(shard))
        permuted_TC = spare.empty("permuted", self.form, len(stored_TC))
        return torch.index_select(stored_TC, 0, places_T, out=permuted_TC)

    def _activations(self, stored_TC: Tensor) -> Iterator[Tensor]:
        """Decode stored rows, some at a time: what training will see."""
        return (self.form.decode(rows_TC) for rows_TC in torch.split(stored_TC, ROWS_AT_ONCE))

    def _not_finite(self, shard: int, permuted_TC: Tensor) -> DataError:
        """Refuse what the model, or the rounding to the stored type, made NaN or infinite."""
        bad = [~torch.isfinite(x_TD) for x_TD in self._activations(permuted_TC)]
        n_bad, n_rows = (sum(int(counts.sum()) for counts in each) for each in (bad, [b.any(1) for b in bad]))
        dtype = self.form.stored
        advice = (
            f"fp16 ends at {largest(dtype):,.0f}: store with --dtype bf16"
            if dtype is torch.float16 and not bool(permuted_TC.isnan().any())
            else "the model itself computes them: try --model-dtype fp32"
        )
        if has_shards(self.store.path):
            advice += ", in another folder, as this store has shards already"
        return DataError(
            f"{n_bad:,} values of {n_rows:,} tokens are NaN or infinite at {self.site.name}, "
            f"shard {shard}; {advice}. The shard was not written; the store keeps its finished ones."
        )

    def record(
        self, shard: int, permuted_TC: Tensor, n_bytes: int, xxh3: str, batch_rows: int | None
    ) -> Commit:
        """Compute the record of a shard: its file's size and hash, and sums over its training positions.

        Raises:
            DataError: some value is NaN or infinite.
        """
        from saemill.common.loops.moments import squared_norms  # numba is loaded where it is used

        square_T = np.concatenate([squared_norms(x_TD) for x_TD in self._activations(permuted_TC)])
        if not np.isfinite(square_T).all():  # squares in float64 are finite where the values are
            raise self._not_finite(shard, permuted_TC)
        sketch, norms_T = NormSketch(), norms_from_squares(square_T)
        keep = self.store.keep(shard, self.store.mask, held_out=False)
        sketch.add(norms_T[keep])
        moments = self._moments(permuted_TC, np.flatnonzero(keep))
        calibration = self.known.calibration
        return Commit(
            store=self.identity,
            site=self.site.name,
            shard=shard,
            width=self.site.width,
            n_tokens=len(permuted_TC),
            bytes=n_bytes,
            xxh3=xxh3,
            block_hashes=encode_array(hash_blocks(as_numpy(permuted_TC))),
            calibration=calibration.hash if calibration else None,
            n_counted=moments.n,
            mean=encode_array(moments.mean_D),
            deviations=encode_array(moments.deviations_D),
            distances=dict(sorted(moments.distances.items())),
            norms=encode_array(norms_T),
            lengths=sketch.counts,
            batch_rows=batch_rows,
        )

    def _moments(self, permuted_TC: Tensor, places_N: NDArray[np.int64]) -> Moments:
        """Compute the moments of some rows of a shard. Floats are read where they are; codes are decoded,
        some at a time."""
        moments = Moments(self.site.width)
        if self.form.stored == self.form.dtype:
            moments.add(permuted_TC, places_N)
            return moments
        for some_T in torch.split(torch.from_numpy(places_N), ROWS_AT_ONCE):
            moments.add(self.form.decode(permuted_TC.index_select(0, some_T)))
        return moments

    def _publish(self, shard: int, data: Path, record: Path, xxh3: str) -> None:
        """Put a shard and its record in place; `xxh3` is the shard's hash.

        A worker that was stopped after its claim was checked may find its successor's files here. It
        replaces none that has a record; where data and record are of both, the record is withdrawn. Whoever
        replaced the data last finds that out.
        """
        place, file, commit = self.worker.place, self.array.shard_path(shard), self.commit_path(shard)
        try:
            mark = place.create(data, file)
        except FileExistsError:
            if place.mark(commit) is not None:
                raise Lost(f"shard {shard} of {self.site.name} is there already") from None
            mark = place.replace(data, file)  # over a damaged one, or of a worker that died before its record
        try:
            place.create(record, commit)
            mixed = place.mark(file) not in (mark, None)  # it may be read and removed by now
        except FileExistsError:
            known = None if place.mark(commit) is None else self.commit(shard)
            mixed = known is None or (place.mark(file) == mark and known.xxh3 != xxh3)
        if mixed:
            place.remove(commit)
            place.remove(self.manifest_path)
            raise Lost(f"two workers wrote shard {shard} of {self.site.name}; it is written again")

    def finish(self) -> bool:
        """Merge the commits into the manifest, which makes the site readable.

        Returns: False if shards are missing or damaged, which `damaged` lists and `mend` withdraws.
        """
        if self.manifest():
            return True
        merged = self._merged()
        if merged is None:
            return False
        put(self.manifest_path, records.content(merged), self.worker)
        if not self.lacking():
            return True
        self.worker.place.remove(self.manifest_path)
        return False

    def _merged(self) -> SiteManifest | None:
        """Merge the commits into the manifest; None if a commit is missing or damaged, or its shard is."""
        moments, shards = Moments(self.site.width), []
        sketch: NormSketch | None = NormSketch()
        for shard in range(self.store.n_shards):
            commit = self.commit(shard)
            if commit is None or self.array.problem(shard, commit.bytes):
                return None
            mean_D, deviations_D = (decode_array(text, "f8") for text in (commit.mean, commit.deviations))
            moments.merge(commit.n_counted, mean_D, deviations_D, commit.distances)
            if commit.lengths is None or sketch is None:
                sketch = None
            else:
                sketch.merge(NormSketch(commit.lengths))
            shards.append(commit.entry())
        return SiteManifest(
            store=self.identity,
            site=self.site.name,
            width=self.site.width,
            role=self.known.role,
            calibration=self.known.calibration,
            statistics=SiteStatistics.of(moments, sketch),
            shards=tuple(shards),
        )

    def commit_path(self, shard: int) -> Path:
        """Name the record that makes a shard part of the store."""
        return self.path / "commits" / f"{shard}.json"

    @property
    def manifest_path(self) -> Path:
        """Path of the record that makes the site readable."""
        return self.path / "manifest.json"

    def _commits(self) -> dict[int, Path]:
        """List the paths of the shards' records by shard, whatever they hold."""
        matches = ((COMMIT.fullmatch(file.name), file) for file in self.path.glob("commits/*.json"))
        numbered = {int(match[1]): file for match, file in matches if match}
        return {shard: file for shard, file in sorted(numbered.items()) if shard < self.store.n_shards}

    def committed(self) -> set[int]:
        """List the shards that have a record."""
        return set(self._commits())

    def lacking(self) -> list[int]:
        """List the shards that have no record."""
        committed = self.committed()
        return [shard for shard in range(self.store.n_shards) if shard not in committed]

    def commit(self, shard: int) -> Commit | None:
        """Read the record of a shard; None unless it is whole and this shard's."""
        commit = records.if_whole(lambda: self.store.commit(self.site.name, shard))
        calibration, n_bytes = self.known.calibration, self.array.packing.file_bytes
        fits = (
            commit is not None
            and commit.width == self.site.width
            and n_bytes in (commit.bytes, None)
            and commit.calibration == (calibration.hash if calibration else None)
        )
        return commit if fits else None

    def manifest(self) -> SiteManifest | None:
        """Read the site's manifest; None unless it is whole and this site's."""
        return records.if_whole(lambda: self.store.manifest(self.known))

    def _array(self) -> ShardedArray:
        """Open the site's array; its description is written where it is missing or damaged."""
        description = describe_site(self.store.settings, self.store.n_tokens, self.site.name, self.site.width)
        try:
            return self.store.open_array(self.site.name, self.site.width)
        except DiskError:
            raise
        except StoreError as error:
            if self.path.is_dir():
                say(f"written again: {error}".removesuffix(REPAIR).rstrip())
            put(self.path / "zarr.json", description, self.worker)
        return self.store.open_array(self.site.name, self.site.width)

    def _check_owner(self) -> None:
        """Refuse a folder whose records are all of another site or store: folders were exchanged."""
        expected, owner = (self.identity, self.site.name), None
        for owner in self._owners():
            if owner == expected:
                return
        if owner is not None:
            of = f"of the site {owner[1]!r}" if owner[1] != self.site.name else "of another store"
            raise StoreError(
                f"{self.path} holds shards {of}. If folders were exchanged, rename them as they were; else "
                "remove this one. Then run the same command again"
            )

    def _owners(self) -> Iterator[tuple[str, str]]:
        """Collect the stores and sites that the records in the folder name."""
        if manifest := records.if_whole(lambda: records.read(self.manifest_path, SiteManifest, REPAIR)):
            yield manifest.store, manifest.site
        for file in self._commits().values():
            if commit := records.if_whole(partial(records.read, file, Commit, REPAIR)):
                yield commit.store, commit.site

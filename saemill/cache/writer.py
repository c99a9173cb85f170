"""Writing one site: a shard is permuted, written, hashed, summed, and only then committed."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saemill.cache.claims import Claim, Lost, Worker
from saemill.common import durable
from saemill.common.activations import (
    ActivationStore,
    decode_array,
    encode_array,
    hash_blocks,
)
from saemill.common.errors import DataError
from saemill.common.shards import ShardedArray, as_numpy
from saemill.common.sites import Site
from saemill.common.statistics import Moments

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

ZARR_LITTER = "zarr.*.partial"
"""What zarr leaves beside a `zarr.json` when it is killed while writing it."""


def has_shards(path: Path) -> bool:
    """Whether any shard of any site in a store's folder is committed."""
    return any(path.glob("*/commits/[0-9]*.json"))


class SiteWriter:
    """Writes the shards of one site; each shard becomes part of the store by its commit record.

    Others may be writing other shards. A shard is written by the worker that has claimed it, elsewhere,
    and is linked into its place where no other file is; then its record is, in the same way. Arrays and
    manifests are made by the worker that has claimed the store.

    Args:
        store: the store; its settings and tokens are on disk already.
        site: where the activations come from.
        dtype: how they are stored.
        worker: this process, holding the claim on the store.
    """

    def __init__(self, store: ActivationStore, site: Site, dtype: torch.dtype, worker: Worker) -> None:
        self.store, self.site, self.dtype, self.worker = store, site, dtype, worker
        self.path = store.path / site.name
        for litter in self.path.glob(ZARR_LITTER):
            litter.unlink()
        if (self.path / "zarr.json").exists():
            self.array = ShardedArray(self.path)
        else:
            shape = (store.n_tokens, site.width)
            attributes = {"site": site.name, "order": "permuted within each shard; see saemill"}
            self.array = ShardedArray.create(self.path, shape, store.shard_tokens, dtype, attributes)

    def commit_path(self, shard: int) -> Path:
        """The record that makes a shard part of the store."""
        return self.path / "commits" / f"{shard}.json"

    @property
    def manifest_path(self) -> Path:
        """The record that makes the site readable."""
        return self.path / "manifest.json"

    def committed(self) -> set[int]:
        """Shards that have a record."""
        return {int(file.stem) for file in self.path.glob("commits/[0-9]*.json")}

    def damaged(self) -> list[int]:
        """Shards still to be written, and those whose files are bad.

        An unfinished site is checked by file sizes, a finished one by the hashes of its files.
        """
        hashes = self.manifest_path.exists()
        return [shard for shard in range(self.store.n_shards) if not self._is_good(shard, hashes)]

    def withdraw(self, shards: list[int]) -> None:
        """Take those of some shards that are still damaged out of the store, and the site's manifest.

        The manifest goes last, so that a crash in between leaves a site whose hashes are checked again.
        """
        hashes = self.manifest_path.exists()
        bad = [shard for shard in shards if not self._is_good(shard, hashes)]
        for shard in bad:
            self.commit_path(shard).unlink(missing_ok=True)
        if bad:
            self.manifest_path.unlink(missing_ok=True)

    def _is_good(self, shard: int, hashes: bool) -> bool:
        self.worker.check_stop()
        try:
            record = durable.read_json(self.commit_path(shard)) if hashes else None
            if not self.commit_path(shard).exists() or self.array.problem(shard):
                return False
            return not record or durable.hash_file(self.array.shard_path(shard)) == record["xxh3"]
        except FileNotFoundError:  # another worker has withdrawn it
            return False

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
            durable.write_json(record, self._record(shard, permuted_TD, durable.hash_file(data)))
            claim.check()
            self._publish(shard, data, record)
        except OSError:
            claim.check()  # the files of a worker that was taken for dead are cleared away
            raise
        finally:
            for partial in (data, record):
                partial.unlink(missing_ok=True)

    def _record(self, shard: int, permuted_TD: Tensor, xxh3: str) -> dict[str, Any]:
        """What is to be known of a shard: its file's size and hash, and sums over its training positions."""
        rows = as_numpy(permuted_TD)
        moments = Moments(self.site.width)
        keep = self.store.keep(shard, self.store.mask, held_out=False)
        moments.add(permuted_TD[torch.from_numpy(keep)])
        return {
            "shard": shard,
            "n_tokens": len(rows),
            "bytes": self.array.shard_bytes,
            "xxh3": xxh3,
            "block_hashes": encode_array(hash_blocks(rows)),
            "n_counted": moments.n,
            "mean": encode_array(moments.mean_D),
            "deviations": encode_array(moments.deviations_D),
            "distances": dict(sorted(moments.distances.items())),
        }

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

        Returns: False if shards are missing or damaged; their records are withdrawn.
        """
        if self.manifest_path.exists():
            return True
        if bad := self.damaged():
            self.withdraw(bad)
            return False
        partial = self.worker.partial()
        durable.write_json(partial, self._merged())
        partial.replace(self.manifest_path)
        durable.sync_folder(self.path)
        if len(self.committed()) == self.store.n_shards:
            return True
        self.manifest_path.unlink(missing_ok=True)
        return False

    def _merged(self) -> dict[str, Any]:
        """The content of the manifest."""
        moments = Moments(self.site.width)
        shards: list[dict[str, Any]] = []
        for shard in range(self.store.n_shards):
            record = durable.read_json(self.commit_path(shard))
            mean, deviations = (decode_array(record[key], "f8") for key in ("mean", "deviations"))
            distances = {int(step): count for step, count in record["distances"].items()}
            moments.merge(record["n_counted"], mean, deviations, distances)
            shards.append({key: record[key] for key in ("n_tokens", "bytes", "xxh3", "block_hashes")})
        statistics = moments.statistics()
        return {
            "site": self.site.name,
            "statistics": {
                "n_tokens": statistics.n_tokens,
                "mean": encode_array(np.asarray(statistics.mean_D)),
                "variance": encode_array(np.asarray(statistics.variance_D)),
                "mean_squared_norm": statistics.mean_squared_norm,
                "distances": statistics.distances,
            },
            "shards": shards,
        }

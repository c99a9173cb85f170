"""Writing one site: a shard is permuted, written, hashed, summed, and only then committed."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saemill.common import durable
from saemill.common.activations import (
    ActivationStore,
    Moments,
    decode_array,
    encode_array,
    hash_blocks,
)
from saemill.common.errors import DataError
from saemill.common.shards import ShardedArray, as_numpy
from saemill.common.sites import Site

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

ZARR_LITTER = "zarr.*.partial"
"""What zarr leaves beside a `zarr.json` when it is killed while writing it."""


class SiteWriter:
    """Writes the shards of one site; each shard becomes part of the store by its commit record.

    Args:
        store: the store; its settings and tokens are on disk already.
        site: where the activations come from.
        dtype: how they are stored.
    """

    def __init__(self, store: ActivationStore, site: Site, dtype: torch.dtype) -> None:
        self.store, self.site, self.dtype = store, site, dtype
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

    def pending(self) -> list[int]:
        """Shards still to be written, and those found damaged, whose records are withdrawn.

        An unfinished site is checked by file sizes, a finished one by the hashes of its files. The
        manifest goes last, so that a crash in between leaves a site whose hashes are checked again.
        """
        finished = self.manifest_path.exists()
        shards = [i for i in range(self.store.n_shards) if not self._is_good(i, hashes=finished)]
        for shard in shards:
            self.commit_path(shard).unlink(missing_ok=True)
        if shards:
            self.manifest_path.unlink(missing_ok=True)
        return shards

    def _is_good(self, shard: int, hashes: bool) -> bool:
        if not self.commit_path(shard).exists() or self.array.problem(shard):
            return False
        record = durable.read_json(self.commit_path(shard))
        return not hashes or durable.hash_file(self.array.shard_path(shard)) == record["xxh3"]

    def write(self, shard: int, x_TD: Tensor) -> None:
        """Write and commit one shard.

        Args:
            shard: its number.
            x_TD: activations in address order, on the CPU, in the stored dtype.

        Raises:
            DataError: some value is NaN or infinite.
        """
        self._check_finite(shard, x_TD)
        order = self.store.permutation(shard)
        permuted_TD = x_TD[torch.from_numpy(order)]
        rows = as_numpy(permuted_TD)
        self.array.write_shard(shard, rows)
        moments = Moments(self.site.width)
        keep = self.store.keep(shard, self.store.mask, held_out=False)
        moments.add(permuted_TD[torch.from_numpy(keep)])
        record = {
            "shard": shard,
            "n_tokens": len(rows),
            "bytes": self.array.shard_bytes,
            "xxh3": durable.hash_file(self.array.shard_path(shard)),
            "block_hashes": encode_array(hash_blocks(rows)),
            "n_counted": moments.n,
            "mean": encode_array(moments.mean_D),
            "deviations": encode_array(moments.deviations_D),
        }
        durable.write_json(self.commit_path(shard), record)

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
        raise DataError(
            f"{n_bad:,} values of {n_rows:,} tokens are NaN or infinite at {self.site.name}, "
            f"shard {shard}; {advice}. The shard was not written; the store keeps its finished ones."
        )

    def finish(self) -> None:
        """Merge the commits into the manifest, which makes the site readable."""
        moments = Moments(self.site.width)
        shards: list[dict[str, Any]] = []
        for shard in range(self.store.n_shards):
            record = durable.read_json(self.commit_path(shard))
            mean, deviations = (decode_array(record[key], "f8") for key in ("mean", "deviations"))
            moments.merge(record["n_counted"], mean, deviations)
            shards.append({key: record[key] for key in ("n_tokens", "bytes", "xxh3", "block_hashes")})
        statistics = moments.statistics()
        durable.write_json(
            self.manifest_path,
            {
                "site": self.site.name,
                "statistics": {
                    "n_tokens": statistics.n_tokens,
                    "mean": encode_array(np.asarray(statistics.mean_D)),
                    "variance": encode_array(np.asarray(statistics.variance_D)),
                    "mean_squared_norm": statistics.mean_squared_norm,
                    "n_nonfinite": statistics.n_nonfinite,
                },
                "shards": shards,
            },
        )

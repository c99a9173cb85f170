"""A Zarr v3 array whose every chunk is one raw file that memory-maps: rows in order, offset 0.

The array has one chunk per shard (`c/<shard>/0`), the codec `bytes` (little endian) and no
compressor, so that zarr-python, zarrs and tensorstore read it as it is, while saemill reads and
writes the chunk files themselves. Zarr readers show a missing chunk as zeros; this one raises.
bfloat16 is stored as uint16 with the attribute `torch_dtype: bfloat16`, because zarr-python knows
no bfloat16 (a group with such a member cannot even be listed).
"""

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray

from saemill.common import durable
from saemill.common.errors import StoreError

MAPPED_SHARDS = 1024
"""Shards kept mapped at once per array; the kernel allows 65,530 maps per process by default."""


class ShardedArray:
    """A two-dimensional array on disk, [n_rows, width], in shards of `shard_rows` rows.

    Args:
        path: the array's folder, holding `zarr.json` and `c/`.

    Raises:
        StoreError: there is no such array, or it is not in the raw layout.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            meta = durable.read_json(path / "zarr.json")
        except FileNotFoundError:
            raise StoreError(f"no array at {path}: zarr.json is missing") from None
        codecs = [codec["name"] for codec in meta.get("codecs", ())]
        if codecs != ["bytes"]:
            raise StoreError(f"{path} is not a raw array: its codecs are {codecs}, expected ['bytes']")
        if meta["codecs"][0].get("configuration", {}).get("endian", "little") != "little":
            raise StoreError(f"{path} is not a raw array: its bytes are not little endian")
        self.n_rows, self.width = meta["shape"]
        self.shard_rows = meta["chunk_grid"]["configuration"]["chunk_shape"][0]
        self.dtype = np.dtype(meta["data_type"])
        self.torch_dtype = getattr(torch, meta["attributes"].get("torch_dtype", self.dtype.name))
        self.n_shards = math.ceil(self.n_rows / self.shard_rows)
        self.shard_bytes = self.shard_rows * self.width * self.dtype.itemsize
        self.shard = lru_cache(MAPPED_SHARDS)(self._map_shard)

    @classmethod
    def create(
        cls,
        path: Path,
        shape: tuple[int, int],
        shard_rows: int,
        dtype: torch.dtype,
        attributes: dict[str, Any],
    ) -> "ShardedArray":
        """Write the array's metadata; its shards follow by `write_shard`, in any order."""
        stored = torch.uint16 if dtype is torch.bfloat16 else dtype
        zarr.create_array(
            str(path),
            shape=shape,
            chunks=(shard_rows, shape[1]),
            dtype=str(stored).removeprefix("torch."),
            compressors=None,
            filters=None,
            fill_value=0,
            attributes=attributes | {"torch_dtype": str(dtype).removeprefix("torch.")},
            overwrite=False,
        )
        return cls(path)

    def shard_path(self, shard: int) -> Path:
        """The file of one shard."""
        return self.path / "c" / str(shard) / "0"

    def rows_in(self, shard: int) -> int:
        """Rows of a shard; the last may be short, though its file is padded to full size."""
        return int(min(self.shard_rows, self.n_rows - shard * self.shard_rows))

    def write_shard(self, shard: int, rows_TD: NDArray[Any], file: Path | None = None) -> None:
        """Write one whole shard durably.

        Args:
            shard: its number.
            rows_TD: [rows_in(shard), width] of `self.dtype`.
            file: where to, if not to its place yet.
        """
        if rows_TD.shape != (self.rows_in(shard), self.width) or rows_TD.dtype != self.dtype:
            raise ValueError(
                f"shard {shard} must be {self.rows_in(shard)} x {self.width} {self.dtype}, "
                f"got {rows_TD.shape} {rows_TD.dtype}"
            )
        raw = np.ascontiguousarray(rows_TD).data.cast("B")
        durable.write_bytes(file or self.shard_path(shard), [raw], pad_to_bytes=self.shard_bytes)
        self.shard.cache_clear()

    def problem(self, shard: int) -> str | None:
        """What is wrong with a shard's file by its size, or None."""
        try:
            size = self.shard_path(shard).stat().st_size
        except FileNotFoundError:
            return "file is missing"
        if size != self.shard_bytes:
            return f"file has {size:,} bytes, expected {self.shard_bytes:,}"
        return None

    def check_sizes(self, repair: str) -> None:
        """Refuse the array if any shard's file is missing or of the wrong size.

        Args:
            repair: the sentence that tells the user what to do, put at the message's end.

        Raises:
            StoreError: naming up to ten bad shards.
        """
        bad = [(i, problem) for i in range(self.n_shards) if (problem := self.problem(i))]
        if bad:
            lines = "\n".join(f"  {self.shard_path(i)}: {problem}" for i, problem in bad[:10])
            raise StoreError(
                f"{len(bad)} of {self.n_shards} shards of {self.path} are damaged:\n{lines}\n{repair}"
            )

    def _map_shard(self, shard: int) -> NDArray[Any]:
        if problem := self.problem(shard):
            raise StoreError(f"{self.shard_path(shard)}: {problem}")
        mapped = np.memmap(self.shard_path(shard), self.dtype, "r", shape=(self.shard_rows, self.width))
        return mapped[: self.rows_in(shard)].view(np.ndarray)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows start..stop in stored order, copied. [stop - start, width] of `self.dtype`."""
        if not 0 <= start <= stop <= self.n_rows:
            raise IndexError(f"rows must be within 0..{self.n_rows}, got {start}..{stop}")
        out = np.empty((stop - start, self.width), self.dtype)
        row = start
        while row < stop:
            shard, offset = divmod(row, self.shard_rows)
            n = min(stop - row, self.shard_rows - offset)
            out[row - start : row - start + n] = self.shard(shard)[offset : offset + n]
            row += n
        return out


def as_tensor(values: NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
    """The same memory as a torch tensor; uint16 becomes bfloat16 where `dtype` says so."""
    tensor = torch.from_numpy(values)
    return tensor.view(dtype) if tensor.dtype != dtype else tensor


def as_numpy(values: torch.Tensor) -> NDArray[Any]:
    """The same memory as a numpy array; bfloat16, unknown to numpy, becomes uint16."""
    return values.view(torch.uint16).numpy() if values.dtype is torch.bfloat16 else values.numpy()

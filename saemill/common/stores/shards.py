"""A Zarr v3 array whose every chunk is one raw file that memory-maps: rows in order, offset 0.

The array has one chunk per shard (`c/<shard>/0`), the codec `bytes` (little endian) and no
compressor, so that zarr-python, zarrs and tensorstore read it as it is, while saemill reads and
writes the chunk files themselves. Zarr readers show a missing chunk as zeros; this one raises.
bfloat16 is stored as uint16 with the attribute `torch_dtype: bfloat16`, because zarr-python knows
no bfloat16 (a group with such a member cannot even be listed).
"""

import json
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from saemill.common import durable, records
from saemill.common.errors import StoreError

MAPPED_SHARDS = 1024
"""Number of shards mapped at once per array; the kernel allows 65,530 maps per process by default."""
DAMAGED = "zarr.json is damaged"


class _Part(BaseModel):
    """A part of an array's zarr.json that is read; all else in it must be what `described` says."""

    model_config = ConfigDict(strict=True, frozen=True)


class _Chunks(_Part):
    chunk_shape: tuple[records.Positive, records.Positive]


class _Grid(_Part):
    configuration: _Chunks


class _Attributes(_Part):
    torch_dtype: Literal["bfloat16", "float16", "float32", "uint8", "uint16", "uint32"]


class _Description(_Part):
    shape: tuple[records.Positive, records.Positive]
    chunk_grid: _Grid
    attributes: _Attributes


def described(
    shape: tuple[int, int], shard_rows: int, dtype: torch.dtype, attributes: Mapping[str, Any]
) -> dict[str, Any]:
    """Describe an array in the raw layout, as `zarr.json` does."""
    stored = torch.uint16 if dtype is torch.bfloat16 else dtype
    codec = {"name": "bytes"} | ({"configuration": {"endian": "little"}} if stored.itemsize > 1 else {})
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": str(stored).removeprefix("torch."),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard_rows, shape[1]]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0 if stored.is_floating_point else 0,
        "codecs": [codec],
        "attributes": dict(attributes) | {"torch_dtype": str(dtype).removeprefix("torch.")},
    }


def differences(actual: Any, wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List where a description lacks an entry or has another value; further entries are ignored."""
    if not isinstance(actual, dict):
        return [f"{prefix.rstrip('.') or 'its content'} is {actual!r:.80}"]
    lines: list[str] = []
    for key, value in wanted.items():
        if key == "attributes":
            lines += differences(actual.get(key), value, "attributes.")
        elif durable.hash_json(actual.get(key)) != durable.hash_json(value):
            lines.append(f"{prefix}{key} is {actual.get(key)!r:.80}, expected {value!r:.80}")
    return lines


class ShardedArray:
    """A two-dimensional array on disk, [n_rows, width], in shards of `shard_rows` rows.

    Args:
        path: the array's folder, holding `zarr.json` and `c/`.
        repair: the sentence on what to do about damage, put at the end of messages.
        check: called with a shard's number and rows when it is first read; it raises if they are bad.

    Raises:
        StoreError: there is no such array, or it is not in the raw layout.
    """

    def __init__(
        self, path: Path, repair: str = "", check: Callable[[int, NDArray[Any]], None] | None = None
    ) -> None:
        self.path, self.repair, self.check = path, repair, check
        self.meta = durable.read_json(path / "zarr.json", repair)
        try:
            description = _Description.model_validate_json(json.dumps(self.meta))
        except ValidationError as error:
            raise StoreError(
                f"{path}/{DAMAGED}: {records.first_finding(error)}. {repair}".rstrip()
            ) from error
        self.n_rows, self.width = description.shape
        self.shard_rows = description.chunk_grid.configuration.chunk_shape[0]
        self.torch_dtype: torch.dtype = getattr(torch, description.attributes.torch_dtype)
        self.expect(described(description.shape, self.shard_rows, self.torch_dtype, {}))
        self.dtype = np.dtype(self.meta["data_type"])
        self.n_shards = math.ceil(self.n_rows / self.shard_rows)
        self.shard_bytes = self.shard_rows * self.width * self.dtype.itemsize
        self.shard = lru_cache(MAPPED_SHARDS)(self._map_shard)
        self._checked: set[int] = set()

    def expect(self, description: Mapping[str, Any]) -> None:
        """Make sure that `zarr.json` agrees with what is known of the array.

        Args:
            description: as `described` makes it.

        Raises:
            StoreError: naming what it says instead.
        """
        if lines := differences(self.meta, description):
            raise StoreError(f"{self.path}/{DAMAGED}: {'; '.join(lines)}. {self.repair}".rstrip())

    @classmethod
    def create(
        cls,
        path: Path,
        shape: tuple[int, int],
        shard_rows: int,
        dtype: torch.dtype,
        attributes: dict[str, Any],
    ) -> "ShardedArray":
        """Write the array's description; its shards follow by `write_shard`, in any order.

        Raises:
            StoreError: there is an array already.
        """
        if (path / "zarr.json").exists():
            raise StoreError(f"an array exists at {path} already")
        durable.write_json(path / "zarr.json", described(shape, shard_rows, dtype, attributes))
        return cls(path)

    def shard_path(self, shard: int) -> Path:
        """Name the file of one shard."""
        return self.path / "c" / str(shard) / "0"

    def rows_in(self, shard: int) -> int:
        """Count the rows of a shard; the last may be short, though its file is padded to full size."""
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
        self._checked.discard(shard)

    def problem(self, shard: int, xxh3: str | None = None) -> str | None:
        """Describe what is wrong with a shard's file by its size and, with `xxh3`, by its hash; None if
        nothing is."""
        return durable.problem(self.shard_path(shard), self.shard_bytes, xxh3)

    def check_sizes(self) -> None:
        """Refuse the array if any shard's file is missing or of the wrong size.

        Raises:
            StoreError: naming up to ten bad shards.
        """
        bad = [(i, problem) for i in range(self.n_shards) if (problem := self.problem(i))]
        if bad:
            lines = "\n".join(f"  {self.shard_path(i)}: {problem}" for i, problem in bad[:10])
            raise StoreError(
                f"{len(bad)} of {self.n_shards} shards of {self.path} are damaged:\n{lines}\n{self.repair}"
            )

    def _map_shard(self, shard: int) -> NDArray[Any]:
        file = self.shard_path(shard)
        if problem := self.problem(shard):
            raise StoreError(f"{file}: {problem}. {self.repair}".rstrip())
        with durable.reading(file, self.repair):
            mapped = np.memmap(file, self.dtype, "r", shape=(self.shard_rows, self.width))
        if self.check is not None and shard not in self._checked:
            self.check(shard, mapped)
            self._checked.add(shard)
        return mapped[: self.rows_in(shard)].view(np.ndarray)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Read rows start..stop in stored order, copied. [stop - start, width] of `self.dtype`."""
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
    """View the same memory as a torch tensor; uint16 becomes bfloat16 where `dtype` says so."""
    tensor = torch.from_numpy(values)
    return tensor.view(dtype) if tensor.dtype != dtype else tensor


def as_numpy(values: torch.Tensor) -> NDArray[Any]:
    """View the same memory as a numpy array; bfloat16, unknown to numpy, becomes uint16."""
    return values.view(torch.uint16).numpy() if values.dtype is torch.bfloat16 else values.numpy()

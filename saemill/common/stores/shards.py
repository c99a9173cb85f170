"""A Zarr v3 array whose every chunk is one file, read block by block or mapped.

The array has one chunk per shard (`c/<shard>/0`), raw or in compressed blocks (`forms.packing`), so that
zarr-python, zarrs and tensorstore read it as it is, while saemill reads and writes the chunk files
themselves. Raw, a file is the rows in order from offset 0. Zarr readers show a missing chunk as zeros; this
one raises.
bfloat16 is stored as uint16 with the attribute `torch_dtype: bfloat16`, because zarr-python knows
no bfloat16 (a group with such a member cannot even be listed).
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from saemill.common import durable, records
from saemill.common.errors import SaemillError, StoreError
from saemill.common.stores.content import FileContent
from saemill.common.stores.forms.packing import BLOCK_TOKENS, Content, packing_of
from saemill.common.stores.mirror import Mirror

MAPPED_SHARDS = 1024
"""Number of shards mapped at once per array; the kernel allows 65,530 maps per process by default."""
OPEN_FILES = 64
"""Number of shards' files open at once per array; many systems allow 1,024 per process."""
DAMAGED = "zarr.json is damaged"


class _Part(BaseModel):
    """A part of an array's zarr.json that is read; all else in it must be what `described` says."""

    model_config = ConfigDict(strict=True, frozen=True)


class _Chunks(_Part):
    chunk_shape: tuple[records.Positive, records.Positive]


class _Grid(_Part):
    configuration: _Chunks


class _Attributes(_Part):
    torch_dtype: Literal["bfloat16", "float16", "float32", "int8", "uint8", "uint16", "uint32"]


class _Description(_Part):
    shape: tuple[records.Positive, records.Positive]
    chunk_grid: _Grid
    attributes: _Attributes


def described(
    shape: tuple[int, int],
    shard_rows: int,
    dtype: torch.dtype,
    attributes: Mapping[str, Any],
    compression: str | None = None,
) -> dict[str, Any]:
    """Describe an array as `zarr.json` does; `compression` as of `packing_of`."""
    stored = torch.uint16 if dtype is torch.bfloat16 else dtype
    name = str(stored).removeprefix("torch.")
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard_rows, shape[1]]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0 if stored.is_floating_point else 0,
        "codecs": packing_of(compression, shard_rows, shape[1], np.dtype(name)).codecs,
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


class Written(NamedTuple):
    """A shard's file that was written."""

    n_bytes: int
    """Its size in bytes."""
    xxh3: str
    """Hash of its content."""


class ShardedArray:
    """A two-dimensional array on disk, [n_rows, width], in shards of `shard_rows` rows.

    Args:
        path: the array's folder, holding `zarr.json` and `c/`.
        repair: the sentence on what to do about damage, put at the end of messages.
        check: called with a shard's number and rows when it is first read whole; it raises if they are bad.
        compression: as of `packing_of`.
        mirror: the mirror that the folder is in, where the chunk files are objects; they are not mapped then.

    Raises:
        StoreError: there is no such array, or it is packed otherwise.
    """

    def __init__(
        self,
        path: Path,
        repair: str = "",
        check: Callable[[int, NDArray[Any]], None] | None = None,
        compression: str | None = None,
        mirror: Mirror | None = None,
    ) -> None:
        self.path, self.repair, self.check, self.mirror = path, repair, check, mirror
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
        self.expect(described(description.shape, self.shard_rows, self.torch_dtype, {}, compression))
        self.dtype = np.dtype(self.meta["data_type"])
        self.n_shards = math.ceil(self.n_rows / self.shard_rows)
        self.packing = packing_of(compression, self.shard_rows, self.width, self.dtype)
        self.content = lru_cache(OPEN_FILES)(self._open_content)
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

    def shard_name(self, shard: int) -> str:
        """Say where a shard lies: its file, or the address of its object."""
        path = self.shard_path(shard)
        return str(path) if self.mirror is None else self.mirror.name_of(path)

    def rows_in(self, shard: int) -> int:
        """Count the rows of a shard; the last may be short, though its file is padded to full size."""
        return int(min(self.shard_rows, self.n_rows - shard * self.shard_rows))

    @property
    def raw_bytes(self) -> int:
        """Bytes of a shard before compression."""
        return int(self.shard_rows * self.width * self.dtype.itemsize)

    def write_shard(self, shard: int, rows_TD: NDArray[Any], file: Path | None = None) -> "Written":
        """Write one whole shard durably.

        Args:
            shard: its number.
            rows_TD: [rows_in(shard), width] of `self.dtype`.
            file: where to, if not to its place yet.

        Returns: size and hash of the file, from what is in memory.
        """
        if rows_TD.shape != (self.rows_in(shard), self.width) or rows_TD.dtype != self.dtype:
            raise ValueError(
                f"shard {shard} must be {self.rows_in(shard)} x {self.width} {self.dtype}, "
                f"got {rows_TD.shape} {rows_TD.dtype}"
            )
        packed = self.packing.pack(rows_TD)
        pad_to_bytes = self.packing.file_bytes or 0
        buffers = [*packed.blocks, packed.tail]
        durable.write_bytes(file or self.shard_path(shard), buffers, pad_to_bytes)
        self.content.cache_clear()
        self.shard.cache_clear()
        self._checked.discard(shard)
        return Written(*durable.hash_buffers(buffers, pad_to_bytes))

    def problem(self, shard: int, n_bytes: int | None = None, xxh3: str | None = None) -> str | None:
        """Describe what is wrong with a shard's file; None if nothing is.

        Args:
            shard: its number.
            n_bytes: its size; None for that of every raw shard.
            xxh3: its hash; without it content is not read.
        """
        n_bytes = n_bytes or self.packing.file_bytes
        assert n_bytes is not None, "files of compressed shards differ in size"
        problem = durable.problem if self.mirror is None else self.mirror.problem
        return problem(self.shard_path(shard), n_bytes, xxh3)

    def check_sizes(self, sizes: Sequence[int | None] | None = None) -> None:
        """Refuse the array if any shard's file is missing or of the wrong size.

        Args:
            sizes: bytes of each shard's file; None for those of raw shards.

        Raises:
            StoreError: naming up to ten bad shards.
        """
        known = sizes or [None] * self.n_shards
        bad = [(i, problem) for i in range(self.n_shards) if (problem := self.problem(i, known[i]))]
        if bad:
            lines = "\n".join(f"  {self.shard_name(i)}: {problem}" for i, problem in bad[:10])
            raise StoreError(f"{len(bad)} of {self.n_shards} shards are damaged:\n{lines}\n{self.repair}")

    def _open_content(self, shard: int) -> Content:
        """Open the file of a shard, or its object."""
        if self.packing.file_bytes and (problem := self.problem(shard)):
            raise StoreError(f"{self.shard_name(shard)}: {problem}. {self.repair}".rstrip())
        file = self.shard_path(shard)
        return FileContent(file, self.repair) if self.mirror is None else self.mirror.content(file)

    def _map_shard(self, shard: int) -> NDArray[Any]:
        """Map the rows of a raw shard."""
        file = self.shard_path(shard)
        if problem := self.problem(shard):
            raise StoreError(f"{file}: {problem}. {self.repair}".rstrip())
        with durable.reading(file, self.repair):
            mapped = np.memmap(file, self.dtype, "r", shape=(self.shard_rows, self.width)).view(np.ndarray)
        if self.check is not None and shard not in self._checked:
            self.check(shard, mapped)
            self._checked.add(shard)
        return mapped[: self.rows_in(shard)]

    def n_blocks(self, shard: int) -> int:
        """Count the blocks of a shard; the last may be short."""
        return -(-self.rows_in(shard) // BLOCK_TOKENS)

    def block(self, shard: int, block: int) -> NDArray[Any]:
        """Read a block of stored rows, into memory of their own.

        Raises:
            StoreError: the file is missing, of the wrong size, or holds no such block.
        """
        n_rows = min(BLOCK_TOKENS, self.rows_in(shard) - block * BLOCK_TOKENS)
        content = self.content(shard)
        try:
            return self.packing.unpack(self.packing.span(content, block, n_rows), n_rows)
        except SaemillError:
            raise
        except ValueError as error:
            self.forget(shard)
            name = self.shard_name(shard)
            raise StoreError(f"{name}: block {block} is damaged: {error}. {self.repair}".rstrip()) from error

    def forget(self, shard: int) -> None:
        """Keep nothing of a shard that was read over the network and is not as it was written: it may have
        changed on the way."""
        if self.mirror is not None:
            self.mirror.forget(self.shard_path(shard))

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

"""The file of a shard: blocks of 256 stored rows, raw or compressed, so that any block is read alone.

Raw, the file is the rows from offset 0, padded with zeros to a full shard. Compressed, it is that of Zarr's
sharding codec: each block is an inner chunk, compressed by Blosc and followed by its CRC-32C; the index at
the end says where each begins and how long it is. Zarr readers read both.

Of a file's content only its length and slices are taken, each of which is read when it is asked for.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import google_crc32c
import numcodecs.blosc
import numpy as np
from numpy.typing import NDArray

BLOCK_TOKENS = 256
"""Rows per block: the unit of reading, of checksums and of compression."""
Compression = Literal["lz4", "zstd"]
CODECS: dict[str, dict[str, Any]] = {
    "lz4": {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle"},
    "zstd": {"cname": "zstd", "clevel": 3, "shuffle": "shuffle"},
}
"""Blosc's settings, as `zarr.json` has them. Chosen by `benchmarks/cache/forms.py`: bits that are
shuffled help lz4, and hide from zstd the few exponents that it would code in fewer bits."""
SHUFFLES = {"shuffle": numcodecs.blosc.SHUFFLE, "bitshuffle": numcodecs.blosc.BITSHUFFLE}
CRC_BYTES = 4
ENTRY_BYTES = 16
"""Bytes of an entry of the index: offset and length, both uint64."""
ABSENT = np.uint64(2**64 - 1)
"""Offset and length of a block that the file has not."""
SIZE_PLACE = slice(12, 16)
"""Where the header of Blosc's blocks holds their length."""

# With several threads Blosc puts the parts of a block in the order in which they are done.
numcodecs.blosc.use_threads = False


class Content(Protocol):
    """The content of a shard's file."""

    def __len__(self) -> int: ...

    def __getitem__(self, span: slice, /) -> NDArray[np.uint8]: ...


class Packed(NamedTuple):
    """The content of a shard's file."""

    blocks: Sequence[bytes | memoryview]
    tail: bytes
    """What follows the blocks."""


class Packing(Protocol):
    """What turns a shard's stored rows into the content of its file, and blocks of it into rows."""

    @property
    def file_bytes(self) -> int | None:
        """Size of every shard's file, padded; None where sizes differ."""

    @property
    def codecs(self) -> list[dict[str, Any]]:
        """Zarr's description."""

    def pack(self, rows_TC: NDArray[Any]) -> Packed:
        """Make the content of a shard's file; the last shard's rows may be fewer."""

    def span(self, content: Content, block: int, n_rows: int) -> NDArray[np.uint8]:
        """Find a block, of `n_rows` rows, in a file's content.

        Raises:
            ValueError: the content tells of none.
        """

    def unpack(self, content: NDArray[np.uint8], n_rows: int) -> NDArray[Any]:
        """Read the first rows of a block from its content. [n_rows, C].

        Raises:
            ValueError: the content is not what `pack` makes.
        """


def packing_of(compression: str | None, shard_rows: int, columns: int, dtype: np.dtype[Any]) -> Packing:
    """Make the packing of an array; `compression` is a `Compression`, or None."""
    if compression is None:
        return Raw(shard_rows, columns, dtype)
    return Compressed(shard_rows, columns, dtype, compression)


def rows_per_shard(shard_tokens: int, n_rows: int, ctx_len: int, compression: str | None) -> int:
    """Choose how many whole rows of text a shard holds: no more than there are; compressed they fill whole
    blocks, as Zarr's inner chunks must.

    Args:
        shard_tokens: about as many tokens.
        n_rows: rows of the store.
        ctx_len: tokens per row.
        compression: as of `packing_of`.
    """
    unit = 1 if compression is None else BLOCK_TOKENS // math.gcd(ctx_len, BLOCK_TOKENS)
    asked = max(1, shard_tokens // ctx_len // unit)
    return unit * min(asked, -(-n_rows // unit))


def _bytes_codec(dtype: np.dtype[Any]) -> dict[str, Any]:
    return {"name": "bytes"} | ({"configuration": {"endian": "little"}} if dtype.itemsize > 1 else {})


@dataclass(frozen=True)
class Raw:
    """Rows as they are."""

    shard_rows: int
    columns: int
    dtype: np.dtype[Any]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.columns * self.dtype.itemsize

    @property
    def file_bytes(self) -> int:
        """Bytes of every shard's file."""
        return self.shard_rows * self.row_bytes

    @property
    def codecs(self) -> list[dict[str, Any]]:
        """Zarr's description."""
        return [_bytes_codec(self.dtype)]

    def pack(self, rows_TC: NDArray[Any]) -> Packed:
        """Cut rows into blocks; see `Packing`."""
        raw = np.ascontiguousarray(rows_TC).data.cast("B")
        size = BLOCK_TOKENS * self.row_bytes
        return Packed([raw[start : start + size] for start in range(0, len(raw), size)], b"")

    def span(self, content: Content, block: int, n_rows: int) -> NDArray[np.uint8]:
        """Find a block; see `Packing`."""
        start = block * BLOCK_TOKENS * self.row_bytes
        return content[start : start + n_rows * self.row_bytes]

    def unpack(self, content: NDArray[np.uint8], n_rows: int) -> NDArray[Any]:
        """View a block's content as rows; see `Packing`."""
        return content.view(self.dtype).reshape(n_rows, self.columns)


@dataclass(frozen=True)
class Compressed:
    """Blocks compressed one by one, and an index of them."""

    shard_rows: int
    columns: int
    dtype: np.dtype[Any]
    compression: str
    file_bytes: None = None

    def __post_init__(self) -> None:
        assert self.shard_rows % BLOCK_TOKENS == 0, "Zarr divides shards into whole inner chunks"

    @property
    def codecs(self) -> list[dict[str, Any]]:
        """Zarr's description."""
        blosc = {"typesize": self.dtype.itemsize, "blocksize": 0} | CODECS[self.compression]
        crc = {"name": "crc32c"}
        inner = [_bytes_codec(self.dtype), {"name": "blosc", "configuration": blosc}, crc]
        return [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [BLOCK_TOKENS, self.columns],
                    "codecs": inner,
                    "index_codecs": [_bytes_codec(np.dtype("u8")), crc],
                    "index_location": "end",
                },
            }
        ]

    @property
    def _blosc(self) -> Any:
        settings = CODECS[self.compression]
        return numcodecs.blosc.Blosc(settings["cname"], settings["clevel"], SHUFFLES[settings["shuffle"]])

    def pack(self, rows_TC: NDArray[Any]) -> Packed:
        """Compress the blocks; see `Packing`."""
        blocks, blosc = [], self._blosc
        index = np.full((self.shard_rows // BLOCK_TOKENS, 2), ABSENT)
        offset = 0
        for number, start in enumerate(range(0, len(rows_TC), BLOCK_TOKENS)):
            whole = np.zeros((BLOCK_TOKENS, self.columns), self.dtype)  # Zarr's inner chunks are never short
            part = rows_TC[start : start + BLOCK_TOKENS]
            whole[: len(part)] = part
            content = blosc.encode(whole)
            blocks.append(content + _crc(content))
            index[number] = offset, len(blocks[-1])
            offset += len(blocks[-1])
        entries = index.astype("<u8").tobytes()
        return Packed(blocks, entries + _crc(entries))

    def span(self, content: Content, block: int, n_rows: int) -> NDArray[np.uint8]:
        """Find a block by the index; see `Packing`. Its own checksum tells what the index got wrong."""
        n_blocks = self.shard_rows // BLOCK_TOKENS
        start = len(content) - CRC_BYTES - (n_blocks - block) * ENTRY_BYTES
        if start < 0:
            raise ValueError("the file is shorter than its index")
        offset, size = np.frombuffer(content[start : start + ENTRY_BYTES].tobytes(), "<u8").tolist()
        if not offset + size <= len(content):
            raise ValueError("the index names bytes beyond the file")
        return content[offset : offset + size]

    def unpack(self, content: NDArray[np.uint8], n_rows: int) -> NDArray[Any]:
        """Decompress a block whose checksum is right; see `Packing`."""
        packed, crc = content[:-CRC_BYTES].tobytes(), content[-CRC_BYTES:].tobytes()
        if _crc(packed) != crc:
            raise ValueError("its checksum differs")
        if int.from_bytes(packed[SIZE_PLACE], "little") != len(packed):
            raise ValueError("it is not of the length that it says")
        rows_BC = np.empty((BLOCK_TOKENS, self.columns), self.dtype)
        try:
            self._blosc.decode(packed, out=rows_BC)
        except RuntimeError as error:
            raise ValueError(f"Blosc cannot read it: {error}") from error
        return rows_BC[:n_rows]


def _crc(content: bytes) -> bytes:
    """Compute the CRC-32C of some bytes, as Zarr's codec appends it."""
    checksum: int = google_crc32c.value(content)
    return checksum.to_bytes(CRC_BYTES, "little")

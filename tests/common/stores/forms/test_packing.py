"""Compressed shards: every Zarr reader reads them, any block alone, and damage is told by every reader."""

import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import changed_bytes
from numpy.typing import NDArray

from saemill.common import durable
from saemill.common.errors import StoreError
from saemill.common.stores.forms.packing import packing_of, rows_per_shard
from saemill.common.stores.shards import ShardedArray, described

KINDS = {torch.bfloat16: "uint16", torch.float16: "float16", torch.float32: "float32", torch.int8: "int8"}


def stored_rows(n_rows: int, columns: int, dtype: torch.dtype, seed: int) -> NDArray[np.generic]:
    """Rows that compress: bits of few values, and of some rows any."""
    kind = np.dtype(KINDS[dtype])
    generator = np.random.default_rng(seed)
    content = generator.integers(0, 3, (n_rows, columns * kind.itemsize), np.uint8)
    content[::7] = generator.integers(0, 256, content[::7].shape, np.uint8)
    return content.view(kind)


def written(
    path: Path, rows: NDArray[np.generic], shard_rows: int, dtype: torch.dtype, by: str
) -> ShardedArray:
    """A compressed array. Oracle of what is returned: the files."""
    shape = (rows.shape[0], rows.shape[1])
    durable.write_json(path / "zarr.json", described(shape, shard_rows, dtype, {}, by))
    array = ShardedArray(path, compression=by)
    for shard in range(array.n_shards):
        written = array.write_shard(shard, rows[shard * shard_rows : (shard + 1) * shard_rows])
        file = array.shard_path(shard)
        assert written == (file.stat().st_size, durable.hash_file(file))
    return array


def with_tensorstore(path: Path) -> NDArray[np.generic]:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
    return np.asarray(tensorstore.open(spec, read=True).result().read().result())


@given(
    shape=st.tuples(st.integers(1, 1100), st.integers(1, 9), st.sampled_from([256, 512, 1024])),
    dtype=st.sampled_from(list(KINDS)),
    by=st.sampled_from(["lz4", "zstd"]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=40)
def test_every_reader_reads_the_same(
    shape: tuple[int, int, int], dtype: torch.dtype, by: str, seed: int
) -> None:
    """Oracle: the rows that were written, read back by zarr-python, tensorstore and block by block."""
    n_rows, columns, shard_rows = shape
    rows = stored_rows(n_rows, columns, dtype, seed)
    with tempfile.TemporaryDirectory() as folder:
        array = written(Path(folder) / "a", rows, shard_rows, dtype, by)
        blocks = [array.block(s, b) for s in range(array.n_shards) for b in range(array.n_blocks(s))]
        assert np.concatenate(blocks).tobytes() == rows.tobytes()
        assert {len(block) for block in blocks[:-1]} <= {256}
        for found in (zarr.open_array(str(array.path), mode="r")[:], with_tensorstore(array.path)):
            assert (np.asarray(found).dtype, np.asarray(found).tobytes()) == (rows.dtype, rows.tobytes())


def test_bytes_do_not_depend_on_threads() -> None:
    """Oracle: the same rows packed again and again; Blosc with several threads puts parts in any order."""
    rows = stored_rows(256, 9000, torch.float32, 0)
    packing = packing_of("lz4", 256, 9000, rows.dtype)
    first = packing.pack(rows)
    assert all(packing.pack(rows) == first for _ in range(10))


@pytest.mark.parametrize("by", ["lz4", "zstd"])
def test_changed_bytes_are_told_and_crash_nothing(by: str, tmp_path: Path) -> None:
    """Oracle: each block is read as it was written, or refused; 300 changes of any of the file's bytes."""
    rows = stored_rows(700, 8, torch.bfloat16, 1)
    array = written(tmp_path / "a", rows, 1024, torch.bfloat16, by)
    whole, chance = array.shard_path(0).read_bytes(), random.Random(0)
    n_told = 0
    for _ in range(300):
        array.shard_path(0).write_bytes(changed_bytes(whole, chance))
        array.content.cache_clear()
        for block in range(3):
            try:
                found = array.block(0, block)
            except StoreError:
                n_told += 1
            else:
                assert found.tobytes() == rows[block * 256 : (block + 1) * 256].tobytes()
    assert n_told > 200


def test_an_empty_file_is_told(tmp_path: Path) -> None:
    """Oracle: the sentence; zarr-python reads zeros there."""
    array = written(tmp_path / "a", stored_rows(300, 4, torch.bfloat16, 0), 512, torch.bfloat16, "lz4")
    array.shard_path(0).write_bytes(b"")
    array.content.cache_clear()
    with pytest.raises(StoreError, match="c/0/0: block 0 is damaged: the file is shorter than its index"):
        array.block(0, 0)
    array.shard_path(0).unlink()
    array.content.cache_clear()
    with pytest.raises(StoreError, match="c/0/0: file is missing"):
        array.block(0, 0)


def test_another_packing_is_refused(tmp_path: Path) -> None:
    """Oracle: the codecs that each is described by."""
    written(tmp_path / "a", stored_rows(300, 4, torch.bfloat16, 0), 512, torch.bfloat16, "lz4")
    for other in (None, "zstd"):
        with pytest.raises(StoreError, match="codecs is"):
            ShardedArray(tmp_path / "a", compression=other)


@given(
    shard_tokens=st.integers(1, 10**6),
    n_rows=st.integers(1, 3000),
    ctx_len=st.integers(1, 2048),
    by=st.sampled_from([None, "lz4"]),
)
def test_shards_hold_whole_rows_and_blocks(
    shard_tokens: int, n_rows: int, ctx_len: int, by: str | None
) -> None:
    """Oracle: divisibility; no more rows than asked for or needed, but for one block's worth."""
    rows = rows_per_shard(shard_tokens, n_rows, ctx_len, by)
    assert rows >= 1
    if by is None:
        assert rows == max(1, min(n_rows, shard_tokens // ctx_len))
        return
    least = 256 // int(np.gcd(256, ctx_len))
    assert rows * ctx_len % 256 == 0
    assert rows % least == 0
    assert rows * ctx_len <= max(shard_tokens, least * ctx_len)
    assert rows < n_rows + least
    assert rows + least > min(n_rows, shard_tokens // ctx_len)

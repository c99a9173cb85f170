"""ShardedArray: what it writes, every Zarr reader reads; what is damaged is never read as zeros."""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import torch
import xxhash
import zarr
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from saemill.common import durable
from saemill.common.errors import StoreError
from saemill.common.stores.shards import ShardedArray, as_numpy, as_tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.uint8, torch.uint16, torch.uint32)
STORED = {
    torch.bfloat16: "uint16",
    torch.float16: "float16",
    torch.float32: "float32",
    torch.uint8: "uint8",
    torch.uint16: "uint16",
    torch.uint32: "uint32",
}
shapes = st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 45))


def random_bits(n_rows: int, width: int, dtype: torch.dtype, seed: int) -> NDArray[np.generic]:
    """Any bit patterns, NaNs and infinities included, as the stored numpy type."""
    stored = np.dtype(STORED[dtype])
    content = np.random.default_rng(seed).bytes(n_rows * width * stored.itemsize)
    return np.frombuffer(content, stored).reshape(n_rows, width)


def write(path: Path, rows: NDArray[np.generic], shard_rows: int, dtype: torch.dtype) -> ShardedArray:
    """An array with its shards written last to first. Oracle of what is returned: the files."""
    array = ShardedArray.create(path, (rows.shape[0], rows.shape[1]), shard_rows, dtype, {"note": "x"})
    for shard in reversed(range(array.n_shards)):
        written = array.write_shard(shard, rows[shard * shard_rows : (shard + 1) * shard_rows])
        file = array.shard_path(shard)
        assert written == (file.stat().st_size, durable.hash_file(file))
    return array


def read_tensorstore(path: Path) -> NDArray[np.generic]:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
    return tensorstore.open(spec, read=True).result().read().result()


def same_bits(found: NDArray[np.generic], expected: NDArray[np.generic]) -> bool:
    return (found.dtype, found.shape, found.tobytes()) == (
        expected.dtype,
        expected.shape,
        expected.tobytes(),
    )


@pytest.fixture
def array(tmp_path: Path) -> ShardedArray:
    """Ten rows of three in shards of four; no value is zero."""
    rows = np.arange(1, 31, dtype=np.float32).reshape(10, 3)
    return write(tmp_path / "a", rows, 4, torch.float32)


@settings(max_examples=60)
@given(shapes, st.sampled_from(DTYPES), st.integers(0, 2**32))
def test_every_reader_reads_the_same(shape: tuple[int, int, int], dtype: torch.dtype, seed: int) -> None:
    """Oracle: the rows that were written, read back by zarr-python, tensorstore and ShardedArray."""
    n_rows, width, shard_rows = shape
    rows = random_bits(n_rows, width, dtype, seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "group" / "a"
        zarr.create_group(str(path.parent))
        write(path, rows, shard_rows, dtype)
        array = ShardedArray(path)
        assert same_bits(array.read(0, n_rows), rows)
        assert same_bits(zarr.open_array(str(path), mode="r")[:], rows)
        assert same_bits(read_tensorstore(path), rows)
        assert [name for name, _ in zarr.open_group(str(path.parent), mode="r").arrays()] == ["a"]
        assert array.torch_dtype == dtype
        assert zarr.open_array(str(path), mode="r").attrs["note"] == "x"


@settings(max_examples=40)
@given(shapes, st.sampled_from(DTYPES), st.integers(0, 2**32))
def test_chunk_files_are_raw(shape: tuple[int, int, int], dtype: torch.dtype, seed: int) -> None:
    """Oracle: each file holds its rows' bytes from offset 0 and then zeros up to a full shard."""
    n_rows, width, shard_rows = shape
    rows = random_bits(n_rows, width, dtype, seed)
    with tempfile.TemporaryDirectory() as folder:
        array = write(Path(folder) / "a", rows, shard_rows, dtype)
        files = sorted(file for file in (array.path / "c").rglob("*") if file.is_file())
        assert files == sorted(array.path / "c" / str(i) / "0" for i in range(-(-n_rows // shard_rows)))
        for i in range(array.n_shards):
            part = rows[i * shard_rows : (i + 1) * shard_rows]
            full = shard_rows * width * rows.dtype.itemsize
            assert array.shard_path(i).read_bytes() == part.tobytes().ljust(full, b"\0")
            assert same_bits(array.shard(i), part)
            assert array.rows_in(i) == len(part)
            assert array.problem(i) is None


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.integers(0, 10), second=st.integers(0, 10))
def test_read_any_rows(array: ShardedArray, first: int, second: int) -> None:
    """Oracle: numpy slices of the rows; the copy can be written to."""
    start, stop = sorted((first, second))
    found = array.read(start, stop)
    assert np.array_equal(found, np.arange(1, 31, dtype=np.float32).reshape(10, 3)[start:stop])
    found[:] = 0


@pytest.mark.parametrize(("start", "stop"), [(0, 11), (9, 12), (10, 11), (-1, 2), (3, 2)])
def test_read_beyond_the_rows(array: ShardedArray, start: int, stop: int) -> None:
    """Oracle: rows that do not exist are an error, not the padding or a repeated last row."""
    with pytest.raises(IndexError, match=r"rows must be within 0\.\.10"):
        array.read(start, stop)


def test_read_beyond_a_short_shard(tmp_path: Path) -> None:
    """Oracle: with one row in the last shard, reading two must not repeat it."""
    array = write(tmp_path / "a", np.ones((5, 2), np.uint8), 4, torch.uint8)
    with pytest.raises(IndexError):
        array.read(4, 6)


@pytest.mark.parametrize("shard", [0, 1, 2])
@pytest.mark.parametrize("damage", ["missing", "truncated", "longer"])
def test_damage_is_an_error(array: ShardedArray, shard: int, damage: str) -> None:
    """Oracle: the other shards read as written; the damaged one is refused by path everywhere."""
    file = array.shard_path(shard)
    if damage == "missing":
        file.unlink()
    else:
        os.truncate(file, 47 if damage == "truncated" else 49)
    expected = {"missing": "file is missing", "truncated": "47 bytes, expected 48", "longer": "49 bytes"}[
        damage
    ]
    fresh = ShardedArray(array.path, "repair it")
    reads = (lambda: fresh.shard(shard), lambda: fresh.read(0, 10), fresh.check_sizes)
    for read in reads:
        with pytest.raises(StoreError, match=expected) as caught:
            read()
        assert str(file) in str(caught.value)
    with pytest.raises(StoreError, match=r"1 of 3 shards are damaged:\n.*\nrepair it"):
        fresh.check_sizes()
    assert fresh.problem(shard) is not None
    for other in {0, 1, 2} - {shard}:
        assert fresh.problem(other) is None
        assert fresh.shard(other).all(), "no value of the array is zero"


def test_check_sizes_of_a_whole_array(array: ShardedArray) -> None:
    """Oracle: a complete array passes; one with no shard written fails for each of them."""
    array.check_sizes()
    empty = ShardedArray.create(array.path.with_name("b"), (30, 1), 2, torch.uint8, {})
    with pytest.raises(StoreError, match="15 of 15 shards") as caught:
        empty.check_sizes()
    assert str(caught.value).count("file is missing") == 10, "at most ten are listed"


@pytest.mark.parametrize(
    ("shard", "shape", "dtype"),
    [
        (0, (4, 3), "float64"),
        (0, (4, 3), "int32"),
        (0, (3, 3), "float32"),
        (0, (4, 4), "float32"),
        (0, (12,), "float32"),
        (2, (4, 3), "float32"),
        (3, (4, 3), "float32"),
    ],
)
def test_wrong_rows_are_refused(array: ShardedArray, shard: int, shape: tuple[int, ...], dtype: str) -> None:
    """Oracle: only [rows of the shard, 3] of float32 is accepted; the files stay as they were."""
    before = {file: file.read_bytes() for file in array.path.rglob("0") if file.is_file()}
    with pytest.raises(ValueError, match=f"shard {shard} must be"):
        array.write_shard(shard, np.zeros(shape, dtype))
    assert {file: file.read_bytes() for file in array.path.rglob("0") if file.is_file()} == before


def test_strided_rows_are_written_in_order(tmp_path: Path) -> None:
    """Oracle: a transposed view is written as its rows read, not as its memory lies."""
    rows = np.arange(12, dtype=np.uint16).reshape(3, 4).T
    assert np.array_equal(write(tmp_path / "a", rows, 4, torch.uint16).read(0, 4), rows)


def test_rewritten_shard_is_read_anew(array: ShardedArray) -> None:
    """Oracle: after a shard was read and written again, the new rows are read."""
    assert array.shard(1)[0, 0] == 13
    array.write_shard(1, np.full((4, 3), 7, np.float32))
    assert array.shard(1)[0, 0] == 7
    assert array.read(3, 5)[:, 0].tolist() == [10, 7]


def test_create_does_not_overwrite(array: ShardedArray) -> None:
    """Oracle: an existing array is an error and keeps its rows."""
    with pytest.raises(Exception, match="exists"):
        ShardedArray.create(array.path, (1, 1), 1, torch.uint8, {})
    assert ShardedArray(array.path).read(9, 10).tolist() == [[28, 29, 30]]


def test_not_a_raw_array(array: ShardedArray, tmp_path: Path) -> None:
    """Oracle: nothing there, a group, a compressed and a big-endian array each get their own refusal."""
    with pytest.raises(StoreError, match=r"absent/zarr\.json: file is missing"):
        ShardedArray(tmp_path / "absent")
    zarr.create_group(str(tmp_path / "group"))
    zarr.create_array(str(tmp_path / "packed"), shape=(4, 4), chunks=(2, 4), dtype="uint8")
    for name, told in (("group", "shape"), ("packed", "torch_dtype")):
        with pytest.raises(StoreError, match=rf"{name}/zarr\.json is damaged: .*{told}"):
            ShardedArray(tmp_path / name)
    meta = json.loads((array.path / "zarr.json").read_text())
    assert meta["codecs"] == [{"name": "bytes", "configuration": {"endian": "little"}}]
    meta["codecs"][0]["configuration"]["endian"] = "big"
    (array.path / "zarr.json").write_text(json.dumps(meta))
    with pytest.raises(StoreError, match=r"codecs is .*'big'.*expected .*'little'"):
        ShardedArray(array.path)
    (array.path / "zarr.json").write_text(json.dumps(meta)[:40])
    with pytest.raises(StoreError, match=r"zarr\.json is damaged"):
        ShardedArray(array.path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_share_memory(dtype: torch.dtype) -> None:
    """Oracle: torch's own view of the same bits; a change through one side is seen on the other."""
    bits = np.random.default_rng(0).bytes(24 * dtype.itemsize)
    tensor = torch.frombuffer(bytearray(bits), dtype=dtype).reshape(4, 6)
    stored = as_numpy(tensor)
    assert stored.dtype == STORED[dtype]
    assert stored.tobytes() == bits
    back = as_tensor(stored, dtype)
    assert back.dtype == dtype
    assert back.data_ptr() == tensor.data_ptr()


def test_bfloat16_values_survive(tmp_path: Path) -> None:
    """Oracle: the tensor itself, through as_numpy, the disk and as_tensor."""
    tensor = torch.randn(7, 5).to(torch.bfloat16)
    array = write(tmp_path / "a", as_numpy(tensor), 3, torch.bfloat16)
    assert torch.equal(as_tensor(array.read(0, 7), array.torch_dtype), tensor)


def test_replacing_keeps_the_old_file(tmp_path: Path) -> None:
    """Oracle: the old bytes, when the block raises after it wrote; the next attempt succeeds."""
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def half() -> None:
        with durable.replacing(path) as partial:
            partial.write_bytes(b"ne")
            assert path.read_bytes() == b"old", "nothing is replaced before the block ends"
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        half()
    assert path.read_bytes() == b"old"
    with durable.replacing(path) as partial:
        partial.write_bytes(b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_replacing_leaves_no_new_file(tmp_path: Path) -> None:
    """Oracle: when the parts fail half way, there is no file of that name."""

    def parts() -> Iterator[bytes]:
        yield b"half"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        durable.write_bytes(tmp_path / "new" / "file", parts())
    assert not (tmp_path / "new" / "file").exists()


def test_flushed_before_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the order of calls: the file's fsync while the name is still absent, then the folder's."""
    path, seen = tmp_path / "file", []
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        seen.append((str(Path(f"/proc/self/fd/{descriptor}").readlink()), path.exists()))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    durable.write_bytes(path, [b"x"])
    assert seen == [(str(tmp_path / ".file.partial"), False), (str(tmp_path), True)]


@given(st.lists(st.binary(max_size=20), max_size=5), st.integers(0, 60))
def test_write_bytes(parts: list[bytes], pad: int) -> None:
    """Oracle: the parts joined, with zeros up to the padded size."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        durable.write_bytes(path, parts, pad_to_bytes=pad)
        assert path.read_bytes() == b"".join(parts).ljust(pad, b"\0")


def test_place(tmp_path: Path) -> None:
    """Oracle: the bytes; a file that is there stays, and its own second name is no other file."""
    finished, path = tmp_path / "finished", tmp_path / "new" / "file"
    finished.write_bytes(b"mine")
    durable.place(finished, path)
    durable.place(finished, path)
    assert path.read_bytes() == b"mine"
    finished.unlink()
    finished.write_bytes(b"other")
    with pytest.raises(FileExistsError):
        durable.place(finished, path)
    assert path.read_bytes() == b"mine"


def test_json(tmp_path: Path) -> None:
    """Oracle: the value itself; NaN is refused and leaves the old file; broken text is a StoreError."""
    path = tmp_path / "value.json"
    durable.write_json(path, {"a": [1, None, "ü"]})
    assert durable.read_json(path) == {"a": [1, None, "ü"]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        durable.write_json(path, {"a": float("nan")})
    assert durable.read_json(path) == {"a": [1, None, "ü"]}
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(StoreError, match=r"value\.json is damaged"):
        durable.read_json(path)


@given(st.binary(max_size=200), st.integers(0, 199), st.integers(1, 255))
def test_hash_file(content: bytes, place: int, flip: int) -> None:
    """Oracle: xxhash over the whole content, however small the pieces; a changed byte changes it."""
    assume(place < len(content))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "READ_BYTES", 7)
        path = Path(folder) / "file"
        path.write_bytes(content)
        assert durable.hash_file(path) == xxhash.xxh3_64_hexdigest(content)
        path.write_bytes(content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :])
        assert durable.hash_file(path) != xxhash.xxh3_64_hexdigest(content)


def test_hash_json() -> None:
    """Oracle: xxhash of JSON text written by hand; the order of keys is no part of a fingerprint."""
    assert durable.hash_json({"b": 1, "a": [True, None]}) == xxhash.xxh3_64_hexdigest(
        b'{"a": [true, null], "b": 1}'
    )
    assert durable.hash_json({"a": [True, None], "b": 1}) == durable.hash_json({"b": 1, "a": [True, None]})
    assert durable.hash_json({"a": [None, True], "b": 1}) != durable.hash_json({"b": 1, "a": [True, None]})


def test_hash_folder(tmp_path: Path) -> None:
    """Oracle: the same for the same files in any order and any place; other for a renamed or changed one."""
    for place in ("one", "two"):
        (tmp_path / place / "sub").mkdir(parents=True)
        (tmp_path / place / "a").write_text("a")
        (tmp_path / place / "sub" / "b").write_text("b")
    one, two = ([tmp_path / place / "a", tmp_path / place / "sub" / "b"] for place in ("one", "two"))
    fingerprint = durable.hash_folder(tmp_path / "one", one)
    assert durable.hash_folder(tmp_path / "two", two[::-1]) == fingerprint
    two[1].rename(tmp_path / "two" / "b")
    assert durable.hash_folder(tmp_path / "two", [two[0], tmp_path / "two" / "b"]) != fingerprint
    one[0].write_text("c")
    assert durable.hash_folder(tmp_path / "one", one) != fingerprint
    assert durable.folder_bytes(tmp_path / "one") == 2


def test_a_folder_has_one_writer_at_a_time(tmp_path: Path) -> None:
    """Oracle: a second entry is refused while the first lasts, and allowed after it, even after an error."""
    with durable.exclusive(tmp_path / "x"):
        second = durable.exclusive(tmp_path / "x")
        with pytest.raises(StoreError, match="another process is writing"):
            second.__enter__()
        with durable.exclusive(tmp_path / "y"):
            pass
    with pytest.raises(ValueError, match="inside"), durable.exclusive(tmp_path / "x"):
        raise ValueError("inside")
    with durable.exclusive(tmp_path / "x"):
        assert list((tmp_path / "x").iterdir()) == []

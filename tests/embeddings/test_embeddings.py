"""Stored embeddings: every kind of source, and the texts and ids that come with the vectors."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from importing import Floats, read, table, taken, vectors, with_texts

from saemill.common.errors import ConfigError, DataError
from saemill.common.stores.activations import SHUFFLE_KEY
from saemill.common.stores.passages import PassageStore
from saemill.common.stores.permutation import permutation
from saemill.show import problems


# Formats: each writes x to a folder and says what to import, with which options.
def write_parquet(x: Floats, folder: Path) -> tuple[Path, dict[str, Any]]:
    pq.write_table(table(x), folder / "x.parquet", row_group_size=7)
    return folder / "x.parquet", {}


def write_fixed(x: Floats, folder: Path) -> tuple[Path, dict[str, Any]]:
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
    pq.write_table(pa.table({"v": fixed, "other": [0] * len(x)}), folder / "x.parquet")
    return folder, {"site": "embedding"}


def write_feather(x: Floats, folder: Path) -> tuple[Path, dict[str, Any]]:
    pyarrow.feather.write_feather(table(x), str(folder / "x.arrow"), chunksize=5, compression="uncompressed")
    return folder / "x.arrow", {}


def write_stream(x: Floats, folder: Path) -> tuple[Path, dict[str, Any]]:
    with pa.ipc.new_stream(folder / "x.arrow", table(x).schema) as stream:
        stream.write_table(table(x), max_chunksize=3)
    return folder / "x.arrow", {}


def write_jsonl(x: Floats, folder: Path) -> tuple[Path, dict[str, Any]]:
    with gzip.open(folder / "x.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"embedding": row.tolist()}) + "\n\n" for row in x)
    return folder / "x.jsonl.gz", {}


def write_npy(x: Floats, folder: Path) -> tuple[Path, dict[str, Any]]:
    np.save(folder / "x.npy", x)
    return folder / "x.npy", {}


def write_npz(x: Floats, folder: Path) -> tuple[Path, dict[str, Any]]:
    np.savez_compressed(folder / "x.npz", other=x[:1], wanted=x)
    return folder / "x.npz", {"column": "wanted", "site": "embedding"}


def write_raw(x: Floats, folder: Path) -> tuple[Path, dict[str, Any]]:
    x.tofile(folder / "x.bin")
    raw_dtype = {"float16": "fp16", "float32": "fp32", "float64": "fp64"}[x.dtype.name]
    return folder / "x.bin", {"width": x.shape[1], "raw_dtype": raw_dtype}


def write_pt(x: Floats, folder: Path) -> tuple[Path, dict[str, Any]]:
    torch.save({"n": 3, "wanted": torch.from_numpy(x)}, folder / "x.pt")
    return folder / "x.pt", {}


def write_safetensors(x: Floats, folder: Path) -> tuple[Path, dict[str, Any]]:
    half = len(x) // 2
    parts = [x] if half == 0 else [x[:half], x[half:]]
    for number, part in zip((2, 10), parts, strict=False):
        tensor = torch.from_numpy(part.copy())
        safetensors.torch.save_file({"embedding": tensor}, folder / f"part-{number}.safetensors")
    return folder / "part-*.safetensors", {}


def write_saved(x: Floats, folder: Path) -> tuple[Path, dict[str, Any]]:
    datasets.Dataset(table(x)).save_to_disk(folder / "saved")
    return folder / "saved", {}


FORMATS: list[Callable[[Floats, Path], tuple[Path, dict[str, Any]]]] = [
    write_parquet, write_fixed, write_feather, write_stream, write_jsonl, write_npy, write_npz, write_raw,
    write_pt, write_safetensors, write_saved,
]  # fmt: skip


@pytest.mark.parametrize("write", FORMATS)
@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 40),
    d=st.integers(1, 6),
    shard_rows=st.integers(1, 50),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
    stored=st.sampled_from([None, "bf16", "fp16", "fp32"]),
    normalize=st.booleans(),
)
def test_what_is_read_back_is_what_was_written(
    write: Callable[[Floats, Path], tuple[Path, dict[str, Any]]],
    tmp_path_factory: pytest.TempPathFactory,
    n: int,
    d: int,
    shard_rows: int,
    dtype: str,
    stored: str | None,
    normalize: bool,
) -> None:
    """Oracle: numpy's and torch's casts of the matrix that was written."""
    folder = tmp_path_factory.mktemp("source")
    x = vectors(n, d, seed=n).astype(dtype)
    source, options = write(x, folder)
    options |= {"dtype": stored, "normalize": normalize, "shard_rows": shard_rows}
    store = taken(source, folder / "acts", held_out_fraction=0, **options)
    as_it_comes = "fp16" if dtype == "float16" and not normalize and write is not write_jsonl else "fp32"
    expected = torch.from_numpy(
        x / np.linalg.norm(x.astype(float), axis=1, keepdims=True) if normalize else x
    )
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[stored or as_it_comes]
    found = store.read("embedding", 0, n)
    assert found.dtype is kind
    if normalize:
        torch.testing.assert_close(found, expected.to(kind))
    else:
        assert torch.equal(found, expected.to(kind))
    assert store.n_shards == -(-n // min(n, shard_rows))
    assert problems(folder / "acts") == []


def test_plain_zarr_finds_each_row_at_its_documented_place(tmp_path: Path) -> None:
    """Oracle: zarr-python and the documented permutation."""
    x = vectors(20, 3)
    source, _ = write_npy(x, tmp_path)
    taken(source, tmp_path / "acts", shard_rows=8)
    array = zarr.open_group(tmp_path / "acts", mode="r")["embedding"]
    for shard in range(3):
        rows = x[shard * 8 : (shard + 1) * 8]
        stored = np.asarray(array[shard * 8 : (shard + 1) * 8])  # type: ignore[index]
        np.testing.assert_array_equal(stored, rows[permutation(len(rows), SHUFFLE_KEY, shard)])


def test_files_come_in_natural_order_and_max_rows_takes_the_first(tmp_path: Path) -> None:
    """Oracle: the matrices in the order 1, 2, 10."""
    parts = {number: vectors(5, 3, seed=number) for number in (10, 1, 2)}
    for number, part in parts.items():
        np.save(tmp_path / f"x{number}.npy", part)
    expected = np.concatenate([parts[1], parts[2], parts[10]])
    np.testing.assert_array_equal(read(taken(tmp_path, tmp_path / "a")), expected)
    np.testing.assert_array_equal(
        read(taken(tmp_path / "x*.npy", tmp_path / "b", max_rows=12)), expected[:12]
    )


def test_texts_beside_the_vectors_or_joined_by_id_are_the_same(tmp_path: Path) -> None:
    """Oracle: the lists that were written; copies on one side; the share that is held out by a hash."""
    _, texts = with_texts(tmp_path)
    beside = taken(tmp_path / "both.parquet", tmp_path / "a", held_out_fraction=0.3)
    joined = taken(
        tmp_path / "ids.parquet", tmp_path / "b", texts=str(tmp_path / "apart.parquet"), held_out_fraction=0.3
    )
    for store in (beside, joined):
        passages = store.text
        assert isinstance(passages, PassageStore)
        assert passages.texts(0, 60) == texts
        assert passages.passage(7) == ("993", texts[7])
        held_out = {text: bool(side) for text, side in zip(texts, passages.held_out_R, strict=True)}
        assert [held_out[text] for text in texts] == passages.held_out_R.tolist()
        assert 5 < passages.held_out_R.sum() < 35
        documents = passages.document_of(np.arange(60))
        assert all(
            (documents[i] == documents[j]) == (texts[i] == texts[j]) for i in range(60) for j in range(60)
        )
    np.testing.assert_array_equal(beside.text.held_out_R, joined.text.held_out_R)


def test_sides_follow_from_ids_or_vectors_where_there_are_no_texts(tmp_path: Path) -> None:
    """Oracle: equal ids, or equal vectors, are on one side; another order changes no side."""
    x = vectors(400, 4)
    x[200:] = x[:200]
    np.save(tmp_path / "x.npy", x)
    by_vector = taken(tmp_path / "x.npy", tmp_path / "a", held_out_fraction=0.5).text.held_out_R
    assert 120 < by_vector.sum() < 280
    np.testing.assert_array_equal(by_vector[:200], by_vector[200:])
    np.save(tmp_path / "y.npy", x[::-1])
    turned = taken(tmp_path / "y.npy", tmp_path / "b", held_out_fraction=0.5).text.held_out_R
    np.testing.assert_array_equal(turned[::-1], by_vector)
    pq.write_table(table(vectors(400, 4), id=list(range(200)) * 2), tmp_path / "x.parquet")
    by_id = taken(tmp_path / "x.parquet", tmp_path / "c", held_out_fraction=0.5).text
    np.testing.assert_array_equal(by_id.held_out_R[:200], by_id.held_out_R[200:])
    assert "hash of their ids" in by_id.how_held_out


def test_texts_by_order_where_the_vectors_have_no_ids(tmp_path: Path) -> None:
    """Oracle: the list that was written; a list of another length is refused."""
    np.save(tmp_path / "x.npy", vectors(5, 3))
    lines = [json.dumps({"text": f"t{i}", "id": i}) + "\n" for i in range(5)]
    (tmp_path / "t.jsonl").write_text("".join(lines))
    texts = str(tmp_path / "t.jsonl")
    passages = taken(tmp_path / "x.npy", tmp_path / "a", texts=texts).text
    assert isinstance(passages, PassageStore)
    assert [passages.passage(i) for i in range(5)] == [(str(i), f"t{i}") for i in range(5)]
    taken(tmp_path / "x.npy", tmp_path / "b", texts=texts, max_rows=3)
    (tmp_path / "t.jsonl").write_text("".join(lines[:4]))
    with pytest.raises(DataError, match="has 4 texts, fewer than there are embeddings"):
        taken(tmp_path / "x.npy", tmp_path / "c", texts=texts)
    (tmp_path / "t.jsonl").write_text("".join([*lines, lines[0]]))
    with pytest.raises(DataError, match="has more texts than there are embeddings"):
        taken(tmp_path / "x.npy", tmp_path / "d", texts=texts)


def test_ids_that_do_not_match_are_refused(tmp_path: Path) -> None:
    """Oracle: the messages name the id."""
    with_texts(tmp_path, 6)
    apart = pq.read_table(tmp_path / "apart.parquet").sort_by([("id", "descending")])

    def join(other: pa.Table) -> None:
        pq.write_table(other, tmp_path / "other.parquet")
        taken(tmp_path / "ids.parquet", tmp_path / "out", texts=str(tmp_path / "other.parquet"))

    with pytest.raises(DataError, match=r"row 4 has the id 996, which .*other.parquet lacks"):
        join(apart.filter(pa.compute.not_equal(apart["id"], 996)))
    with pytest.raises(DataError, match=r"the id 1000 occurs twice"):
        join(pa.concat_tables([apart, apart]))
    with pytest.raises(ConfigError, match=r"has ids, .* has no column 'id' to join by; it has text"):
        join(apart.select(["text"]))
    with pytest.raises(ConfigError, match="has no column 'text'; name one with --text-column"):
        join(apart.select(["id"]))

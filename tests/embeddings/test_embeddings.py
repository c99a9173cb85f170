"""Stored embeddings: every kind of source, what is refused, crashes, and training and assessing on them."""

import gzip
import json
import signal
import subprocess
import sys
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
from crashes import check_crashes, file_hashes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launching import ENVIRONMENT
from numpy.typing import NDArray
from stores import make_tokens
from typer.testing import CliRunner
from waiting import wait_until

from saemill import cli
from saemill.assess.report import contexts_text
from saemill.assess.run import AssessConfig
from saemill.assess.run import run as assess
from saemill.cache.run import CacheConfig
from saemill.cache.run import run as cache
from saemill.common.errors import ConfigError, DataError, SaemillError, StoreError
from saemill.common.sae.sae import Sae
from saemill.common.stores.activations import SHUFFLE_KEY, ActivationStore
from saemill.common.stores.passages import PassageStore
from saemill.common.stores.permutation import permutation
from saemill.embeddings.run import ImportConfig, run
from saemill.show import describe, problems
from saemill.train.config import TrainConfig
from saemill.train.run import run as train

Floats = NDArray[np.floating[Any]]


def vectors(n: int, d: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def table(x: Floats, **columns: Any) -> pa.Table:
    return pa.table({"embedding": pa.array(list(x)), **columns})


def taken(source: Path | str, out: Path, **options: Any) -> ActivationStore:
    return run(ImportConfig(source=str(source), out=out, **options))


def read(store: ActivationStore, site: str = "embedding") -> NDArray[Any]:
    return store.read(site, 0, store.n_tokens).float().numpy()


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
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


# Texts and ids


def with_texts(folder: Path, n: int = 60) -> tuple[NDArray[np.float32], list[str]]:
    """A table of ids 1000, 999, … and texts, every third of which is a copy."""
    texts = [f"text {i - i % 3 if i % 3 == 1 else i}" for i in range(n)]
    x = vectors(n, 4)
    ids = [1000 - i for i in range(n)]
    pq.write_table(table(x, id=ids, text=texts), folder / "both.parquet")
    pq.write_table(table(x, id=ids), folder / "ids.parquet")
    order = np.random.default_rng(3).permutation(n)
    apart = pa.table({"text": texts, "id": ids}).take(order)
    pq.write_table(apart, folder / "apart.parquet")
    return x, texts


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


# What is refused


def npy(x: Any) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        np.save(folder / "x.npy", x)
        return str(folder / "x.npy")

    return write


def lists(*rows: Any, kind: pa.DataType | None = None, **columns: Any) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        array = pa.array(rows, kind or pa.list_(pa.float32()))
        pq.write_table(pa.table({"embedding": array, **columns}), folder / "x.parquet")
        return str(folder / "x.parquet")

    return write


def text(name: str, content: str) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / name).write_text(content)
        return str(folder / name)

    return write


def changed(x: Floats, row: int, value: float) -> Floats:
    x = x.copy()
    x[row, 1] = value
    return x


X = vectors(6, 3)
REFUSED: dict[str, tuple[Callable[[Path], str], dict[str, Any], str]] = {
    "nan": (npy(changed(X, 4, np.nan)), {}, "row 4 has NaN or infinite values"),
    "inf": (npy(changed(X, 2, np.inf)), {}, "row 2 has NaN or infinite values"),
    "beyond": (npy(changed(X, 3, 1e6)), {"dtype": "fp16"}, "row 3 has values beyond float16.*--dtype fp32"),
    "zero": (npy(X * (np.arange(6) != 5)[:, None]), {"normalize": True}, "row 5 is zero"),
    "ints": (npy(np.ones((3, 2), np.int64)), {}, r"must hold a matrix of floats.*got \(3, 2\) of int64"),
    "one axis": (npy(np.ones(3)), {}, r"must hold a matrix of floats.*got \(3,\)"),
    "fortran": (npy(np.asfortranarray(X)), {}, "column by column; save np.ascontiguousarray"),
    "key": (npy(X), {"column": "a"}, "--column has no effect on .*, which holds one array"),
    "width": (npy(X), {"width": 3}, "--width has no effect on npy files"),
    "split": (npy(X), {"split": "train"}, "--split has no effect on files"),
    "ids": (npy(X), {"id_column": "id"}, "--id-column has no effect on npy files"),
    "torn npy": (text("x.npy", "no"), {}, "cannot read .*x.npy"),
    "torn pt": (text("x.pt", "no"), {}, "cannot read .*x.pt .*no other objects"),
    "torn npz": (text("x.npz", "no"), {}, "cannot read .*x.npz"),
    "torn parquet": (text("x.parquet", "no"), {}, "cannot read .*x.parquet"),
    "torn arrow": (text("x.arrow", "no"), {}, "cannot read .*x.arrow"),
    "torn tensors": (text("x.safetensors", "no"), {}, "cannot read .*x.safetensors"),
    "raw": (text("x.bin", "1234567"), {"width": 1, "raw_dtype": "fp32"}, "has 7 bytes, which are no whole"),
    "raw type": (text("x.bin", "12345678"), {"width": 1}, "raw rows need both --width and --raw-dtype"),
    "unknown": (text("x.bin", "12345678"), {}, "of no kind that is known .*--width and --raw-dtype"),
    "ragged": (lists([1, 2], [1, 2], [1]), {}, "row 2 has 1 values, the rows before it 2"),
    "null": (lists([1, 2], None), {}, "row 1 has no vector"),
    "null value": (lists([1, 2], [1, 2], [1, None]), {}, "row 2 has a value that is null"),
    "list of ints": (lists([1, 2], kind=pa.list_(pa.int32())), {"column": "embedding"}, "lists of floats"),
    "no column": (lists([1.0]), {"column": "embeding"}, "no column 'embeding'; did you mean embedding"),
    "no ids": (lists([1.0]), {"id_column": "key"}, "no column 'key'; it has embedding"),
    "null text": (lists([1.0], [1.0], text=["a", None]), {}, "row 1 has no 'text'"),
    "none": (lists(kind=pa.list_(pa.float32())), {}, "holds no passages"),
    "bad json": (text("x.jsonl", '{"embedding": [1.5]}\n{"embed\n'), {}, r"row 1 \(.*, line 2\) is no JSON"),
    "json words": (text("x.jsonl", '{"embedding": [1.5]}\n{"embedding": ["a"]}'), {}, "row 1 is no list"),
    "json lacks": (text("x.jsonl", '{"embedding": [1.5]}\n{"text": "a"}'), {}, "row 1 .* no 'embedding'"),
    "no vectors": (text("x.jsonl", '{"text": "a"}'), {}, "no column of float lists.*Name one with --column"),
    "no path": (lambda folder: str(folder / "gone"), {}, "no file or folder"),
    "fraction": (npy(X), {"held_out_fraction": 1.0}, r"held_out_fraction must be in \[0, 1\)"),
    "max rows": (npy(X), {"max_rows": 0}, "max_rows must be 1 or more"),
    "site": (npy(X), {"site": "tokens"}, "'tokens' cannot be the name of a site"),
}  # fmt: skip


@pytest.mark.parametrize(("write", "options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_taken_is_refused(
    write: Callable[[Path], str], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Oracle: the messages; nothing is left that another import would stumble over."""
    with pytest.raises(SaemillError, match=message):
        taken(write(tmp_path), tmp_path / "acts", **options)
    assert not list((tmp_path / "acts").glob("*"))


def test_several_arrays_or_kinds_are_told(tmp_path: Path) -> None:
    """Oracle: the names that were written."""
    np.savez(tmp_path / "x.npz", first=X, second=X)
    with pytest.raises(ConfigError, match="or the one that --column names; it holds first, second"):
        taken(tmp_path / "x.npz", tmp_path / "a")
    with pytest.raises(ConfigError, match="has no array 'third'; it holds first, second"):
        taken(tmp_path / "x.npz", tmp_path / "a", column="third")
    np.save(tmp_path / "x.npy", X)
    with pytest.raises(ConfigError, match=r"several kinds \(npy, npz\); choose by a glob"):
        taken(tmp_path, tmp_path / "a")
    np.save(tmp_path / "y.npy", vectors(6, 4))
    with pytest.raises(DataError, match=r"y.npy holds rows of 4 torch.float32, .*x.npy of 3"):
        taken(tmp_path / "*.npy", tmp_path / "a")


def test_a_store_of_other_things_is_left_alone(tmp_path: Path, tiny_models: dict[str, str]) -> None:
    """Oracle: the messages, and the store's files as they were."""
    np.save(tmp_path / "x.npy", X)
    out = tmp_path / "acts"
    taken(tmp_path / "x.npy", out)
    before = file_hashes(out)
    with pytest.raises(ConfigError, match="normalize: there False, now True"):
        taken(tmp_path / "x.npy", out, normalize=True)
    with pytest.raises(ConfigError, match="dtype: there 'fp32', now 'bf16'"):
        taken(tmp_path / "x.npy", out, dtype="bf16")
    np.save(tmp_path / "x.npy", X + 1)
    with pytest.raises(ConfigError, match=r"is not what .* was made of, or has changed since"):
        taken(tmp_path / "x.npy", out)
    tokens = make_tokens(tmp_path / "tokens", 4, 16)
    with pytest.raises(ConfigError, match="holds embeddings; choose another folder"):
        cache(CacheConfig(tokens=tokens.path, model=tiny_models["neox"], out=out, layers=(0,)))
    assert file_hashes(out) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(StoreError, match=r"holds other files \(notes.txt\)"):
        taken(tmp_path / "x.npy", tmp_path / "full")


# Killed


def test_a_crash_at_any_step_leaves_a_store_that_is_finished_later(tmp_path: Path) -> None:
    """Oracle: the store of a run without a crash, file by file, for a crash before each disk operation."""
    with_texts(tmp_path, 20)
    options = {"texts": str(tmp_path / "apart.parquet"), "shard_rows": 8}
    source = tmp_path / "ids.parquet"
    check_crashes(lambda out: taken(source, out, **options), tmp_path)


def test_a_killed_import_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """Oracle: the store of a run that nobody killed, file by file."""
    np.save(tmp_path / "x.npy", vectors(1000, 8))
    taken(tmp_path / "x.npy", tmp_path / "whole", shard_rows=10)
    out = tmp_path / "torn"
    command = [
        sys.executable, "-m", "saemill", "import-activations", str(tmp_path / "x.npy"), "-o", str(out),
        "--shard-rows", "10",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    wait_until(lambda: len(list(out.glob("*/commits/*.json"))) >= 20, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "embedding" / "manifest.json").exists()
    taken(tmp_path / "x.npy", out, shard_rows=10)
    assert file_hashes(out) == file_hashes(tmp_path / "whole")


@pytest.mark.parametrize(
    "damaged",
    [["embedding/c/0/0", "embedding/c/2/0"], ["passages/passages.parquet"]],
    ids=["shards", "texts"],
)
def test_damage_is_named_refused_and_mended(damaged: list[str], tmp_path: Path) -> None:
    """Oracle: the store before the damage."""
    with_texts(tmp_path)
    out = tmp_path / "acts"
    taken(tmp_path / "both.parquet", out, shard_rows=16)
    whole = file_hashes(out)
    for name in damaged:
        content = bytearray((out / name).read_bytes())
        content[40] ^= 1
        (out / name).write_bytes(content)
    assert sum("differs from its hash" in problem for problem in problems(out)) == len(damaged)
    (out / damaged[0]).write_bytes((out / damaged[0]).read_bytes()[:-1])
    with pytest.raises(StoreError, match="damaged"):
        ActivationStore(out).site("embedding")
    taken(tmp_path / "both.parquet", out, shard_rows=16)
    assert file_hashes(out) == whole


# Trained and assessed


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 embeddings, sums of 2 of 24 directions, with texts that name them; a run trained on them."""
    folder = tmp_path_factory.mktemp("planted")
    generator = np.random.default_rng(0)
    directions = np.linalg.qr(generator.standard_normal((24, 24)))[0]
    which = np.array([generator.choice(24, 2, replace=False) for _ in range(2000)])
    x = (generator.uniform(1, 2, (2000, 2, 1)) * directions[which]).sum(1) + 3
    texts = [f"<about> {a} and {b}, number {i % 1900}" for i, (a, b) in enumerate(which)]
    texts[1900:], x[1900:] = texts[:100], x[:100]
    pq.write_table(
        table(x.astype(np.float32), text=texts, id=[f"p{i}" for i in range(2000)]), folder / "x.parquet"
    )
    taken(folder / "x.parquet", folder / "acts", shard_rows=512)
    train(
        TrainConfig(
            acts=folder / "acts", out=folder / "run", site=("embedding",), k=(2, 4), num_latents=(48,),
            batch_size=128, epochs=60, lr=(3e-3,), device="cpu",
        )
    )  # fmt: skip
    return folder


def sparsest(planted: Path) -> Path:
    (folder,) = (planted / "run").glob("embedding-k2-*")
    return folder


def test_features_show_the_passages_where_they_fire_most(planted: Path, tmp_path: Path) -> None:
    """Oracle: every passage encoded, the strongest of each latent taken, copies of a text once."""
    assessment = assess(
        AssessConfig(run=planted / "run", out=tmp_path, device="cpu", latents=(5,), n_contexts=3)
    )
    features = assessment["features"]
    source = pq.read_table(planted / "x.parquet")
    x = np.stack(source["embedding"].to_pylist()).astype(np.float32)
    texts, ids = source["text"].to_pylist(), source["id"].to_pylist()
    encoded = Sae.load(planted / "run" / features["variant"]).encode(x)
    dense = torch.zeros(2000, 48).scatter_(1, encoded.top_indices, encoded.top_acts.detach())
    assert features["latents"][0]["latent"] == 5
    assert len(features["latents"]) >= 12
    for latent in features["latents"]:
        strongest: dict[str, float] = {}
        for row in dense[:, latent["latent"]].argsort(descending=True, stable=True).tolist():
            if dense[row, latent["latent"]] > 0:
                strongest.setdefault(texts[row], float(dense[row, latent["latent"]]))
        expected = list(strongest.items())[:3]
        assert [context["text"] for context in latent["contexts"]] == [name for name, _ in expected]
        for context, (_, activation) in zip(latent["contexts"], expected, strict=True):
            assert context["activation"] == pytest.approx(activation, rel=1e-4)
            assert texts[ids.index(context["id"])] == context["text"] == texts[context["address"]]
    shown = contexts_text(features, 1, 1)
    first = features["latents"][0]["contexts"][0]
    assert f"[{first['id']}] {first['text']}" in shown
    assert "of passages" in shown
    page = (tmp_path / "report.html").read_text()
    assert first["text"].replace("<", "&lt;").replace(">", "&gt;") in page
    assert "<about>" not in page


def test_passages_without_texts_are_shown_by_id_or_row() -> None:
    """Oracle: the formats of the line; an id of the source, or its row."""
    for id_, shown in (("p7", "[p7] "), (None, "[passage 7] ")):
        context = {"activation": 1.5, "address": 7, "id": id_, "text": None}
        latent = {"latent": 3, "density": 0.1, "contexts": [context]}
        features = {"variant": "v", "searched": "all", "unit": "passage", "latents": [latent]}
        assert contexts_text(features, 1, 1).endswith(f"       1.50  {shown}")


def test_figures_are_those_of_the_held_out_passages(planted: Path, tmp_path: Path) -> None:
    """Oracle: FVU by numpy over the held-out rows; no losses, with the reason; planted directions found."""
    assessment = assess(AssessConfig(run=planted / "run", out=tmp_path, device="cpu", n_latents=0))
    store = ActivationStore(planted / "acts")
    held_out = torch.from_numpy(store.text.held_out_R)
    x = store.read("embedding", 0, 2000)[held_out]
    assert 120 < len(x) < 280
    for entry in assessment["variants"]:
        with torch.no_grad():
            error = Sae.load(planted / "run" / entry["name"])(x).reconstruction - x
        fvu = float(error.double().square().sum() / (x.double() - x.double().mean(0)).square().sum())
        assert entry["metrics"]["fvu"]["value"] == pytest.approx(fvu, rel=1e-4)
        assert fvu < 0.15
        for name in ("loss_recovered", "delta_ce"):
            figure = entry["metrics"][name]
            assert (figure["value"], figure["reason"]) == (None, "embeddings have no language model")
        assert entry["verdict"].endswith("/2, 2 unknown")  # nor can dead latents be told on so few passages
    data = assessment["data"]
    assert data["unit"] == "passage"
    assert (
        data["n_tokens"]
        == len(x)
        > data["n_documents"]
        == len(
            {t for t, h in zip(store.text.texts(0, 2000), held_out, strict=True) if h}  # type: ignore[union-attr]
        )
    )
    assert (
        "those held out when the store was made (10%, chosen by a hash of their texts)"
        in (tmp_path / "report.html").read_text()
    )
    statistics = store.site("embedding").statistics
    training = store.read("embedding", 0, 2000)[~held_out].double()
    torch.testing.assert_close(statistics.mean_D, training.mean(0))
    assert statistics.n_tokens == len(training)


def test_what_needs_a_model_or_tokens_is_refused(planted: Path, tmp_path: Path) -> None:
    """Oracle: the messages."""
    with pytest.raises(ConfigError, match="model has no effect on embeddings"):
        assess(AssessConfig(run=planted / "run", model="gpt2"))
    with pytest.raises(ConfigError, match="tokens has no effect on embeddings"):
        assess(AssessConfig(run=planted / "run", tokens=tmp_path))
    with pytest.raises(StoreError, match="holds embeddings of passages, without tokens"):
        _ = ActivationStore(planted / "acts").tokens
    arguments = ["train", str(planted / "acts"), "--site", "embedding", "-o", str(tmp_path / "r")]
    with pytest.raises(ConfigError, match="passages have no positions or tokens that a mask could leave out"):
        CliRunner().invoke(cli.app, [*arguments, "--set", "mask.first_positions=1"], catch_exceptions=False)
    taken(planted / "x.parquet", tmp_path / "all", held_out_fraction=0)
    train(
        TrainConfig(
            acts=tmp_path / "all", out=tmp_path / "run", site=("embedding",), k=(2,), num_latents=(8,),
            batch_size=1000, device="cpu",
        )
    )  # fmt: skip
    with pytest.raises(
        ConfigError, match="no held-out passages; make the store with --held-out-fraction above 0"
    ):
        assess(AssessConfig(run=tmp_path / "run"))


def test_show_tells_the_store_and_the_sae_its_provenance(planted: Path) -> None:
    """Oracle: the settings it was made with."""
    lines = describe(planted / "acts").splitlines()
    n_held_out = int(ActivationStore(planted / "acts").text.held_out_R.sum())
    assert lines[1] == f"  embeddings of {planted / 'x.parquet'}, stored as fp32"
    assert lines[2] == f"  2,000 passages, {n_held_out} of them held out; 4 shards of 512"
    assert lines[4].endswith(f"over {2000 - n_held_out:,} training passages")
    with pytest.raises(StoreError, match=r"these are the passages of .*acts; name that"):
        describe(planted / "acts" / "passages")
    provenance = Sae.load(sparsest(planted)).config.provenance
    assert (provenance["dataset"], provenance["normalized"]) == (str(planted / "x.parquet"), False)
    assert provenance["model"] is None


def test_an_sae_encodes_arrays(planted: Path) -> None:
    """Oracle: the same rows as a tensor."""
    sae = Sae.load(sparsest(planted))
    x = ActivationStore(planted / "acts").read("embedding", 0, 10)
    features = sae.encode(x)
    for form in (x.numpy(), x.numpy().astype(np.float64), x.tolist(), list(x.numpy())):
        assert torch.equal(sae.encode(form).top_indices, features.top_indices)
        assert torch.equal(sae.encode(form).top_acts, features.top_acts)
    assert torch.equal(sae.encode(x.tolist()[3]).top_acts, sae.encode(x[3]).top_acts)
    with pytest.raises(DataError, match=r"must have 24 values each, the last axis; got the shape \(10, 23\)"):
        sae.encode(x[:, :23])
    with pytest.raises(DataError, match="must be a tensor or an array of numbers"):
        sae.encode(["some text"])

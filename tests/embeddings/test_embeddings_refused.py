"""Embeddings that cannot be taken, and imports that are killed or damaged."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from crashes import check_crashes, file_hashes
from importing import Floats, taken, vectors, with_texts
from launching import ENVIRONMENT
from stores import make_tokens
from waiting import wait_until

from saemill.cache.config import CacheConfig
from saemill.cache.run import run as cache
from saemill.common.errors import ConfigError, DataError, SaemillError, StoreError
from saemill.common.stores.activations import ActivationStore
from saemill.embeddings.config import ImportConfig
from saemill.embeddings.run import outlook, run
from saemill.show import problems


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
    """Oracle: the messages, of the dry run too; nothing is left that another import would stumble over."""
    source = write(tmp_path)
    for action in (outlook, run):
        with pytest.raises(SaemillError, match=message):
            action(ImportConfig(source=source, out=tmp_path / "acts", **options))
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

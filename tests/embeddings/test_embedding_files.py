"""Files of embeddings that are damaged or hold other things: sentences, and a store or nothing."""

import gzip
import io
import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from embedding_files import X, write_all
from mutations import changed_bytes

from saemill.common.errors import SaemillError
from saemill.embeddings.config import ImportConfig
from saemill.embeddings.rows import Conversion
from saemill.embeddings.run import run
from saemill.embeddings.sources import Where, open_source

N_MUTATIONS = 30


def test_a_mutated_file_is_read_or_refused_in_words(tmp_path: Path) -> None:
    """Oracle: no error but a SaemillError, for every kind of file and many kinds of damage."""
    (tmp_path / "whole").mkdir()
    refused, n_read = [], 0
    for file, options in write_all(tmp_path / "whole").items():
        raw, chance = file.read_bytes(), random.Random(file.name)
        bad = tmp_path / file.name
        for _ in range(N_MUTATIONS):
            bad.write_bytes(changed_bytes(raw, chance))
            try:
                source = open_source(Where(name=str(bad), **options))
                for rows in source.batches(2):
                    Conversion("fp32", False).of(rows)
                n_read += 1
            except SaemillError as error:
                refused.append(str(error))
    assert len(refused) > 200
    assert n_read > 5
    assert all(refused)


@pytest.mark.parametrize("seed", range(3))
def test_a_mutated_import_leaves_a_store_or_nothing(tmp_path: Path, seed: int) -> None:
    """Oracle: after an error no passage and no shard is there; else the whole matrix is."""
    (tmp_path / "whole").mkdir()
    chance = random.Random(seed)
    for number, (file, options) in enumerate(write_all(tmp_path / "whole").items()):
        bad, out = tmp_path / file.name, tmp_path / f"out-{number}"
        bad.write_bytes(changed_bytes(file.read_bytes(), chance))
        try:
            store = run(ImportConfig(source=str(bad), out=out, held_out_fraction=0, **options))
        except SaemillError:
            assert not list(out.glob("*"))
        else:
            name = store.sites[0]
            assert torch.isfinite(store.read(name, 0, store.n_tokens)).all()


Write = Callable[[Path], Any]


def npy(x: Any, **options: Any) -> Write:
    return lambda path: np.save(path, x, **options)


def parquet(**columns: Any) -> Write:
    return lambda path: pq.write_table(pa.table(columns), path)


def header(shape: str, descr: str = "<f4") -> Write:
    """A file of numpy's format whose header says what its content does not."""

    def write(path: Path) -> None:
        text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
        text += " " * (117 - len(text)) + "\n"
        path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + X.tobytes())

    return write


def in_zip(name: str, content: bytes) -> Write:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, content)

    return write


def as_npy(x: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, x)
    return buffer.getvalue()


def saved(value: Any) -> Write:
    return lambda path: torch.save(value, path)


def tensors(**values: torch.Tensor) -> Write:
    return lambda path: safetensors.torch.save_file(values, path)


def text(content: str | bytes) -> Write:
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


T = torch.from_numpy(X)
LISTS = pa.array(X.tolist(), pa.list_(pa.float32()))
EMPTY = pa.array([[], []], pa.list_(pa.float32()))
LATIN = pa.Array.from_buffers(pa.string(), 9, pa.array([b"\xff"] * 9).buffers())
NO_TEXT = "must hold texts or whole numbers, got"
NO_MATRIX = "must hold a matrix of floats"
REFUSED: dict[str, tuple[str, Write, str]] = {
    "objects": ("x.npy", npy(np.array([{}, {}], object), allow_pickle=True), NO_MATRIX),
    "complex": ("x.npy", npy(X.astype(complex)), r"got \(9, 4\) of complex128"),
    "big endian": ("x.npy", npy(X.astype(">f4")), r"got \(9, 4\) of >f4"),
    "three axes": ("x.npy", npy(X[None]), r"got \(1, 9, 4\) of float32"),
    "no rows": ("x.npy", npy(X[:0]), r"got \(0, 4\) of float32"),
    "pickle": ("x.npy", text(b"\x80\x04N."), "cannot read .*x.npy"),
    "header: too many rows": ("x.npy", header("(99999999999999, 4)"), "is cut off: it has .* bytes, fewer"),
    "header: negative": ("x.npy", header("(-1, 4)"), NO_MATRIX),
    "header: words": ("x.npy", header("('a', 4)"), "cannot read .*x.npy"),
    "no array in it": ("x.npz", in_zip("a.txt", b"a"), "it holds none"),
    "cut off in it": ("x.npz", in_zip("a.npy", as_npy(X)[:-9]), "is cut off"),
    "sparse": ("x.pt", saved(T.to_sparse()), NO_MATRIX),
    "float8": ("x.pt", saved(T.to(torch.float8_e4m3fn)), r"got \(9, 4\) of torch.float8_e4m3fn"),
    "pt of complex": ("x.pt", saved(T.to(torch.complex64)), NO_MATRIX),
    "a list": ("x.pt", saved([1, 2]), "must hold a tensor, or a dict of tensors, got list"),
    "an array": ("x.pt", saved(X), "a tensor or a dict of tensors, and no other objects"),
    "empty dict": ("x.pt", saved({}), "it holds none"),
    "safe float8": ("x.safetensors", tensors(a=T.to(torch.float8_e5m2)), r"got \(9, 4\) of F8_E5M2"),
    "safe ints": ("x.safetensors", tensors(a=T.long()), NO_MATRIX),
    "empty lists": ("x.parquet", parquet(embedding=EMPTY), "row 0 has no values"),
    "text of bytes": ("x.parquet", parquet(embedding=LISTS, text=[b"a"] * 9), f"'text' {NO_TEXT} binary"),
    "text of lists": ("x.parquet", parquet(embedding=LISTS, text=[["a"]] * 9), f"'text' {NO_TEXT} list"),
    "text of structs": ("x.parquet", parquet(embedding=LISTS, text=[{"a": 1}] * 9), f"{NO_TEXT} struct"),
    "ids of floats": ("x.parquet", parquet(embedding=LISTS, id=[0.5] * 9), f"'id' {NO_TEXT} double"),
    "no Unicode": ("x.parquet", parquet(embedding=LISTS, text=LATIN), "that is no Unicode"),
    "deep": ("x.jsonl", text('{"embedding": ' + "[" * 100_000), "is no JSON"),
    "huge number": ("x.jsonl", text('{"embedding": [1' + "0" * 400 + "]}"), "numbers that are too large"),
    "infinity": ("x.jsonl", text('{"embedding": [1e999]}'), "row 0 has NaN or infinite values"),
    "true": ("x.jsonl", text('{"embedding": [true]}'), "row 0 is no list of numbers"),
    "nested": ("x.jsonl", text('{"embedding": [[1.0]]}'), "row 0 is no list of numbers"),
    "ragged": ("x.jsonl", text('{"embedding": [1, 2]}\n{"embedding": [1]}'), "row 1 has 1 values, the rows"),
    "text of a dict": ("x.jsonl", text('{"embedding": [1], "text": {"a": 1}}'), "'text' must be a text"),
    "half a letter": ("x.jsonl", text(json.dumps({"embedding": [1.5], "text": "\ud800"})), "no Unicode"),
    "not UTF-8": ("x.jsonl", text(b'{"embedding": [1.5], "text": "\xff"}'), "cannot read .*x.jsonl"),
    "cut gz": ("x.jsonl.gz", text(gzip.compress(b'{"embedding": [1.5]}')[:-12]), "cannot read .*x.jsonl.gz"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "write", "told"), REFUSED.values(), ids=REFUSED.keys())
def test_what_holds_no_embeddings_is_refused(name: str, write: Write, told: str, tmp_path: Path) -> None:
    """Oracle: the sentences; nothing is written."""
    write(tmp_path / name)
    with pytest.raises(SaemillError, match=told):
        run(ImportConfig(source=str(tmp_path / name), out=tmp_path / "acts"))
    assert not list((tmp_path / "acts").glob("*"))

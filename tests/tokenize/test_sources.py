"""Where documents come from: columns of every type, files of every kind of damage."""

import bz2
import datetime
import gzip
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from saemill.common.errors import ConfigError, DataError, SaemillError
from saemill.tokenize.config import TokenizeConfig
from saemill.tokenize.run import run
from saemill.tokenize.source import open_source

DOCUMENTS = "".join(json.dumps({"text": f"text {i}", "n": i}) + "\n" for i in range(9)).encode()


def texts(path: Path, streaming: bool = False, column: str = "text") -> list[str]:
    """All texts, as they are tokenized."""
    source = open_source(
        str(path), subset=None, split="train", text_column=column, streaming=streaming, revision=None
    )
    return [text for batch in source.batches(None) for text in batch.texts or []]


COLUMNS: dict[str, tuple[Any, str]] = {
    "ints": ([1, 2], r"holds numbers \(int64\), not texts"),
    "floats": ([0.5, None], r"holds numbers \(double|float64\), not texts"),
    "bools": ([True, False], "holds true and false"),
    "bytes": ([b"a", b"b"], "holds bytes"),
    "dates": ([datetime.datetime(2020, 1, 1)] * 2, r"holds dates \(timestamp"),
    "words": ([["a"], ["b", "c"]], "holds lists of texts"),
    "vectors": ([[0.5], [1.5]], r"holds lists of numbers"),
    "groups": ([{"en": "a", "de": "b"}] * 2, r"holds groups of fields \(en, de\)"),
    "messages": ([[{"role": "user", "content": "a"}]] * 2, "chat messages.* --chat-column messages"),
    "conversations": ([[{"from": "human", "value": "a"}]] * 2, "chat messages.* --chat-column conversations"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", COLUMNS)
def test_a_column_that_holds_no_texts_is_refused(tmp_path: Path, kind: str, streaming: bool) -> None:
    """Oracle: the type that Arrow has for the values; the column that the message names is taken."""
    values, told = COLUMNS[kind]
    pq.write_table(pa.table({kind: values, "title": ["x", "y"]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=told) as caught:
        texts(tmp_path / "a.parquet", streaming, kind)
    if "messages" not in str(caught.value):
        assert "Name a column of texts with --text-column: title." in str(caught.value)
    assert texts(tmp_path / "a.parquet", streaming, "title") == ["x", "y"]


def test_a_dataset_of_chats_alone_is_told_so(tmp_path: Path) -> None:
    """Oracle: the sentence on messages, where the column of texts is not there at all."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n")
    with pytest.raises(ConfigError, match=r"has no column 'text'; it has messages.* --chat-column messages"):
        texts(tmp_path / "a.jsonl")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("value", [5, [1], {"a": 1}, True, 0.5])
def test_mixed_values_are_named_by_their_row(tmp_path: Path, value: Any, streaming: bool) -> None:
    """Oracle: the row that was written."""
    rows = [{"text": "a"}, {"text": None}, {"text": value}, {"text": "b"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"row 2 of .*a\.jsonl \(column text\) holds no text, but"):
        texts(tmp_path / "a.jsonl", streaming)


def test_a_stream_that_does_not_tell_its_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the values of a generator; its first row tells the type, and each row is checked."""
    for rows, told in (([{"text": 5}], "numbers"), ([{"text": "a"}, {"text": 5}], "row 1 of who/what")):
        stream = datasets.IterableDataset.from_generator(lambda rows=rows: iter(rows))
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, stream=stream, **__: stream)
        assert stream.features is None
        with pytest.raises(SaemillError, match=told):
            texts(Path("who/what"), streaming=True)


CSV = 'text,n\n"NA",001\nnull,2\n,3\n001,4\n"two\nlines, ""quoted""",5\n1.50,6\n2020-01-01,7\nTrue,8\nnan,9\n'
CELLS = ["NA", "null", "", "001", 'two\nlines, "quoted"', "1.50", "2020-01-01", "True", "nan"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".csv.gz", ".csv.zst"])
def test_cells_stay_the_texts_they_are(tmp_path: Path, suffix: str, streaming: bool) -> None:
    """Oracle: the cells that were written, with and without a byte order mark."""
    for mark in (b"", b"\xef\xbb\xbf"):
        content = mark + (CSV.replace(",n\n", "\tn\n") if suffix == ".tsv" else CSV).encode()
        if suffix == ".tsv":
            rows = [line.rsplit(",", 1) for line in CSV.split("\n") if line and not line.startswith('"two')]
            content = mark + "\n".join("\t".join(row) for row in rows[:5]).encode()
        packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(suffix).suffix, bytes)(content)
        file = tmp_path / f"{len(mark)}{suffix}"
        file.write_bytes(packed)
        assert texts(file, streaming) == (CELLS[:4] if suffix == ".tsv" else CELLS)
    if suffix == ".csv":
        assert texts(file, streaming, "n") == ["001", *"23456789"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("text,n\na,1,2\n", "header has 2 columns, but the first row 3"),
        ("text,text\na,b\n", "names 'text' twice"),
        ("text,n\na,1\nb,2,3\n", "Expected 2 fields in line 3, saw 3"),
        ('text,n\n"a,1\nb,2\n', "EOF inside string"),
        ("", "it is empty"),
    ],
)
def test_tables_that_are_none(tmp_path: Path, content: str, told: str) -> None:
    """Oracle: what is wrong with the table by hand."""
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match=told):
        texts(tmp_path / "a.csv")


def test_a_column_without_a_name(tmp_path: Path) -> None:
    """Oracle: pandas writes its row numbers so."""
    (tmp_path / "a.csv").write_text(",text\n0,a\n1,b\n")
    assert texts(tmp_path / "a.csv") == ["a", "b"]


def test_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    """Oracle: the texts without the mark."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\ntwo")
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + DOCUMENTS)
    for streaming in (False, True):
        assert texts(tmp_path / "a.txt", streaming) == ["one", "two"]
        assert texts(tmp_path / "a.jsonl", streaming) == [f"text {i}" for i in range(9)]


def damaged_middle(content: bytes) -> bytes:
    """Compressed, with eight bytes of it zeroed."""
    packed = gzip.compress(b"".join(os.urandom(1000) for _ in range(4)) + content)
    return packed[:900] + bytes(8) + packed[908:]


FILES: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "cut gz": ("a.jsonl.gz", lambda b: gzip.compress(b)[:-9], "compressed data ends too early"),
    "cut bz2": ("a.jsonl.bz2", lambda b: bz2.compress(b)[:-9], "compressed data ends too early"),
    "cut xz": ("a.jsonl.xz", lambda b: lzma.compress(b)[:-9], "compressed data ends too early"),
    "cut zst": ("a.jsonl.zst", lambda b: zstandard.compress(b)[:-9], "compressed data ends too early"),
    "cut txt.zst": ("a.txt.zst", lambda b: zstandard.compress(b)[:-9], "compressed data ends too early"),
    "damaged gz": ("a.jsonl.gz", damaged_middle, "it is damaged|not UTF-8"),
    "latin1": (
        "a.jsonl",
        lambda b: b + '{"text": "café"}\n'.encode("latin1"),
        r"line 10 is not UTF-8 \(byte 0xe9\)",
    ),
    "latin1 txt": ("a.txt", lambda b: "one\n\ncafé".encode("latin1"), "line 3 is not UTF-8"),
    "latin1 csv": ("a.csv", lambda b: "text\ncafé\n".encode("latin1"), "line 2 is not UTF-8"),
    "utf-16": ("a.jsonl", lambda b: b.decode().encode("utf-16"), "line 1 is not UTF-8"),
    "broken line": (
        "a.jsonl",
        lambda b: b + b'{"text": "a"\n' + b,
        r"line 10 is no JSON .* repair or remove",
    ),
    "no objects": ("a.jsonl", lambda b: b'"a"\n"b"\n', "line 1 is no JSON object"),
    "deep": ("a.jsonl", lambda b: b'{"text": ' + b"[" * 100_000, "line 1 is no JSON"),
    "no parquet": ("a.parquet", bytes, "it is no parquet file"),
    "cut parquet": ("a.parquet", lambda b: b"PAR1" + b, "it is damaged"),
    "empty parquet": ("a.parquet", lambda b: b"", "it is empty"),
    "parquet as text": ("a.txt", lambda b: b"PAR1\xff\xfe" + b, r"holds parquet; name it a\.parquet"),
    "empty": ("a.jsonl", lambda b: b"", "it is empty"),
    "empty gz": ("a.jsonl.gz", lambda b: gzip.compress(b""), "it holds no text"),
    "no arrow": ("a.arrow", bytes, "Not an Arrow file|is damaged"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", FILES)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, kind: str, streaming: bool) -> None:
    """Oracle: the file, the line and what is wrong with it, by hand."""
    name, make, told = FILES[kind]
    (tmp_path / name).write_bytes(make(DOCUMENTS))
    with pytest.raises(SaemillError, match=told) as caught:
        texts(tmp_path / name, streaming)
    assert str(tmp_path / name) in str(caught.value)


def parquet_bytes(_: bytes) -> bytes:
    """The documents as Parquet."""
    file = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": [f"text {i}" for i in range(9)]}), file)
    return bytes(file.getvalue())


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("a.jsonl.gz", bytes),
        ("a.jsonl.zst", bytes),
        ("a.jsonl", gzip.compress),
        ("a.jsonl", zstandard.compress),
        ("a.jsonl.zst", bz2.compress),
        ("a.jsonl.gz", lzma.compress),
        ("a.ndjson", bytes),
        ("a.jsonl", parquet_bytes),
        ("a.csv", parquet_bytes),
    ],
)
def test_files_whose_name_is_not_their_contents_are_read(
    tmp_path: Path, name: str, make: Callable[[bytes], bytes], streaming: bool
) -> None:
    """Oracle: the documents, which are in the file whatever it is called."""
    (tmp_path / name).write_bytes(make(DOCUMENTS))
    assert texts(tmp_path / name, streaming) == [f"text {i}" for i in range(9)]


def test_a_name_that_is_not_the_contents_in_a_folder(tmp_path: Path) -> None:
    """Oracle: among several files the one to rename is named."""
    (tmp_path / "a.jsonl").write_bytes(DOCUMENTS)
    (tmp_path / "b.jsonl.gz").write_bytes(DOCUMENTS)
    with pytest.raises(DataError, match=r"b\.jsonl\.gz: it is not compressed by gzip; name it b\.jsonl$"):
        texts(tmp_path)


def test_the_file_at_fault_among_several_is_named(tmp_path: Path) -> None:
    """Oracle: the one that is cut."""
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jsonl.gz").write_bytes(gzip.compress(DOCUMENTS)[: -9 if i == 1 else None])
    with pytest.raises(DataError, match=r"cannot read .*/1\.jsonl\.gz: .* ends too early; get it anew"):
        texts(folder)


def test_whole_files_of_every_compression(tmp_path: Path) -> None:
    """Oracle: the texts; zstandard of several frames, one of them to be skipped, as pzstd writes it."""
    skipped = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    half = DOCUMENTS.find(b"\n", 100) + 1
    two = skipped + zstandard.compress(DOCUMENTS[:half]) + zstandard.compress(DOCUMENTS[half:])
    for name, content in {
        "a.jsonl.bz2": bz2.compress(DOCUMENTS),
        "a.jsonl.xz": lzma.compress(DOCUMENTS),
        "b.jsonl.zst": two,
    }.items():
        (tmp_path / name).write_bytes(content)
        for streaming in (False, True):
            assert texts(tmp_path / name, streaming) == [f"text {i}" for i in range(9)], name


def test_a_file_without_the_right_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the system's refusal, which names the file."""

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "a.jsonl"))

    (tmp_path / "a.jsonl").write_bytes(DOCUMENTS)
    monkeypatch.setattr(datasets, "load_dataset", refused)
    with pytest.raises(SaemillError, match=r"a\.jsonl may not be read or written"):
        texts(tmp_path / "a.jsonl")


def test_a_dataset_that_is_a_program_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: what `datasets` says of a script, told without Python's words."""

    def refused(*_: Any, **__: Any) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found what.py")

    monkeypatch.setattr(datasets, "load_dataset", refused)
    with pytest.raises(ConfigError, match="a program of its own, which saemill does not run; save it as"):
        texts(Path("who/what"))


LIMITED = """
import resource, signal, sys
from saemill.cli import main
from saemill.tokenize import run as module
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
written, limit = module._write, int(sys.argv.pop(1))
def limited(*a):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return written(*a)
module._write = limited
main()
"""


def test_a_full_disk_is_a_sentence(tmp_path: Path, tokenizer_folder: str) -> None:
    """Oracle: a limit on a file's size, which fails as a full disk does; without it the same command
    works, and nothing else is left."""
    (tmp_path / "a.jsonl").write_bytes(DOCUMENTS * 20)
    values = [str(tmp_path / "a.jsonl"), "--tokenizer", tokenizer_folder, "--ctx-len", "8"]
    command = [sys.executable, "-c", LIMITED, "600", "tokenize", *values, "-o", str(tmp_path / "out")]
    done = subprocess.run(
        command, env=os.environ | {"HF_HOME": str(tmp_path / "hf")}, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "no room on the disk for" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out*"))
    config = TokenizeConfig(
        dataset=str(tmp_path / "a.jsonl"), tokenizer=tokenizer_folder, out=tmp_path / "out", ctx_len=8
    )
    assert run(config).problems(hashes=True) == []

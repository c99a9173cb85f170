"""Local files of documents: which kind each is, and, where reading fails, which file is at fault and why."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from saemill.common import durable
from saemill.common.errors import ConfigError, DataError

KINDS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".arrow": "arrow",
    ".txt": "text",
}
DELIMITERS = {"csv": ",", "tsv": "\t"}
COMPRESSED: dict[str, tuple[str, bytes]] = {
    ".gz": ("gzip", b"\x1f\x8b"),
    ".bz2": ("bzip2", b"BZh"),
    ".xz": ("xz", b"\xfd7zXZ\x00"),
    ".zst": ("zstandard", b"\x28\xb5\x2f\xfd"),
}
"""Compressions by suffix: name, and the bytes that such files begin with."""
SKIPPABLE = b"\x2a\x4d\x18"
"""Bytes of a zstandard frame without data, which may come first, after one that varies."""
BINARY = {".parquet": b"PAR1", ".arrow": b"ARROW1"}
"""Bytes that files of other kinds begin with, by suffix."""
BROKEN = (EOFError, OSError, lzma.LZMAError, zstandard.ZstdError)
CUT_OFF = "its compressed data ends too early; get it anew"
READ_BYTES = 1 << 20


def data_files(path: Path) -> list[Path]:
    """List the file, or the files of a known kind below the folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sorted(file for file in files if suffix_of(file) in KINDS)


def suffix_of(file: Path) -> str:
    """Return the last suffix that is not a compression's."""
    suffixes = [s.lower() for s in file.suffixes if s.lower() not in COMPRESSED]
    return suffixes[-1] if suffixes else ""


def true_name(file: Path) -> str:
    """Name a file as its content says: the compression by its first bytes, and Parquet and Arrow by theirs.
    The name stays where the content does not tell."""
    with file.open("rb") as raw:
        start = raw.read(8)
    compression = next((s for s, (_, magic) in COMPRESSED.items() if start.startswith(magic)), "")
    is_zst = file.suffix.lower() == ".zst" and start[1:4] == SKIPPABLE
    if not start or is_zst or compression == file.suffix.lower() != "":
        return file.name
    plain = file.name.removesuffix(file.suffix) if file.suffix.lower() in COMPRESSED else file.name
    binary = next((s for s, magic in BINARY.items() if start.startswith(magic)), None)
    if binary is None or Path(plain).suffix.lower() == binary:
        return f"{plain}{compression}"
    return f"{Path(plain).stem}{binary}"


def kind_of(path: Path) -> str:
    """Return the one kind of all files.

    Raises:
        ConfigError: there are several, or none that is known.
    """
    kinds = {KINDS[suffix_of(file)] for file in data_files(path)}
    if len(kinds) != 1:
        got = f"several kinds ({', '.join(sorted(kinds))})" if kinds else "none of them"
        raise ConfigError(f"{path} must hold files of one kind out of {', '.join(KINDS)}; found {got}")
    return kinds.pop()


def fingerprint_local(path: Path) -> str:
    """Hash the names and contents of a local dataset's files."""
    folder = path if path.is_dir() else path.parent
    files = data_files(path) or [file for file in path.rglob("*") if file.is_file()]
    return durable.hash_folder(folder, files)


def check_whole(path: Path) -> None:
    """Refuse zstandard files that are cut off: libraries read them as far as they go, without an error.

    Raises:
        DataError: naming the file.
    """
    for file in data_files(path):
        if file.suffix.lower() == ".zst" and (fault := _fault_of_zstandard(file)):
            raise DataError(f"cannot read {file}: {fault}")


def _fault_of_zstandard(file: Path) -> str | None:
    """Describe what is wrong with a zstandard file, of one frame or of several; None if nothing is."""
    frame: Any = None
    with file.open("rb") as raw:
        try:
            while piece := raw.read(READ_BYTES):
                while piece:
                    frame = frame or zstandard.ZstdDecompressor().decompressobj()
                    frame.decompress(piece)
                    if not frame.eof:
                        break
                    piece, frame = frame.unused_data, None
        except zstandard.ZstdError as error:
            return _fault_of_name(file) or f"its compressed data is damaged ({error}); get it anew"
    return CUT_OFF if frame is not None else None


def fault_of(file: Path) -> str | None:
    """Describe why a file cannot be read, with the line where there is one and the repair; None where no
    cause is known."""
    kind = KINDS[suffix_of(file)]
    try:
        if fault := _fault_of_name(file):
            return fault
        if kind == "parquet":
            pq.ParquetFile(file).read()
        elif kind == "arrow":
            return None
        elif file.suffix.lower() == ".zst" and (fault := _fault_of_zstandard(file)):
            return fault
        else:
            return _fault_of_text(file, kind)
    except EOFError:
        return CUT_OFF
    except (pa.ArrowException, *BROKEN) as error:
        return f"it is damaged ({error}); get it anew"
    return None


def _fault_of_name(file: Path) -> str | None:
    """Describe content of another kind than the name's suffixes say; None if the kinds agree."""
    with file.open("rb") as raw:
        start = raw.read(8)
    if not start:
        return "it is empty; remove it, or get it anew"
    suffix = file.suffix.lower()
    if suffix in COMPRESSED and not start.startswith(COMPRESSED[suffix][1]):
        if suffix == ".zst" and start[1:4] == SKIPPABLE:
            return None
        return f"it is not compressed by {COMPRESSED[suffix][0]}; name it {file.stem}"
    if suffix not in COMPRESSED:
        for other, (name, magic) in COMPRESSED.items():
            if start.startswith(magic):
                return f"it is compressed by {name}; name it {file.name}{other}"
    for other, magic in BINARY.items():
        if start.startswith(magic) and suffix != other:
            return f"it holds {other[1:]}; name it {file.stem}{other}"
    if suffix == ".parquet" and not start.startswith(b"PAR1"):
        return "it is no parquet file; give it the suffix of what it holds, or get it anew"
    return None


def opened(file: Path) -> BinaryIO:
    """Open a file for reading, decompressed by its suffix."""
    if file.suffix.lower() == ".zst":
        stream: Any = zstandard.ZstdDecompressor().stream_reader(file.open("rb"), read_across_frames=True)
        return io.BufferedReader(stream)
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(file.suffix.lower(), Path.open)
    stream = opener(file, "rb")
    assert isinstance(stream, io.IOBase)
    return stream  # type: ignore[return-value]


def _fault_of_text(file: Path, kind: str) -> str | None:
    """Describe why the first bad line of a text file cannot be read; None if all lines can."""
    in_lines = kind == "json" and not _is_one_value(file)
    number = 0
    with opened(file) as stream:
        try:
            for number, raw in enumerate(stream, 1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if in_lines and line and not isinstance(json.loads(line), dict):
                    return f"line {number} is no JSON object, but {line:.40}; each line must be one"
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            return f"line {number} is not UTF-8 (byte 0x{byte:02x}); convert the file to UTF-8"
        except (json.JSONDecodeError, RecursionError) as error:
            return f"line {number} is no JSON ({error}); repair or remove the line"
    return "it holds no text" if number == 0 else None


def _is_one_value(file: Path) -> bool:
    """Tell whether a JSON file is one list, rather than an object per line."""
    with opened(file) as stream:
        return stream.read(READ_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def csv_columns(path: Path, kind: str) -> list[str]:
    """Read the columns' names from the first file, as pandas gives them.

    Raises:
        DataError: no header, a name twice, or a first row of another length than the header.
    """
    file = data_files(path)[0]
    with reading_file(file), opened(file) as raw:
        rows = csv.reader(io.TextIOWrapper(raw, "utf-8-sig", newline=""), delimiter=DELIMITERS[kind])
        header = next(rows, [])
        first = next(rows, header)
    if not header:
        raise DataError(f"cannot read {file}: {fault_of(file) or 'it has no header; write one'}")
    names = [name or f"Unnamed: {place}" for place, name in enumerate(header)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"cannot read {file}: its header names {twice!r} twice; rename one")
    if len(first) > len(header):
        raise DataError(
            f"cannot read {file}: its header has {len(header)} columns, but the first row {len(first)}; "
            "name every column in the header"
        )
    return names


@contextmanager
def reading_file(file: Path) -> Iterator[None]:
    """Turn an error of reading a file, while the block runs, into one that says why."""
    try:
        yield
    except (ValueError, csv.Error, *BROKEN) as error:
        if isinstance(error, OSError) and (message := durable.explained(error)):
            raise DataError(message) from error
        raise DataError(f"cannot read {file}: {fault_of(file) or error}") from error

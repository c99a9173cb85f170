"""Which kind of source a name means: files in a folder or of a glob, a saved dataset, or a hub id."""

import glob
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saemill.common.errors import ConfigError
from saemill.embeddings import arrays, tables
from saemill.embeddings.arrays import open_arrays
from saemill.embeddings.rows import Source
from saemill.embeddings.tables import ArrowTable, DatasetTable, JsonTable, ParquetTable, Table, TableSource
from saemill.tokenize.source import open_dataset

KINDS = tables.KINDS | arrays.KINDS
TABLES: dict[str, Callable[[str, list[Path]], Table]] = {
    "parquet": ParquetTable,
    "arrow": ArrowTable,
    "jsonl": JsonTable,
}
SAVED = ("state.json", "dataset_dict.json")
"""Files by which a folder that `datasets` saved is recognised."""


@dataclass(frozen=True, slots=True)
class Where:
    """A selection: the rows that are meant, and which of their columns."""

    name: str
    """File, folder, glob or hub id."""
    column: str | None = None
    id_column: str | None = None
    text_column: str | None = None
    source_column: str | None = None
    width: int | None = None
    raw_dtype: str | None = None
    subset: str | None = None
    split: str | None = None
    revision: str | None = None


def open_source(where: Where) -> Source:
    """Open embeddings.

    Raises:
        ConfigError: nothing there, files of several kinds, or options that the kind does not have.
        DataError: files that cannot be read or hold no embeddings.
    """
    if is_dataset(where.name):
        _without(where, "a dataset", "width", "raw_dtype")
        return _table_source(open_hub(where), where)
    files = find_files(where.name)
    kind = _kind(where.name, files, raw=where.width is not None or where.raw_dtype is not None)
    _without(where, "files", "subset", "split", "revision")
    if kind == "raw":
        if where.width is None or where.raw_dtype is None:
            raise ConfigError(f"{where.name}: raw rows need both --width and --raw-dtype")
    else:
        _without(where, f"{kind} files", "width", "raw_dtype")
    if kind in TABLES:
        return _table_source(TABLES[kind](where.name, files), where)
    _without(where, f"{kind} files", "id_column", "text_column", "source_column")
    return open_arrays(where.name, files, kind, where.column, where.width, where.raw_dtype)


def open_table(name: str) -> Table:
    """Open a file, folder or glob as a table.

    Raises:
        ConfigError: nothing there, or no table.
    """
    files = find_files(name)
    kind = _kind(name, files, raw=False)
    if kind not in TABLES:
        raise ConfigError(f"{name} must be a table ({', '.join(tables.KINDS)}), got {kind}")
    return TABLES[kind](name, files)


def open_hub(where: Where) -> Table:
    """Open a saved dataset, or a dataset of the hub, as a table."""
    dataset, fingerprint = open_dataset(
        where.name,
        subset=where.subset,
        split=where.split or "train",
        streaming=False,
        revision=where.revision,
    )
    return DatasetTable(where.name, dataset, fingerprint)


def _table_source(table: Table, where: Where) -> Source:
    return TableSource(table, where.column, where.id_column, where.text_column, where.source_column)


def is_dataset(name: str) -> bool:
    """Tell whether a name means a folder that `datasets` saved, or a hub id."""
    path = Path(name)
    if path.exists() or glob.has_magic(name):
        return any((path / file).exists() for file in SAVED)
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or _suffix(path) in KINDS
    return not is_path and ("/" in name or not path.suffix)


def find_files(name: str) -> list[Path]:
    """List the files of a name, in natural order: part 2 before part 10.

    Raises:
        ConfigError: there are none.
    """
    path = Path(name)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file() and _suffix(file) in KINDS]
        if not files:
            raise ConfigError(
                f"{name} holds no embeddings; known are {', '.join(KINDS)}, or raw rows by a glob"
            )
    else:
        # Path.glob takes no pattern of an absolute path.
        files = [file for file in map(Path, glob.glob(name, recursive=True)) if file.is_file()]  # noqa: PTH207
        if not files:
            raise ConfigError(f"no file or folder {name}")
    return sorted(files, key=_natural)


def _natural(path: Path) -> list[Any]:
    """Make a sort key in which numbers in a name compare as numbers."""
    pieces = re.split(r"(\d+)", str(path))
    return [(0, int(piece), "") if piece.isdigit() else (1, 0, piece) for piece in pieces]


def _suffix(file: Path) -> str:
    return Path(file.name.lower().removesuffix(".gz")).suffix


def _kind(name: str, files: list[Path], raw: bool) -> str:
    kinds = {KINDS.get(_suffix(file), "raw") for file in files}
    if len(kinds) > 1:
        raise ConfigError(
            f"{name} holds files of several kinds ({', '.join(sorted(kinds))}); choose by a glob"
        )
    (kind,) = kinds
    if kind == "raw" and not raw:
        raise ConfigError(
            f"{files[0]} is of no kind that is known ({', '.join(KINDS)}); of raw rows say --width and "
            "--raw-dtype"
        )
    return kind


def _without(where: Where, what: str, *options: str) -> None:
    """Refuse options that have no effect."""
    for option in options:
        if getattr(where, option) is not None:
            flag = option.replace("_", "-")
            raise ConfigError(f"--{flag} has no effect on {what} ({where.name}); leave it out")

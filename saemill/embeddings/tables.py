"""Embeddings in a column of a table: parquet, arrow, json lines, or what `datasets` opens."""

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from saemill.common import durable
from saemill.common.config import nearest
from saemill.common.errors import ConfigError, DataError
from saemill.embeddings.rows import Rows, reading

BATCH_ROWS = 2048
"""Rows read at once: of vectors of 4,096 floats, 32 MiB."""
READ_BYTES = 1 << 20
KINDS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}


class Table(Protocol):
    """A table that is read from any row on, some columns at a time."""

    name: str
    columns: list[str]

    def schema(self) -> pa.Schema:
        """Return the columns' types."""

    def fingerprint(self) -> str:
        """Identify the content."""

    def read(self, columns: list[str], start: int) -> Iterator[pa.Table]:
        """Read rows from number `start` on, at most `BATCH_ROWS` at a time."""


class ParquetTable:
    """Parquet files, one after the other."""

    def __init__(self, name: str, files: list[Path]) -> None:
        self.name, self.files = name, files
        with reading(files[0]):
            self.columns = self.schema().names

    def schema(self) -> pa.Schema:
        """Return the types of the first file's columns."""
        with reading(self.files[0]):
            return self._open(self.files[0]).schema_arrow

    def fingerprint(self) -> str:
        """Hash the files."""
        return fingerprint_files(self.files)

    def _open(self, file: Path) -> pq.ParquetFile:
        # A buffer keeps a row group, which may be the whole file, from being read at once.
        with reading(file):
            return pq.ParquetFile(file, buffer_size=READ_BYTES, pre_buffer=False)

    def read(self, columns: list[str], start: int) -> Iterator[pa.Table]:
        """Read rows; row groups before `start` are not read."""
        for path in self.files:
            with reading(path), self._open(path) as file:
                check_columns(path, file.schema_arrow.names, columns)
                for group in range(file.num_row_groups):
                    n_rows = file.metadata.row_group(group).num_rows
                    if start >= n_rows:
                        start -= n_rows
                        continue
                    for batch in file.iter_batches(BATCH_ROWS, [group], columns, use_threads=False):
                        skipped, start = min(start, len(batch)), max(0, start - len(batch))
                        yield pa.Table.from_batches([batch]).slice(skipped).select(columns)


class ArrowTable:
    """Arrow files, of the file format (feather) or the stream format (`datasets`)."""

    def __init__(self, name: str, files: list[Path]) -> None:
        self.name, self.files = name, files
        with reading(files[0]):
            self.columns = self.schema().names

    def schema(self) -> pa.Schema:
        """Return the types of the first file's columns."""
        return self._open(self.files[0])[0]

    def fingerprint(self) -> str:
        """Hash the files."""
        return fingerprint_files(self.files)

    def _open(self, path: Path) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        with reading(path):
            mapped = pa.memory_map(str(path))
            if bytes(mapped.read(6)) == b"ARROW1":
                file = pa.ipc.open_file(mapped)
                return file.schema, map(file.get_batch, range(file.num_record_batches))
            mapped.seek(0)
            stream = pa.ipc.open_stream(mapped)
            return stream.schema, iter(stream)

    def read(self, columns: list[str], start: int) -> Iterator[pa.Table]:
        """Read rows; record batches before `start` are mapped, not read."""
        for path in self.files:
            with reading(path):
                schema, batches = self._open(path)
                check_columns(path, schema.names, columns)
                for batch in batches:
                    table = pa.Table.from_batches([batch]).select(columns)
                    table.validate(full=True)  # Arrow itself trusts a file's lengths and offsets
                    for first in range(min(start, len(batch)), len(batch), BATCH_ROWS):
                        yield table.slice(first, BATCH_ROWS)
                    start = max(0, start - len(batch))


class JsonTable:
    """JSON objects, one per line; gzipped or not."""

    def __init__(self, name: str, files: list[Path]) -> None:
        self.name, self.files = name, files
        first = next(self._objects(0), None)
        if first is None:
            raise DataError(f"{name} holds no passages")
        self.columns = list(first)

    def schema(self) -> pa.Schema:
        """Infer the types from the first row; numbers in lists are float64."""
        first = next(self._objects(0))
        vectors, others = pa.list_(pa.float64()), pa.string()
        return pa.schema([(n, vectors if isinstance(v, list) else others) for n, v in first.items()])

    def fingerprint(self) -> str:
        """Hash the files."""
        return fingerprint_files(self.files)

    def _objects(self, start: int) -> Iterator[dict[str, Any]]:
        for number, (place, line) in enumerate(islice(_lines(self.files), start, None), start):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"row {number:,} ({place}) is no JSON: {error}") from error
            if not isinstance(value, dict):
                raise DataError(f"row {number:,} ({place}) must be a JSON object, got {line[:40].strip()}")
            yield value

    def read(self, columns: list[str], start: int) -> Iterator[pa.Table]:
        """Read rows; lines before `start` are skipped unparsed."""
        objects = self._objects(start)
        while rows := list(islice(objects, BATCH_ROWS)):
            for i, row in enumerate(rows):
                check_columns(f"row {start + i:,} of {self.name}", list(row), columns)
            yield pa.table({name: _array([row[name] for row in rows], name, start) for name in columns})
            start += len(rows)


def _lines(files: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """Read each line that is not blank, with its place."""
    for file in files:
        opened = gzip.open if file.suffix == ".gz" else open
        with reading(file), opened(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{file.name}, line {number:,}", line


def _array(values: list[Any], name: str, start: int) -> pa.Array:
    """Convert values of JSON to a column: lists of numbers to float64, texts and whole numbers to texts."""
    if any(isinstance(value, list) for value in values):
        return _vectors_of(values, start)
    texts = []
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, str | int | None):
            raise DataError(f"row {start + i:,}: {name!r} must be a text, got {str(value)[:60]}")
        texts.append(None if value is None else str(value))
    try:
        return pa.array(texts, pa.string())
    except UnicodeEncodeError as error:
        raise DataError(f"rows from {start:,} on hold text that is no Unicode: {error}") from error


def _vectors_of(values: list[Any], start: int) -> pa.Array:
    try:
        if any(type(number) is bool for value in values if isinstance(value, list) for number in value):
            raise TypeError  # which Arrow would convert to 0 or 1
        return pa.array(values, pa.list_(pa.float64()))
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        for i, value in enumerate(values):
            numbers = value if isinstance(value, list) else [value]
            if any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
                raise DataError(f"row {start + i:,} is no list of numbers: {str(value)[:60]}") from None
        raise DataError(f"rows from {start:,} on hold numbers that are too large: {error}") from error


class DatasetTable:
    """A dataset that `datasets` opened: mapped, not in memory."""

    def __init__(self, name: str, dataset: Any, fingerprint: str) -> None:
        self.name, self.columns = name, list(dataset.column_names)
        self._dataset, self._fingerprint = dataset.with_format("arrow"), fingerprint

    def schema(self) -> pa.Schema:
        """Return the columns' Arrow types."""
        return self._dataset.features.arrow_schema

    def fingerprint(self) -> str:
        """Return the dataset's fingerprint, as `tokenize` defines it."""
        return self._fingerprint

    def read(self, columns: list[str], start: int) -> Iterator[pa.Table]:
        """Read slices of the dataset."""
        for first in range(start, len(self._dataset), BATCH_ROWS):
            with reading(self.name):
                table = self._dataset.select_columns(columns)[first : first + BATCH_ROWS]
                table.validate(full=True)
            yield table


def fingerprint_files(files: Sequence[Path]) -> str:
    """Hash some files' names and contents."""
    return durable.hash_json([[file.name, durable.hash_file(file)] for file in files])


def check_columns(where: object, columns: Sequence[str], wanted: Sequence[str]) -> None:
    """Refuse a file or row that lacks a column.

    Raises:
        DataError: naming it.
    """
    if missing := [name for name in wanted if name not in columns]:
        raise DataError(f"{where} has no {missing[0]!r}; it has {', '.join(columns) or 'nothing'}")


class TableSource:
    """Vectors, ids, texts and sources of a table.

    Args:
        table: the table.
        column: of the vectors; by default `embedding`, or the only column of float lists.
        id_column: by default `id`, if there is one.
        text_column: by default `text`, if there is one.
        source_column: only where it is named.

    Raises:
        ConfigError: no such column, or none that may be meant.
    """

    def __init__(
        self,
        table: Table,
        column: str | None,
        id_column: str | None,
        text_column: str | None,
        source_column: str | None = None,
    ) -> None:
        self.table, self.name = table, table.name
        self.site = column or _vector_column(table)
        optional = {"id": id_column, "text": text_column}
        chosen = {what: choose_column(table, what, asked) for what, asked in optional.items()}
        self.id_column, self.text_column = chosen["id"], chosen["text"]
        self.has_ids, self.has_texts = self.id_column is not None, self.text_column is not None
        if self.site not in table.columns:
            raise ConfigError(f"{self.name} has no column {self.site!r}; {nearest(self.site, table.columns)}")
        self.source_column = source_column and choose_column(table, "source", source_column)
        self.width: int | None = None

    def fingerprint(self) -> str:
        """Return the table's fingerprint."""
        return self.table.fingerprint()

    def batches(self, start: int) -> Iterator[Rows]:
        """Read the table's rows from number `start` on."""
        of_strings = (self.id_column, self.text_column, self.source_column)
        columns = [name for name in (self.site, *of_strings) if name is not None]
        for rows in self.table.read(list(dict.fromkeys(columns)), start):
            if len(rows) == 0:
                continue
            x_TD = self._vectors(rows[self.site].combine_chunks(), start)
            ids, texts, sources = (
                None if name is None else strings(rows[name], name, start) for name in of_strings
            )
            yield Rows(start, x_TD, ids, texts, sources)
            start += len(rows)

    def _vectors(self, column: pa.Array, start: int) -> Tensor:
        """Convert a column of lists to [T, D]."""
        column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        if isinstance(column, pa.ExtensionArray):
            column = column.storage
        if not is_vectors(column.type):
            raise DataError(
                f"column {self.site!r} of {self.name} must hold lists of floats, got {column.type}"
            )
        if column.null_count:
            raise DataError(
                f"row {start + column.is_null().index(True).as_py():,} has no vector in {self.site!r}"
            )
        lengths = _lengths(column)
        self.width = self.width or int(lengths[0])
        if self.width == 0:
            raise DataError(f"row {start:,} has no values in {self.site!r}")
        if len(bad := np.flatnonzero(lengths != self.width)):
            raise DataError(
                f"row {start + bad[0]:,} has {lengths[bad[0]]:,} values, the rows before it {self.width:,}"
            )
        values = column.flatten()
        if values.null_count:
            row = start + values.is_null().index(True).as_py() // self.width
            raise DataError(f"row {row:,} has a value that is null")
        return torch.from_numpy(values.to_numpy(zero_copy_only=False).reshape(-1, self.width).copy())


def _lengths(column: pa.Array) -> np.ndarray[Any, Any]:
    """Return the length of each list."""
    if isinstance(column, pa.FixedSizeListArray):
        return np.full(len(column), column.type.list_size)
    return np.asarray(pc.list_value_length(column))


def is_vectors(kind: pa.DataType) -> bool:
    """Tell whether a type is a list of floats."""
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_list(kind) for is_list in lists) and pa.types.is_floating(kind.value_type)


def _vector_column(table: Table) -> str:
    names = [field.name for field in table.schema() if is_vectors(field.type)]
    if "embedding" in names or len(names) == 1:
        return "embedding" if "embedding" in names else names[0]
    which = f"several columns of float lists ({', '.join(names)})" if names else "no column of float lists"
    raise ConfigError(
        f"{table.name} has {which}; its columns are {', '.join(table.columns)}. Name one with --column"
    )


def choose_column(table: Table, what: str, chosen: str | None) -> str | None:
    """Choose the column of ids or texts: the one that is named, or one of the usual name, or none.

    Raises:
        ConfigError: the table lacks the one that is named.
    """
    if chosen is not None and chosen not in table.columns:
        raise ConfigError(f"{table.name} has no column {chosen!r}; it has {', '.join(table.columns)}")
    return chosen or (what if what in table.columns else None)


def strings(column: pa.ChunkedArray, name: str, start: int) -> list[str]:
    """Convert ids or texts to strings.

    Raises:
        DataError: one is missing, or they are neither texts nor whole numbers.
    """
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    are_texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_integer)
    if not any(is_kind(kind) for is_kind in are_texts):
        raise DataError(f"column {name!r} must hold texts or whole numbers, got {kind}; name another column")
    if column.null_count:
        row = start + column.combine_chunks().is_null().index(True).as_py()
        raise DataError(f"row {row:,} has no {name!r}; fill it in, or name another column")
    try:
        return [str(value) for value in column.to_pylist()]
    except UnicodeDecodeError as error:
        raise DataError(f"rows from {start:,} on have a {name!r} that is no Unicode: {error}") from error

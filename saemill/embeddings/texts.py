"""Texts in another file than the embeddings, joined by id, or by their order where there are no ids."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from saemill.common import durable
from saemill.common.errors import ConfigError, DataError
from saemill.embeddings.rows import Rows, Source
from saemill.embeddings.tables import Table, choose_column, strings


class Texts(Protocol):
    """The ids and texts of rows that come in order."""

    def of(self, rows: Rows) -> tuple[list[str] | None, list[str] | None]:
        """Return the ids and texts of the next rows."""

    def finish(self) -> None:
        """Check what is left over; called after the last row."""


class OwnTexts:
    """Ids and texts of the rows themselves."""

    def of(self, rows: Rows) -> tuple[list[str] | None, list[str] | None]:
        """Return the rows' own ids and texts."""
        return rows.ids, rows.texts

    def finish(self) -> None:
        """Accept: nothing is left over."""


class TextsById:
    """Texts of a table by their ids, which are held in a file meanwhile and not in memory.

    Args:
        table: of ids and texts.
        id_column: of the ids there.
        text_column: of the texts.
        scratch: the file.

    Raises:
        DataError: an id occurs twice.
        DiskError: the disk is full.
    """

    def __init__(self, table: Table, id_column: str, text_column: str, scratch: Path) -> None:
        self.table = table
        with durable.writing(scratch):
            self._database = sqlite3.connect(scratch)
            self._database.execute("PRAGMA journal_mode=OFF")
            self._database.execute("CREATE TABLE texts (id TEXT PRIMARY KEY, text TEXT) WITHOUT ROWID")
            for pairs in _pairs(table, id_column, text_column):
                self._insert(pairs)

    def _insert(self, pairs: list[tuple[str, str]]) -> None:
        for pair in pairs:
            try:
                self._database.execute("INSERT INTO texts VALUES (?, ?)", pair)
            except sqlite3.IntegrityError:
                raise DataError(f"the id {pair[0]} occurs twice in {self.table.name}") from None

    def of(self, rows: Rows) -> tuple[list[str] | None, list[str] | None]:
        """Look up the texts of the rows' ids.

        Raises:
            DataError: an id has no text.
        """
        assert rows.ids is not None
        row_texts = []
        for i, id_ in enumerate(rows.ids):
            text = self._database.execute("SELECT text FROM texts WHERE id = ?", [id_]).fetchone()
            if text is None:
                raise DataError(f"row {rows.start + i:,} has the id {id_}, which {self.table.name} lacks")
            row_texts.append(text[0])
        return rows.ids, row_texts

    def finish(self) -> None:
        """Accept texts that are left over: they belong to other ids."""
        self._database.close()


class TextsByOrder:
    """The texts of a table whose rows are in the order of the embeddings.

    Args:
        table: of the texts.
        id_column: of the ids there, if it has any.
        text_column: of the texts.
        may_be_longer: whether only the first embeddings are imported.
    """

    def __init__(self, table: Table, id_column: str | None, text_column: str, may_be_longer: bool) -> None:
        self.table, self.may_be_longer, self.has_ids = table, may_be_longer, id_column is not None
        batches = _pairs(table, id_column or text_column, text_column)
        self._pairs = (pair for batch in batches for pair in batch)

    def of(self, rows: Rows) -> tuple[list[str] | None, list[str] | None]:
        """Return the next texts.

        Raises:
            DataError: there are too few.
        """
        n_rows = len(rows.x_TD)
        pairs = [pair for _, pair in zip(range(n_rows), self._pairs, strict=False)]
        if len(pairs) < n_rows:
            n_texts = rows.start + len(pairs)
            raise DataError(f"{self.table.name} has {n_texts:,} texts, fewer than there are embeddings")
        return [id_ for id_, _ in pairs] if self.has_ids else None, [text for _, text in pairs]

    def finish(self) -> None:
        """Make sure that no text is left.

        Raises:
            DataError: one is.
        """
        if not self.may_be_longer and next(self._pairs, None) is not None:
            raise DataError(f"{self.table.name} has more texts than there are embeddings")


def _pairs(table: Table, id_column: str, text_column: str) -> Iterator[list[tuple[str, str]]]:
    start = 0
    for rows in table.read(list(dict.fromkeys([id_column, text_column])), 0):
        ids, texts = (strings(rows[name], name, start) for name in (id_column, text_column))
        yield list(zip(ids, texts, strict=True))
        start += len(rows)


def join(
    source: Source,
    table: Table | None,
    id_column: str | None,
    text_column: str | None,
    scratch: Path,
    may_be_longer: bool,
) -> Texts:
    """Choose where the texts of a source come from.

    Args:
        source: the embeddings.
        table: of their texts, if those are elsewhere; texts of the source's own are not used then.
        id_column: there, if it has one of this name, else `id`.
        text_column: there; by default `text`.
        scratch: a file for what does not belong in memory.
        may_be_longer: whether only the first embeddings are imported.

    Raises:
        ConfigError: the table has no texts, or no ids where the embeddings have some.
    """
    if table is None:
        return OwnTexts()
    column = choose_column(table, "text", text_column)
    if column is None:
        raise ConfigError(f"{table.name} has no column 'text'; name one with --text-column")
    id_column = choose_column(table, "id", id_column if id_column in table.columns else None)
    if source.has_ids and id_column is None:
        raise ConfigError(
            f"{source.name} has ids, {table.name} has no column 'id' to join by; it has "
            f"{', '.join(table.columns)}"
        )
    if source.has_ids and id_column is not None:
        return TextsById(table, id_column, column, scratch)
    return TextsByOrder(table, id_column, column, may_be_longer)

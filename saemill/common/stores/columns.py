"""The Parquet files of a store, read only with the columns and types that they were written with."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from saemill.common import durable
from saemill.common.errors import StoreError


def read_table(
    path: Path, schema: pa.Schema, repair: str, columns: Sequence[str] | None = None, group: int | None = None
) -> pa.Table:
    """Read some columns of a Parquet file.

    Args:
        path: the file.
        schema: the columns that it must have, with their types, in any order.
        repair: the sentence on what to do, put at the end of messages.
        columns: those wanted; by default all of the schema.
        group: the row group wanted; by default all.

    Raises:
        MissingError: there is no such file.
        StoreError: it is no Parquet file, or has other columns.
    """
    names = list(columns or schema.names)
    try:
        with durable.reading(path, repair), pq.ParquetFile(path) as file:
            actual = file.schema_arrow
            for field in schema:
                if len(actual.get_all_field_indices(field.name)) != 1:
                    raise StoreError(f"{path} is damaged: it has no column {field.name!r}. {repair}")
                if actual.field(field.name).type != field.type:
                    difference = f"its column {field.name!r} holds {actual.field(field.name).type}"
                    raise StoreError(f"{path} is damaged: {difference}, expected {field.type}. {repair}")
            table = file.read(names) if group is None else file.read_row_group(group, names)
            table.validate(full=True)  # texts that are no UTF-8 too
    except StoreError:
        raise
    except (pa.ArrowException, ValueError, IndexError, OverflowError, MemoryError) as error:
        raise StoreError(f"{path} is damaged: {type(error).__name__}: {error}. {repair}") from error
    for name in names:
        if schema.field(name).type != pa.string() and table[name].null_count:
            raise StoreError(f"{path} is damaged: its column {name!r} has empty places. {repair}")
    return table

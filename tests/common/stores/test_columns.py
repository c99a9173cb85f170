"""The Parquet files of a store, read as they were written or refused."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saemill.common.errors import StoreError
from saemill.common.stores.columns import read_table

SCHEMA = pa.schema([("text", pa.string())])


@pytest.mark.parametrize("group", [None, 0])
def test_a_text_that_is_no_utf8_is_refused(tmp_path: Path, group: int | None) -> None:
    """Oracle: bytes that no UTF-8 has, which pyarrow writes as a text unasked; texts beside them are read."""
    for name, raw in (("good", "né".encode()), ("bad", b"n\xb3")):
        text = pa.array([None, raw]).view(pa.string())
        pq.write_table(pa.table({"text": text}, SCHEMA), tmp_path / name)
    assert read_table(tmp_path / "good", SCHEMA, "R.", group=group)["text"].to_pylist() == [None, "né"]
    with pytest.raises(StoreError, match=r"bad is damaged: ArrowInvalid: .*UTF8.*R\."):
        read_table(tmp_path / "bad", SCHEMA, "R.", group=group)

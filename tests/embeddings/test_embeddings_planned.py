"""What `import-activations` and `embed` tell with --dry-run."""

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import call
from crashes import file_hashes
from importing import taken, with_texts

from saemill.common.errors import ConfigError, DiskError
from saemill.embeddings.config import ImportConfig
from saemill.embeddings.run import outlook


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_a_dry_run_tells_what_is_written(dtype: str, tmp_path: Path) -> None:
    """Oracle: the bytes of the shards and the number of files afterwards; the dry run leaves nothing, and of
    a store that is there nothing is left to write."""
    with_texts(tmp_path, 600)
    config = ImportConfig(
        source=str(tmp_path / "ids.parquet"), texts=str(tmp_path / "apart.parquet"), out=tmp_path / "acts",
        id_column="id", text_column="text", dtype=dtype, shard_rows=256,  # type: ignore[arg-type]
    )  # fmt: skip
    before = file_hashes(tmp_path)
    told = call(
        *("import-activations", config.source, "--texts", config.texts, "-o", config.out),
        *("--id-column=id", "--text-column=text", f"--dtype={dtype}", "--shard-rows=256", "--dry-run"),
    )
    assert file_hashes(tmp_path) == before
    planned = outlook(config)
    assert "\n".join(planned.lines()) in told
    store = taken(
        config.source, config.out, texts=config.texts, id_column="id", text_column="text", dtype=dtype,
        shard_rows=256,
    )  # fmt: skip
    assert planned.amount == store.n_tokens == 600
    shards = sum(file.stat().st_size for file in store.path.glob("embedding/c/*/0"))
    assert planned.disk["embedding"] == shards
    assert planned.n_files == len(file_hashes(store.path))
    again = outlook(config)
    assert again.disk_bytes == 0
    assert "all files are there" in again.what[0]
    with pytest.raises(ConfigError, match="shard_tokens: there 256, now 512"):
        outlook(replace(config, shard_rows=512))


def test_a_disk_too_small_for_the_texts_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: SQLite's own error, of a file that may have three pages."""
    connect = sqlite3.connect

    def small(file: Path) -> sqlite3.Connection:
        database = connect(file)
        database.execute("PRAGMA max_page_count=3")
        return database

    with_texts(tmp_path, 600)
    monkeypatch.setattr(sqlite3, "connect", small)
    source, texts = (str(tmp_path / f"{name}.parquet") for name in ("ids", "apart"))
    with pytest.raises(DiskError, match="no room on the disk"):
        taken(source, tmp_path / "acts", texts=texts)

"""Token stores that are made at an address: the files of one on a disk, whatever fails on the way."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from crashes import file_hashes
from object_store import S3

from saemill.common.errors import ConfigError, DiskError, StoreError
from saemill.common.stores.tokens import TokenStore
from saemill.tokenize import run
from saemill.tokenize.config import TokenizeConfig
from saemill.tokenize.run import run as tokenize

ADDRESS = "s3://bucket/tokens"


@pytest.fixture
def made(corpus: Path, tokenizer_folder: str) -> Any:
    def make(out: Path | str, ctx_len: int = 32) -> TokenStore:
        return tokenize(
            TokenizeConfig(
                dataset=str(corpus), tokenizer=tokenizer_folder, out=Path(out), ctx_len=ctx_len,
                max_tokens=100 * 32, held_out_fraction=0.2,
            )
        )  # fmt: skip

    return make


def test_a_bucket_holds_what_a_disk_would(s3: S3, made: Any, tmp_path: Path) -> None:
    """Oracle: the store on a disk, object by object, after an upload that broke off; then no request that
    writes; a damaged store is made anew; others are refused, and so is a place with other files."""
    expected = file_hashes(made(tmp_path / "disk").path)
    n_puts = 0

    def lose(method: str, path: str, body: bytes) -> bytes | None:
        nonlocal n_puts
        n_puts += method == "PUT"
        return None if method == "PUT" and n_puts > 4 else body

    s3.lose = lose
    with pytest.raises(DiskError, match=f"{ADDRESS}/.* cannot be written after 6 attempts"):
        made(ADDRESS)
    s3.calm()
    s3.put_file("tokens/segments.parquet", b"of an upload that never ended")
    store = made(ADDRESS)
    assert store.named == ADDRESS

    def check(name: str) -> None:
        s3.fetch("tokens", tmp_path / name)
        assert file_hashes(tmp_path / name) == expected

    check("first")
    methods: set[str] = set()
    s3.watch = lambda method, path, headers: methods.add(method)
    assert made(ADDRESS).fingerprint == store.fingerprint
    assert methods <= {"GET", "HEAD"}
    for damaged in ("tokens/manifest.json", "tokens/held_out/c/0/0"):
        s3.put_file(damaged, b"damaged")
        made(ADDRESS)
        check(damaged)
    with pytest.raises(ConfigError, match=f"{ADDRESS} was made with other settings"):
        made(ADDRESS, ctx_len=64)
    s3.put_file("tokens/notes.txt", b"x")
    with pytest.raises(StoreError, match=rf"{ADDRESS} holds other files \(notes.txt\); choose a new folder"):
        made(ADDRESS)
    assert not [file for file in (tmp_path / "cache/saemill/tokens").rglob("*") if file.is_file()]


def test_one_process_uploads_and_the_others_wait(s3: S3, made: Any, tmp_path: Path) -> None:
    """Oracle: each object is written once, and every process gets the store on a disk."""
    expected = made(tmp_path / "disk").fingerprint
    written: list[str] = []
    s3.watch = lambda method, path, headers: written.append(path) if method == "PUT" else None
    with ThreadPoolExecutor(3) as pool:
        stores = list(pool.map(made, [ADDRESS] * 3))
    assert [store.fingerprint for store in stores] == [expected] * 3
    assert len(written) == len(set(written))


def test_what_another_machine_has_made_meanwhile_stays(
    s3: S3, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the refusal, and the other store's objects, which were there before the upload began."""
    other = made(tmp_path / "other", ctx_len=64).path
    write = run._write

    def slowly(*args: Any) -> Any:
        s3.put(other, "tokens")
        return write(*args)

    monkeypatch.setattr(run, "_write", slowly)
    with pytest.raises(ConfigError, match=f"{ADDRESS} was made with other settings"):
        made(ADDRESS)
    s3.fetch("tokens", tmp_path / "there")
    assert file_hashes(tmp_path / "there") == file_hashes(other)

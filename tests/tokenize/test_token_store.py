"""What `saemill tokenize` leaves: every file is listed, no damage goes unseen, and copies of first rows."""

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import transformers
import xxhash
from packing import TEXTS, check_documents

from saemill.common import records
from saemill.common.errors import StoreError
from saemill.common.stores.shards import ShardedArray
from saemill.common.stores.token_writer import copy_rows, write_token_store
from saemill.common.stores.tokens import TokenStore


def test_a_shard_that_nobody_wrote_is_noticed(plain_store: TokenStore, tmp_path: Path) -> None:
    """Oracle: the missing file is named, before the manifest is written and, where the manifest does not
    list it either, when the store is opened."""
    for shard in ("tokens/c/1/0", "held_out/c/0/0"):
        folder = tmp_path / "copy"
        shutil.copytree(plain_store.path, folder)
        files = tuple(file for file in plain_store.manifest.files if file.path != shard)
        records.write(folder / "manifest.json", plain_store.manifest.model_copy(update={"files": files}))
        (folder / shard).unlink()
        with pytest.raises(StoreError, match=shard):
            TokenStore(folder)
        shutil.rmtree(folder)
    shutil.copytree(plain_store.path / "tokens", tmp_path / "new" / "tokens")
    (tmp_path / "new" / "tokens" / "c" / "2" / "0").unlink()
    with pytest.raises(StoreError, match="c/2/0: file is missing"):
        write_token_store(
            tmp_path / "new",
            tokens=ShardedArray(tmp_path / "new" / "tokens"),
            held_out_R=plain_store.held_out_R,
            segments=pq.read_table(plain_store.path / "segments.parquet"),
            documents=plain_store.documents,
            tokenizer=plain_store.tokenizer,
            extra={},
        )
    assert not (tmp_path / "new" / "manifest.json").exists()


def test_manifest_lists_every_file(plain_store: TokenStore) -> None:
    """Oracle: the files that lie there, their sizes and hashes, and the settings that made them."""
    files = {str(f.relative_to(plain_store.path)): f for f in plain_store.path.rglob("*") if f.is_file()}
    del files["manifest.json"]
    found = {entry.path: (entry.bytes, entry.xxh3) for entry in plain_store.manifest.files}
    contents = {name: file.read_bytes() for name, file in files.items()}
    assert found == {name: (len(c), xxhash.xxh3_64_hexdigest(c)) for name, c in contents.items()}
    assert plain_store.manifest.settings.model_dump()["ctx_len"] == 16
    assert plain_store.problems(hashes=True) == []
    tokenizer = transformers.AutoTokenizer.from_pretrained(plain_store.path / "tokenizer")
    assert tokenizer.decode(plain_store.rows(0, 1)[0]).startswith(TEXTS[0][:20])


def test_damage_is_refused(plain_store: TokenStore, tmp_path: Path) -> None:
    """Oracle: with any one file missing or shorter by a byte the store does not open, and names it."""
    for entry in plain_store.manifest.files:
        folder = tmp_path / "copy"
        shutil.copytree(plain_store.path, folder)
        file = folder / entry.path
        os.truncate(file, entry.bytes - 1)
        with pytest.raises(StoreError, match=f"bytes, expected {entry.bytes:,}") as caught:
            TokenStore(folder)
        assert str(file) in str(caught.value)
        file.unlink()
        with pytest.raises(StoreError, match="file is missing") as caught:
            TokenStore(folder)
        assert str(file) in str(caught.value)
        shutil.rmtree(folder)


def test_bit_flips_are_found(plain_store: TokenStore, tmp_path: Path) -> None:
    """Oracle: one flipped bit in any one file is found by the hashes, in that file and no other."""
    shutil.copytree(plain_store.path, tmp_path / "copy")
    store = TokenStore(tmp_path / "copy")
    for entry in store.manifest.files:
        file = store.path / entry.path
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
        assert store.problems(hashes=False) == []
        assert store.problems(hashes=True) == [f"{file}: content differs from its hash"]
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    assert store.problems(hashes=True) == []


def test_damaged_manifest(plain_store: TokenStore, tmp_path: Path) -> None:
    """Oracle: no manifest, half a manifest and another format are refused with the reason."""
    shutil.copytree(plain_store.path, tmp_path / "copy")
    manifest = tmp_path / "copy" / "manifest.json"
    content = manifest.read_text()
    for changed, message in (
        (content[:200], r"manifest\.json is damaged"),
        (content.replace("saemill tokens 2", "saemill tokens 0"), "format 'saemill tokens 0', but"),
        (None, r"manifest\.json is missing\. Make one with `saemill tokenize`"),
    ):
        manifest.unlink() if changed is None else manifest.write_text(changed)
        with pytest.raises(StoreError, match=message):
            TokenStore(tmp_path / "copy")


@pytest.mark.parametrize("n_rows", [1, 9, 10, 11, 20, None])
def test_copy_rows(plain_store: TokenStore, tmp_path: Path, n_rows: int | None) -> None:
    """Oracle: the original's first rows, sides and documents; counts taken token by token."""
    n_rows = n_rows or plain_store.n_rows
    copy = copy_rows(plain_store, n_rows, tmp_path / "copy")
    addresses = np.arange(n_rows * 16)
    assert (copy.n_rows, copy.ctx_len, copy.n_tokens) == (n_rows, 16, len(addresses))
    assert np.array_equal(copy.rows(0, n_rows), plain_store.rows(0, n_rows))
    assert copy.rows(0, 1).dtype == plain_store.rows(0, 1).dtype
    assert np.array_equal(copy.held_out_R, plain_store.held_out_R[:n_rows])
    assert np.array_equal(copy.document_of(addresses), plain_store.document_of(addresses))
    check_documents(copy, TEXTS)
    n_documents = copy.documents.num_rows
    for name in ("source_index", "held_out", "text_hash"):
        assert copy.documents[name].to_pylist() == plain_store.documents[name][:n_documents].to_pylist()
    assert copy.tokenizer == plain_store.tokenizer
    assert copy.manifest.parent_fingerprint == plain_store.fingerprint
    assert TokenStore(copy.path).problems(hashes=True) == []
    assert not (tmp_path / "copy.partial").exists()


def test_copy_of_all_rows_is_the_store(plain_store: TokenStore, tmp_path: Path) -> None:
    """Oracle: every file of a full copy equals the original's, up to the manifest."""
    copy = copy_rows(plain_store, plain_store.n_rows, tmp_path / "copy")
    assert copy.manifest.files == plain_store.manifest.files
    assert copy.fingerprint == plain_store.fingerprint

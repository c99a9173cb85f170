"""Rows of a token store as a dataset of SAELens and sparsify, on disk and on the hub."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from command_line import call
from hub import Hub
from packing import tokenize
from peers import require_peers, run_in_peers

from saemill.common.errors import ConfigError
from saemill.common.stores.tokens import TokenStore


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_folder: str) -> TokenStore:
    folder = tmp_path_factory.mktemp("tokens")
    return tokenize(
        corpus, folder / "tokens", tokenizer_folder, max_tokens=3200, held_out_fraction=0.3, shuffle_seed=42
    )


def test_saelens_and_sparsify_read_it(tokens: TokenStore, tmp_path: Path) -> None:
    """Oracle: SAELens' own store of activations, which checks columns and context size, and sparsify's own
    way to its rows; each gives the ids of the training rows."""
    require_peers()
    told = call("export-tokens", tokens.path, tmp_path / "out")
    wanted = tokens.rows(0, tokens.n_rows)[~tokens.held_out_R]
    assert f"{len(wanted)} training rows of 32 ids" in told
    run_in_peers(
        tmp_path,
        {"do": "read_rows_of_ids", "folder": str(tmp_path / "out"), "ctx_len": 32, "out": "read.npz"},
    )
    read = np.load(tmp_path / "read.npz")
    assert np.array_equal(read["saelens"], wanted)
    assert np.array_equal(read["sparsify"], wanted)


def test_its_metadata_is_what_saelens_knows(tokens: TokenStore, tmp_path: Path) -> None:
    """Oracle: the fields of SAELens' own metadata, and the store's facts."""
    call("export-tokens", tokens.path, tmp_path / "out", "--held-out")
    told = json.loads((tmp_path / "out" / "sae_lens.json").read_text())
    wanted = {"context_size": 32, "begin_batch_token": None, "sequence_separator_token": 0, "seed": 42}
    assert told | wanted == told
    saved = datasets.load_from_disk(str(tmp_path / "out"))
    held_out = tokens.rows(0, tokens.n_rows)[tokens.held_out_R]
    assert np.array_equal(np.stack([row.numpy() for row in saved["input_ids"]]), held_out)
    with pytest.raises(ConfigError, match="holds files"):
        call("export-tokens", tokens.path, tmp_path / "out")


def test_it_is_pushed(tokens: TokenStore, hub: Hub, tmp_path: Path) -> None:
    """Oracle: the hub's own files: `datasets` reads the rows from them, without a path of this machine."""
    call("export-tokens", tokens.path, tmp_path / "out", "--push-to-hub", "user/ids")
    files = hub.files("user/ids", kind="datasets")
    assert sorted(files) == [
        ".gitattributes",
        "README.md",
        "data/train-00000-of-00001.parquet",
        "sae_lens.json",
    ]
    assert not any(str(tokens.path.parent).encode() in content for content in files.values())
    (tmp_path / "rows.parquet").write_bytes(files["data/train-00000-of-00001.parquet"])
    rows: Any = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "rows.parquet"), split="train", cache_dir=str(tmp_path / "hf")
    )
    assert np.array_equal(rows["input_ids"], tokens.rows(0, tokens.n_rows)[~tokens.held_out_R])
    with pytest.raises(ConfigError, match="repo must be user/repo"):
        call("export-tokens", tokens.path, tmp_path / "b", "--push-to-hub", "user/ids@branch")
    assert not (tmp_path / "b").exists()

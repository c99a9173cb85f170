"""docs/format.md: the reader on the page reads every form, and what the page says of orders holds."""

import ast
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import make_embeddings, make_store

import saemill
from saemill.common.stores.activations import SHUFFLE_KEY, ActivationStore
from saemill.common.stores.permutation import permutation

PAGE = (Path(saemill.__file__).parents[1] / "docs" / "format.md").read_text()
(CODE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def reader() -> dict[str, Any]:
    """What the page's code defines."""
    names: dict[str, Any] = {}
    exec(CODE, names)
    return names


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "int8"])
def test_the_reader_reads_every_form(
    dtype: str, compression: str | None, reader: dict[str, Any], tmp_path: Path
) -> None:
    """Oracle: what `ActivationStore` reads of each address, bit by bit; the last shard is short."""
    store = make_store(tmp_path, n_rows=75, ctx_len=16, d=5, shard_tokens=512, form=(dtype, compression))
    for site in ("a", "b"):
        pieces = [reader["read_shard"](store.path, site, shard) for shard in range(store.n_shards)]
        found, wanted = np.concatenate(pieces).astype(np.float32), store.read(site, 0, store.n_tokens)
        assert found.tobytes() == wanted.float().numpy().tobytes()


def test_the_reader_reads_embeddings(reader: dict[str, Any], tmp_path: Path) -> None:
    """Oracle: `ActivationStore`, bit by bit."""
    path, _ = make_embeddings(tmp_path)
    found = reader["read_shard"](path, "embedding", 1)
    assert found.tobytes() == ActivationStore(path).read("embedding", 16, 32).numpy().tobytes()


def test_the_reader_needs_what_the_page_says() -> None:
    """Oracle: its own import statements."""
    named = [
        name for node in ast.walk(ast.parse(CODE)) if isinstance(node, ast.Import) for name in node.names
    ]
    modules = {node.module for node in ast.walk(ast.parse(CODE)) if isinstance(node, ast.ImportFrom)}
    assert {name.name for name in named} | modules == {"base64", "json", "pathlib", "numpy", "numcodecs"}


@pytest.mark.parametrize("shard", [0, 3])
def test_the_orders_are_as_the_page_says(shard: int, reader: dict[str, Any]) -> None:
    """Oracle: the text; and the package's own permutation, for the reader too."""
    (told,) = re.findall(rf"([\d, ]+) in shard {shard}\b", PAGE)
    assert [int(number) for number in told.split(",")] == permutation(8, SHUFFLE_KEY, shard).tolist()
    assert np.array_equal(reader["order"](5000, shard), permutation(5000, SHUFFLE_KEY, shard))

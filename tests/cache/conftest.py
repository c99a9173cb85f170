"""Tokens, the store that is made of them, and the values that it must hold."""

import shutil
from pathlib import Path

import pytest
from caching import N_ROWS, cache, hidden_states, tokenized
from torch import Tensor

from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.tokens import TokenStore


@pytest.fixture(scope="module")
def tokens(corpus: Path, tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """150 rows of 32 tokens, some held out."""
    store = tokenized(corpus, tokenizer_folder, tmp_path_factory.mktemp("tokens") / "tokens")
    assert store.n_rows == N_ROWS
    assert 10 < store.held_out_R.sum() < 100
    return store


@pytest.fixture(scope="module")
def neox(tiny_models: dict[str, str]) -> str:
    return tiny_models["neox"]


@pytest.fixture(scope="module")
def made(tokens: TokenStore, neox: str, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """A finished store of two sites; tests that change one work on a copy."""
    return cache(tokens, neox, tmp_path_factory.mktemp("made") / "acts", layers=(0, 1))


@pytest.fixture
def copied(made: ActivationStore, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.path, tmp_path / "acts"))


@pytest.fixture(scope="module")
def truth(tokens: TokenStore, neox: str) -> dict[str, Tensor]:
    """fp32 hidden states of the two sites of `made`."""
    return {f"layers.{i}": hidden_states(tokens, neox, i) for i in (0, 1)}

"""The store that the tests of figures share."""

from pathlib import Path

import pytest
import torch
from pipeline import Pipeline
from reconstructions import D
from stores import make_store

from saemill.common.stores.activations import ActivationStore


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """400 rows of 16 tokens at site `a`, far from the origin."""
    values = torch.randn(400 * 16, D, generator=torch.Generator().manual_seed(1)) * 3 + 20
    folder = tmp_path_factory.mktemp("assess")
    return make_store(folder, n_rows=400, ctx_len=16, d=D, shard_tokens=1000, values_TD=values)


@pytest.fixture(scope="module")
def causal(
    tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, str], tokenizer_folder: str, corpus: Path
) -> Pipeline:
    return Pipeline(
        tmp_path_factory.mktemp("causal"), tiny_models["neox"], tokenizer_folder, corpus, "layers.1"
    )

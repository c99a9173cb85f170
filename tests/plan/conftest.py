"""A tiny model's tokens, activations and run, which plans are made of."""

from pathlib import Path

import pytest
from pipeline import Pipeline


@pytest.fixture(scope="module")
def made(
    tiny_models: dict[str, str],
    tokenizer_folder: str,
    corpus: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Pipeline:
    """A finished run, not assessed."""
    folder = tmp_path_factory.mktemp("plan")
    return Pipeline(folder, tiny_models["neox"], tokenizer_folder, corpus, "layers.1", shard_tokens=512)

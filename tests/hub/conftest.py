"""A run, its activations and its tokens, to be pushed."""

from pathlib import Path

import pytest
from pipeline import Pipeline

from saemill.assess.config import AssessConfig
from saemill.assess.run import run as assess


@pytest.fixture(scope="module")
def made(
    tiny_models: dict[str, str], tokenizer_folder: str, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Pipeline:
    """A run with its assessment, its activations in several shards and its tokens."""
    folder = tmp_path_factory.mktemp("push")
    made = Pipeline(folder, tiny_models["neox"], tokenizer_folder, corpus, "layers.1", shard_tokens=1024)
    assess(AssessConfig(run=made.out, device="cpu", max_tokens=4096, model_tokens=2048, n_latents=2))
    (made.out / "checkpoint").mkdir()
    (made.out / "checkpoint" / "weights.pt").write_bytes(bytes(50_000))
    (made.out / "wandb").mkdir()
    (made.out / "wandb" / "debug.log").write_text("a log")
    return made

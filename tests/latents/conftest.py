"""A run of a tiny model, assessed, that the tests of all formats export."""

from pathlib import Path

import pytest
from assessments import brief
from pipeline import Pipeline

from saemill.assess.run import run as assess


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, str], tokenizer_folder: str, corpus: Path
) -> Pipeline:
    """Two TopK SAEs at layers.1 of a GPT-NeoX, with an assessment in the run's folder."""
    folder = tmp_path_factory.mktemp("latents")
    made = Pipeline(folder, tiny_models["neox"], tokenizer_folder, corpus, "layers.1")
    assess(brief(made, made.out))
    return made

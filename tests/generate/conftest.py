"""A second model."""

import json
import shutil

import pytest
import transformers

from saemill.demo import MODEL


@pytest.fixture(scope="module")
def other(tiny_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random GPT-2 with a tokenizer, in a folder named `other`; 301 of its 8,192 ids end a text."""
    folder = tmp_path_factory.mktemp("models") / "other"
    shutil.copytree(tiny_models["gpt2"], folder)
    model = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(model | {"eos_token_id": [0, *range(500, 800)]}))
    transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return str(folder)

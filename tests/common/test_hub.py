"""Names of models and tokenizers that lead nowhere."""

from pathlib import Path

import pytest

from saemill.common.errors import ConfigError
from saemill.common.hub import loading
from saemill.common.models.sites import load_model_config
from saemill.common.models.tokenizer import load_tokenizer


@pytest.mark.parametrize("name", ["./modle", "/absent/model", "~/model", "runs/of/model", "models/a/"])
def test_a_path_that_leads_nowhere_is_never_looked_for_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: an empty folder; the loader is not even called."""
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(ConfigError, match=r"^cannot load the model .*: no such folder"),
        loading("model", name),
    ):
        pytest.fail("asked the hub")
    with pytest.raises(ConfigError, match=r"^cannot load the model .*: no such folder"):
        load_model_config(name, None)
    with pytest.raises(ConfigError, match=r"^cannot load the tokenizer .*: no such folder"):
        load_tokenizer(name, None)


def test_what_may_be_a_path_or_an_id_is_told_as_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: `models` is a folder here, `owner` is none, and a plain name has no folder to be in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    messages = {}
    for name in ("models/pythai", "owner/pythia", "pythia"):
        with pytest.raises(ConfigError) as caught, loading("model", name):
            raise OSError("not on the hub")
        messages[name] = str(caught.value)
    assert messages == {
        "models/pythai": "cannot load the model 'models/pythai': no such folder in models, and as a hub id: "
        "not on the hub",
        "owner/pythia": "cannot load the model 'owner/pythia': not on the hub",
        "pythia": "cannot load the model 'pythia': not on the hub",
    }


def test_a_models_folder_without_tokenizer_is_no_tokenizer(tiny_models: dict[str, str]) -> None:
    """Oracle: weights and config alone; transformers would make an empty vocabulary of them."""
    with pytest.raises(ConfigError, match="there is a model, but no tokenizer"):
        load_tokenizer(tiny_models["neox"], None)

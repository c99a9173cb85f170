"""Models that bring code of their own, and how attention is computed: on request, and then recorded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from caching import cache, tokenized
from families import GROUPED

from saemill.common.errors import ConfigError
from saemill.common.models.cached import check_model, load_model
from saemill.common.models.model import fingerprint_model
from saemill.common.stores.activations import ActivationStore
from saemill.sites import describe

pytestmark = pytest.mark.usefixtures("one_thread")

CODE = """
import transformers

class OwnConfig(transformers.LlamaConfig):
    model_type = "of_its_own"

class OwnModel(transformers.LlamaModel):
    config_class = OwnConfig

    def forward(self, *arguments, **named):
        output = super().forward(*arguments, **named)
        output.last_hidden_state = output.last_hidden_state + 1
        return output

class OwnForCausalLM(transformers.LlamaForCausalLM):
    config_class = OwnConfig
"""
PLACES = {
    "AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel", "AutoModelForCausalLM": "own.OwnForCausalLM"
}  # fmt: skip


def own_model(folder: Path, places: dict[str, str], vocab_size: int) -> str:
    """A Llama of random weights that comes as code beside its config."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**GROUPED | {"vocab_size": vocab_size})
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "own.py").write_text(CODE)
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    content |= {"model_type": "of_its_own", "auto_map": places, "architectures": ["OwnForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


@pytest.mark.parametrize("has_base", [True, False], ids=["a base model", "a model with its head alone"])
def test_own_code_is_run_when_it_is_trusted(
    has_base: bool, tmp_path: Path, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: transformers' Llama with the same weights; without the flag it is refused, and told by name."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    places = {name: place for name, place in PLACES.items() if has_base or name != "AutoModel"}
    folder = own_model(tmp_path / "own", places, 8192)
    with pytest.raises(ConfigError, match=r"brings code of its own.*`saemill cache`.* --trust-remote-code"):
        describe(folder, None)
    assert "layers.0…2.mlp:in" in describe(folder, None, trust_remote_code=True)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": f"one {i} two"}) for i in range(400)))
    tokens = tokenized(corpus, tokenizer_folder, tmp_path / "tokens", max_tokens=8 * 32)
    with pytest.raises(ConfigError, match="--trust-remote-code"):
        cache(tokens, folder, tmp_path / "acts")
    store = cache(tokens, folder, tmp_path / "acts", trust_remote_code=True, attn_implementation="eager")
    assert (store.settings.trust_remote_code, store.settings.attn_implementation) == (True, "eager")
    model = load_model(None, store, None, torch.device("cpu"))
    assert check_model(None, model, store) == "the very files that were cached"
    assert type(model.model).__name__ == "OwnForCausalLM"
    assert model.model.config._attn_implementation == "eager"
    ids = torch.from_numpy(store.tokens.rows(0, 2).astype("int64"))
    plain = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        states = plain.model(ids, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(store.read("layers.1", 0, 64), states.flatten(0, 1).bfloat16())


def test_code_is_part_of_what_a_model_is_known_by(tmp_path: Path) -> None:
    """Oracle: a model whose code has changed is another one, where code is run."""
    folder = own_model(tmp_path / "own", PLACES, 8192)
    untrusted, trusted = (fingerprint_model(folder, None, trusts) for trusts in (False, True))
    (tmp_path / "own" / "own.py").write_text(CODE + "\n")
    assert fingerprint_model(folder, None, False) == untrusted
    assert fingerprint_model(folder, None, True) != trusted


def test_attention_is_as_the_store_has_it(
    tokenizer_folder: str, tiny_models: dict[str, str], tmp_path: Path
) -> None:
    """Oracle: the store's settings; another attention is refused by name, none is taken for the store's."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": f"one {i} two"}) for i in range(400)))
    tokens = tokenized(corpus, tokenizer_folder, tmp_path / "tokens", max_tokens=8 * 32)
    out, model = tmp_path / "acts", tiny_models["neox"]
    cache(tokens, model, out, attn_implementation="eager")
    cache(tokens, model, out, sites=("layers.0",))
    assert ActivationStore(out).settings.attn_implementation == "eager"
    with pytest.raises(ConfigError, match="attn_implementation"):
        cache(tokens, model, out, sites=("layers.0",), attn_implementation="sdpa")

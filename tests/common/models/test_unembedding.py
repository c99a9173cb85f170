"""The unembedding with the final norm folded in, read without the rest of the model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from saemill.common.models import unembedding
from saemill.common.models.unembedding import NoUnembeddingError, load_unembedding

SIZES = {
    "vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 32, "head_dim": 6,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "LayerNorm": lambda: transformers.GPTNeoXConfig(
        **{k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")}
    ),
    "tied, short keys": lambda: transformers.GPT2Config(vocab_size=60, n_embd=24, n_layer=2, n_head=4),
    "RMSNorm": lambda: transformers.LlamaConfig(**SIZES),
    "1 + weight, tied": lambda: transformers.Gemma2Config(**SIZES),
}


def made(folder: Path, kind: str) -> Any:
    """A model of random weights, its norms too, saved in several files."""
    torch.manual_seed(3)
    model: Any = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]())
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter)
    model.save_pretrained(folder, max_shard_size="4KB")
    return model.eval()


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_of_directions_are_the_models_own(kind: str, tmp_path: Path) -> None:
    """Oracle: transformers' norm and head on a vector and on its opposite, whose difference has no bias."""
    model = made(tmp_path, kind)
    head, base = model.get_output_embeddings(), model.base_model
    norm = next(m for name, m in base.named_children() if name in ("final_layer_norm", "ln_f", "norm"))
    rows = torch.randn(5, 24)
    with torch.no_grad():
        plus, minus = (head(norm(sign * rows[None]))[0] for sign in (1, -1))
    wanted = (plus - minus)[:, :50]
    wanted = wanted - wanted.mean(1, keepdim=True)
    logits = load_unembedding(str(tmp_path), None, 50).logits(rows)
    scale = (wanted * logits).sum(1, keepdim=True) / (logits * logits).sum(1, keepdim=True)
    assert bool((scale > 0).all())
    torch.testing.assert_close(logits * scale, wanted, rtol=1e-4, atol=1e-3)


def test_only_these_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the files that are opened for tensors, beside where the checkpoint's index has the two."""
    made(tmp_path, "RMSNorm")
    opened = []

    def noted(file: Path, framework: str) -> Any:
        opened.append(Path(file).name)
        return safe_open(file, framework=framework)

    monkeypatch.setattr(unembedding, "safe_open", noted)
    load_unembedding(str(tmp_path), None, 60)
    where = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    wanted = {where["weight_map"][key] for key in ("lm_head.weight", "model.norm.weight")}
    assert set(opened) == wanted


def test_models_without_one_are_refused(tiny_models: dict[str, str], tmp_path: Path) -> None:
    """Oracle: the message names what the model is."""
    with pytest.raises(NoUnembeddingError, match=r"BertForMaskedLM.* no causal language model"):
        load_unembedding(tiny_models["bert"], None, 100)

"""Sites in TransformerLens' terms: names both ways, and the tensors behind them."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from peers import require_peers, run_in_peers

from saemill.common.models.architecture import Architecture
from saemill.common.models.sites import watch
from saemill.common.sae.formats.hooks import BLOCKS, Hook, Kind, hook_of, layer_of, site_of

TINY: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
EXTRA: dict[str, dict[str, Any]] = {
    "gpt_neo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
}
"""What a family's config calls otherwise."""

KINDS: tuple[Any, ...] = get_args(Kind)
HOOKS = [Hook(layer, kind) for layer in (0, 1) for kind in KINDS]

numbers = st.integers(0, 200)
kinds = st.sampled_from(KINDS)


@given(st.sampled_from(sorted(BLOCKS)), numbers, kinds)
def test_names_map_both_ways(model_type: str, layer: int, kind: Any) -> None:
    """Oracle: the inverse; every hook of a known model has one site, but that between an attention and an MLP
    that stand side by side. What enters a block left the one before, and OLMo 2's MLP takes the residual."""
    hook = Hook(layer, kind)
    site = site_of(hook.name, model_type)
    if site is None:
        assert (kind, BLOCKS[model_type].resid_mid) == ("resid_mid", None)
        return
    same = hook
    if kind == "resid_pre" and layer > 0:
        same = Hook(layer - 1, "resid_post")
    elif kind == "resid_mid" and model_type == "olmo2":
        same = Hook(layer, "mlp_in")
    assert hook_of(site, model_type) == same
    assert layer_of(site) == same.layer


@given(
    st.sampled_from(sorted(BLOCKS)), st.text() | st.from_regex(r"[a-z._]*\.?\d+\.?[a-z._]*", fullmatch=True)
)
def test_other_names_have_no_place(model_type: str, name: str) -> None:
    """Oracle: whatever has a hook is the site of that hook, and the other way round."""
    if hook := hook_of(name, model_type):
        same = site_of(hook.name, model_type)
        assert same == name or name.endswith(":in")
    if site := site_of(name, model_type):
        hook = hook_of(site, model_type)
        assert hook is not None
        assert hook.name == name or name.endswith(("resid_pre", "resid_mid"))


@pytest.mark.parametrize(
    ("site", "model_type", "name"),
    [
        ("layers.6", "gpt_neox", "blocks.6.hook_resid_post"),
        ("layers.6.post_attention_layernorm", "gpt_neox", "blocks.6.mlp.hook_in"),
        ("h.11.ln_2", "gpt2", "blocks.11.mlp.hook_in"),
        ("layers.3.pre_feedforward_layernorm", "gemma2", "blocks.3.mlp.hook_in"),
        ("layers.3.post_attention_layernorm", "olmo2", "blocks.3.hook_attn_out"),
        ("layers.6.attention", "gpt_neox", "blocks.6.hook_attn_out"),
        ("h.11.mlp", "gpt2", "blocks.11.hook_mlp_out"),
        ("layers.0.self_attn", "llama", "blocks.0.hook_attn_out"),
        ("layers.3.post_feedforward_layernorm", "gemma2", "blocks.3.hook_mlp_out"),
        ("layers.3.mlp", "gemma2", None),
        ("layers.6.attention.dense:in", "gpt_neox", "blocks.6.attn.hook_z"),
        ("h.11.mlp.c_proj:in", "gpt2", "blocks.11.mlp.hook_post"),
        ("h.11.ln_2:in", "gpt2", "blocks.11.hook_resid_mid"),
        ("layers.3.self_attn.o_proj:in", "gemma2", "blocks.3.attn.hook_z"),
        ("layers.0:in", "llama", "blocks.0.hook_resid_pre"),
        ("layers.3.self_attn:in", "llama", None),
        ("layers.06", "gpt_neox", None),
        ("layers.6.mlp.act", "gpt_neox", None),
        ("encoder.layer.6", "bert", None),
        ("embed_in", "gpt_neox", None),
    ],
)  # fmt: skip
def test_names_by_hand(site: str, model_type: str, name: str | None) -> None:
    """Oracle: names written by hand."""
    hook = hook_of(site, model_type)
    assert (hook and hook.name) == name
    if name:
        assert site_of(name, model_type) == site
    assert site_of("blocks.6.attn.hook_pattern", model_type) is None


@pytest.mark.parametrize(
    ("site", "name"),
    [("layers.6:in", "blocks.6.hook_resid_pre"), ("layers.6.mlp:in", "blocks.6.mlp.hook_in")],
)
def test_a_second_site_of_a_hook(site: str, name: str) -> None:
    """Oracle: names written by hand; the tensor is that of the site which the hook is read as."""
    hook = hook_of(site, "llama")
    assert hook is not None
    assert hook.name == name
    assert site_of(name, "llama") in ("layers.5", "layers.6.post_attention_layernorm")


def make_model(folder: Path, model_type: str) -> Any:
    """A random model of two blocks on disk, with norms that are not the identity."""
    torch.manual_seed(0)
    known = transformers.AutoConfig.for_model(model_type).to_dict()
    given = (
        TINY | {name: value for name, value in GROUPED.items() if name in known} | EXTRA.get(model_type, {})
    )
    config = transformers.AutoConfig.for_model(model_type, **given)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for weight in model.parameters():
        weight.data = torch.randn_like(weight) * 0.2 + 0.1
    model.save_pretrained(folder)
    return model


def test_hooks_see_the_sites_activations(tmp_path: Path, tokenizer_folder: str) -> None:
    """Oracle: TransformerLens, run on a model of every type; where a norm follows the MLP, the MLP's own
    output is another tensor."""
    require_peers()
    ids = np.arange(24).reshape(2, 12) + 1
    np.save(tmp_path / "ids.npy", ids)
    jobs = []
    for model_type in BLOCKS:
        make_model(tmp_path / model_type, model_type)
        jobs.append(
            {"do": "hooks", "model": tmp_path / model_type, "tokenizer": tokenizer_folder,
             "ids": tmp_path / "ids.npy", "out": tmp_path / f"{model_type}.npz",
             "names": [hook.name for hook in HOOKS]}
        )  # fmt: skip
    run_in_peers(tmp_path, *jobs)
    for model_type in BLOCKS:
        seen = activations(tmp_path / model_type, ids)
        with np.load(tmp_path / f"{model_type}.npz") as theirs:
            hooked = {site: hook for site in seen if (hook := hook_of(site, model_type))}
            assert {hook for hook in hooked.values()} >= {
                hook for hook in HOOKS if hook.kind != "resid_mid" and site_of(hook.name, model_type)
            }
            for site, hook in hooked.items():
                value = torch.from_numpy(theirs[hook.name])
                value = value.flatten(2) if hook.kind == "z" else value  # head by head
                torch.testing.assert_close(seen[site], value)
            if BLOCKS[model_type].mlp_out != "mlp":
                other = torch.from_numpy(theirs["blocks.1.hook_mlp_out"])
                assert not torch.allclose(seen["layers.1.mlp"], other, rtol=0.1)


def activations(model: Path, ids: np.ndarray[Any, Any]) -> dict[str, torch.Tensor]:
    """What is at each site, as the cache stage captures it."""
    base = transformers.AutoModel.from_pretrained(model, attn_implementation="eager").eval()
    modules, seen = dict(base.named_modules()), {}
    for site in Architecture(base.config).widths:
        watch(modules, site, lambda x, site=site: seen.update({site: x.clone()}))
    with torch.no_grad():
        base(input_ids=torch.from_numpy(ids))
    return seen

"""Sites in TransformerLens' terms: names both ways, and the tensors behind them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from peers import require_peers, run_in_peers

from saemill.common.models.architecture import Architecture
from saemill.common.models.sites import first_output
from saemill.common.sae.formats.hooks import BLOCKS, Hook, hook_of, layer_of, site_of

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

KINDS: tuple[Any, ...] = ("resid_post", "attn_out", "mlp_in", "mlp_out")
HOOKS = [Hook(layer, kind) for layer in (0, 1) for kind in KINDS]

numbers = st.integers(0, 200)
kinds = st.sampled_from(KINDS)


@given(st.sampled_from(sorted(BLOCKS)), numbers, kinds)
def test_names_map_both_ways(model_type: str, layer: int, kind: Any) -> None:
    """Oracle: the inverse; every hook of a known model has one site, but that of an MLP without a norm."""
    hook = Hook(layer, kind)
    site = site_of(hook.name, model_type)
    if site is None:
        assert (kind, BLOCKS[model_type].mlp_in) == ("mlp_in", None)
        return
    assert hook_of(site, model_type) == hook
    assert layer_of(site) == layer
    if kind == "resid_post":
        assert site_of(f"blocks.{layer + 1}.hook_resid_pre", model_type) == site


@given(
    st.sampled_from(sorted(BLOCKS)), st.text() | st.from_regex(r"[a-z._]*\.?\d+\.?[a-z._]*", fullmatch=True)
)
def test_other_names_have_no_place(model_type: str, name: str) -> None:
    """Oracle: whatever has a hook is the site of that hook, and the other way round."""
    if hook := hook_of(name, model_type):
        assert site_of(hook.name, model_type) == name
    if site := site_of(name, model_type):
        hook = hook_of(site, model_type)
        assert hook is not None
        assert hook.name == name or (hook.kind == "resid_post" and name.endswith("resid_pre"))


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
    assert site_of("blocks.0.hook_resid_pre", model_type) is None
    assert site_of("blocks.6.attn.hook_z", model_type) is None


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
            for hook in HOOKS:
                if (site := site_of(hook.name, model_type)) is None:
                    continue  # before an MLP without a norm
                ours = seen[site]
                torch.testing.assert_close(ours, torch.from_numpy(theirs[hook.name]))
            if BLOCKS[model_type].mlp_out != "mlp":
                other = torch.from_numpy(theirs["blocks.1.hook_mlp_out"])
                assert not torch.allclose(seen["layers.1.mlp"], other, rtol=0.1)


def activations(model: Path, ids: np.ndarray[Any, Any]) -> dict[str, torch.Tensor]:
    """What each module that can be a site gives, as the cache stage captures it."""
    base = transformers.AutoModel.from_pretrained(model, attn_implementation="eager").eval()
    sites = Architecture(base.config).widths
    seen = {}
    for name, module in base.named_modules():
        if name in sites:
            module.register_forward_hook(
                lambda _m, _i, output, name=name: seen.update({name: first_output(output)})
            )
    with torch.no_grad():
        base(input_ids=torch.from_numpy(ids))
    return seen

"""Sites: found without weights, and the same as those of the real model."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from saemill.common.errors import ConfigError
from saemill.common.models.architecture import Architecture
from saemill.common.models.sites import load_model_config

KINDS = ("neox", "llama", "gpt2", "bert")
BLOCKS = {"neox": "layers", "llama": "layers", "gpt2": "h", "bert": "encoder.layer"}
WIDTHS = {
    "neox": {"layers.0.attention": 32, "layers.1.mlp": 32, "layers.1.mlp.dense_h_to_4h": 64},
    "llama": {
        "layers.0.self_attn": 32,
        "layers.1.mlp": 32,
        "layers.2.self_attn.k_proj": 16,
        "layers.0.self_attn.o_proj:in": 32,
        "layers.1.mlp.down_proj:in": 64,
        "layers.2.mlp:in": 32,
    },
    "gpt2": {"h.0.attn": 32, "h.1.mlp": 32, "h.2.mlp.c_fc": 128, "h.0.attn.c_attn": 96},
    "bert": {"encoder.layer.0.attention": 32, "encoder.layer.1.intermediate": 64, "embeddings": 32},
}
REFUSED = {
    "neox": ("layers", "rotary_emb"),
    "llama": ("layers", "rotary_emb"),
    "gpt2": ("h", "wpe"),
    "bert": ("encoder", "encoder.layer", "pooler", "pooler.dense"),
}


@pytest.fixture(scope="module")
def architectures(tiny_models: dict[str, str]) -> dict[str, Architecture]:
    return {kind: Architecture(load_model_config(tiny_models[kind], None)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_widths_are_those_of_the_real_model(
    kind: str, architectures: dict[str, Architecture], tiny_models: dict[str, str]
) -> None:
    """Oracle: hooks on the loaded weights, run on 4 rows of 7 tokens; and widths known by hand. Poolers,
    which a model with its head lacks, are no sites."""
    model = transformers.AutoModel.from_pretrained(tiny_models[kind]).eval()
    seen: dict[str, int] = {}

    def note(site: str, x: object) -> None:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or "pooler" in site:
            return
        if x.shape[:2] == (4, 7) and x.dim() == 3:
            seen[site] = x.shape[2]

    def before(name: str) -> Any:
        def hook(_module: object, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            note(f"{name}:in", given[0] if given else named.get("hidden_states"))

        return hook

    def after(name: str) -> Any:
        def hook(_module: object, _inputs: object, output: Any) -> None:
            note(name, output[0] if isinstance(output, tuple) else output)

        return hook

    for name, module in model.named_modules():
        if name:
            module.register_forward_pre_hook(before(name), with_kwargs=True)
            module.register_forward_hook(after(name))
    with torch.no_grad():
        model(input_ids=torch.arange(28).reshape(4, 7) + 1)
    assert architectures[kind].widths == seen
    assert WIDTHS[kind].items() <= seen.items()
    assert architectures[kind].blocks == [f"{BLOCKS[kind]}.{i}" for i in range(3)]


def test_no_weight_is_allocated() -> None:
    """Oracle: one MLP matrix of this model would take 48 GiB, its embedding 16 TiB."""
    config = transformers.LlamaConfig(
        vocab_size=2**26, hidden_size=2**16, intermediate_size=3 * 2**16, num_hidden_layers=2
    )
    assert Architecture(config).widths["layers.1.mlp.gate_proj"] == 3 * 2**16


@pytest.mark.parametrize("kind", KINDS)
def test_residual_names_the_block_in_any_model(kind: str, architectures: dict[str, Architecture]) -> None:
    """Oracle: the block's own path, written out."""
    architecture = architectures[kind]
    block = BLOCKS[kind]
    for i in range(3):
        (site,) = architecture.resolve((), (f"residual.{i}",))
        assert (site.name, site.width) == (f"{block}.{i}", 32)
        assert architecture.resolve((i,), ()) == architecture.resolve((i - 3,), ()) == [site]
    every = architecture.resolve((), ("residual.*",))
    assert [site.name for site in every] == [f"{block}.{i}" for i in range(3)]


def test_sites_come_once_and_in_the_models_order(architectures: dict[str, Architecture]) -> None:
    """Oracle: the order in which GPT-NeoX runs, written out."""
    sites = architectures["neox"].resolve((-1, 0, 0), ("residual.2", "layers.*.mlp", "embed_in"))
    assert [site.name for site in sites] == [
        "embed_in", "layers.0", "layers.0.mlp", "layers.1.mlp", "layers.2", "layers.2.mlp",
    ]  # fmt: skip


def test_globs_match_sets_and_single_characters(architectures: dict[str, Architecture]) -> None:
    """Oracle: the paths written out; `*` crosses dots, as in `fnmatch`."""
    names = [site.name for site in architectures["llama"].resolve((), ("layers.[02].*attn", "nor?"))]
    assert names == ["layers.0.self_attn", "layers.2.self_attn", "norm"]
    deep = architectures["llama"].resolve((), ("layers.1.*_proj",))
    assert sum("self_attn" in site.name for site in deep) == 4
    assert sum("mlp" in site.name for site in deep) == 3
    inputs = architectures["llama"].resolve((), ("layers.*.mlp.down*:in", "residual.1:in", "layers.[01].mlp"))
    assert [site.name for site in inputs] == [
        "layers.0.mlp", "layers.0.mlp.down_proj:in", "layers.1:in", "layers.1.mlp",
        "layers.1.mlp.down_proj:in", "layers.2.mlp.down_proj:in",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "wrong", "near"),
    [
        ("neox", "layers.1.mpl", "layers.1.mlp"),
        ("llama", "layers.2.self_atn", "layers.2.self_attn"),
        ("gpt2", "h.0.atn", "h.0.attn"),
        ("gpt2", "residual.7", "residual.2"),
        ("bert", "encoder.layers.1", "encoder.layer.1"),
    ],
)
def test_a_misspelt_name_is_told_the_near_ones(
    kind: str, wrong: str, near: str, architectures: dict[str, Architecture]
) -> None:
    """Oracle: the name that was meant."""
    with pytest.raises(ConfigError) as error:
        architectures[kind].resolve((), (wrong,))
    assert repr(wrong) in str(error.value)
    assert near in str(error.value).split("did you mean ")[1]


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in REFUSED[kind]])
def test_modules_without_one_vector_per_token_are_refused(
    kind: str, name: str, architectures: dict[str, Architecture]
) -> None:
    """Oracle: modules known to give a tuple of angles, one vector per row or position, or nothing."""
    assert name in architectures[kind].modules
    with pytest.raises(ConfigError, match="does not give one vector per token") as error:
        architectures[kind].resolve((0,), (name,))
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("embed_in:in", r"embed_in:in takes \[2, 3\]|embed_in:in takes a Tensor"),
        ("layers.0.attentoin:in", "did you mean layers.0.attention"),
    ],
)
def test_inputs_that_are_no_sites_are_refused(
    name: str, why: str, architectures: dict[str, Architecture]
) -> None:
    """Oracle: an embedding takes ids; a misspelt module is told the near one, without the :in."""
    with pytest.raises(ConfigError, match=why) as error:
        architectures["neox"].resolve((), (name,))
    if "embed" in name:
        advised = str(error.value).split("such as ")[1].split(", …")[0].split(", ")
        assert all(architectures["neox"].resolve((), (site,)) for site in advised)


@pytest.mark.parametrize("layer", [3, -4, 100])
def test_a_layer_that_is_not_there_is_refused(layer: int, architectures: dict[str, Architecture]) -> None:
    """Oracle: the range of a model of 3 blocks."""
    with pytest.raises(ConfigError, match=rf"-3\.\.2 for GPTNeoXModel, got {layer}"):
        architectures["neox"].resolve((0, layer), ())


def test_an_unknown_model_is_refused(tmp_path: Path) -> None:
    """Oracle: an empty folder is no model."""
    with pytest.raises(ConfigError, match="cannot load the model"):
        load_model_config(str(tmp_path), None)


@pytest.mark.parametrize("kind", KINDS)
def test_the_config_is_left_as_it_was(kind: str, tiny_models: dict[str, str]) -> None:
    """Oracle: the config before; the padding id among it, which the search for sites takes out."""
    config = load_model_config(tiny_models[kind], None)
    before = config.to_dict()
    Architecture(config)
    assert config.pad_token_id == 0
    assert config.to_dict() == before


def test_a_mixture_of_experts_is_looked_into() -> None:
    """Oracle: its size; the kernels of its experts refuse fp32 on the meta device."""
    config = transformers.MixtralConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    sites = Architecture(config).resolve((-1,), ("layers.0.mlp",))
    assert [(site.name, site.width) for site in sites] == [("layers.0.mlp", 32), ("layers.1", 32)]


def test_a_module_that_runs_several_times_is_refused() -> None:
    """Oracle: ALBERT's layers are one module run 3 times, so that its output is no one vector per token."""
    config = transformers.AlbertConfig(
        vocab_size=99, embedding_size=16, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=64,
    )  # fmt: skip
    architecture = Architecture(config)
    with pytest.raises(ConfigError, match="name sites by glob"):
        architecture.resolve((0,), ())
    with pytest.raises(ConfigError, match="does not give one vector per token"):
        architecture.resolve((), ("encoder.albert_layer_groups.0.albert_layers.0",))
    (site,) = architecture.resolve((), ("embeddings",))
    assert (site.name, site.width) == ("embeddings", 16)

"""`saemill sites`: what is listed of a model, and what is said of it."""

from pathlib import Path
from typing import Any

import families
import pytest
from command_line import call

from saemill.common.errors import ConfigError
from saemill.common.models.architecture import Architecture
from saemill.sites import describe

pytestmark = pytest.mark.usefixtures("one_thread")


def lines_of(text: str) -> dict[str, str]:
    """The lines of a listing, by the names of their sites."""
    return {line.split()[0]: " ".join(line.split()[1:]) for line in text.splitlines() if line[:2] == "  "}


def config_alone(family: str, folder: Path) -> str:
    """A folder with a model's config and nothing else."""
    (families.CAUSAL | families.OTHERS)[family]().save_pretrained(folder)
    return str(folder)


def test_a_config_alone_tells_the_sites(tmp_path: Path) -> None:
    """Oracle: Llama's modules and TransformerLens' names, written by hand."""
    folder = config_alone("llama", tmp_path)
    lines = lines_of(describe(folder, None))
    assert lines["layers.0…2"] == "D 32 residual stream after the block blocks.*.hook_resid_post"
    assert lines["layers.0…2.mlp"] == "D 32 output of LlamaMLP blocks.*.hook_mlp_out"
    assert lines["layers.0…2.mlp.down_proj:in"] == "D 64 input of Linear blocks.*.mlp.hook_post"
    assert lines["layers.0…2.self_attn.o_proj:in"] == "D 32 input of Linear blocks.*.attn.hook_z"
    assert lines["layers.0…2.mlp:in"] == "D 32 = layers.*.post_attention_layernorm blocks.*.mlp.hook_in"
    assert lines["layers.0…2.self_attn.k_proj"] == "D 16 output of Linear"
    assert lines["layers.0…2.input_layernorm:in"] == "D 32 = layers.*:in"
    every = describe(folder, None, every=True).splitlines()
    widths = Architecture(families.CAUSAL["llama"]()).widths
    assert every == [f"{site}  {width}" for site, width in widths.items()]


def test_globs_choose_what_is_listed(tmp_path: Path) -> None:
    """Oracle: the globs; layers that are left out show in the range."""
    folder = config_alone("gpt2", tmp_path)
    assert list(lines_of(call("sites", folder, "--sites", "h.[02].mlp,h.*.attn.c_proj:in"))) == [
        "h.0…2.attn.c_proj:in", "h.0,2.mlp",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"did you mean h\.0\.mlp"):
        describe(folder, None, globs=("h.0.mpl",))
    with pytest.raises(ConfigError, match=r"no module of GPT2Model matches 'x'; `saemill sites MODEL` lists"):
        describe(folder, None, globs=("x",))


@pytest.mark.parametrize(
    ("family", "tower", "site"),
    [("llava", "language_model", "language_model.layers.0…2"), ("t5", "encoder", "encoder.block.0…2")],
)
def test_the_part_that_reads_text_is_named(family: str, tower: str, site: str, tmp_path: Path) -> None:
    """Oracle: LLaVA's and T5's paths, written out; nothing of what does not run is listed."""
    told = describe(config_alone(family, tmp_path), None)
    assert f"of which {tower} is run on text" in told
    lines = lines_of(told)
    assert site in lines
    assert all(name.startswith(f"{tower}") for name in lines)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("gpt2", {"h.0…2.mlp": "added to the residual stream as it is"}),
        ("bloom", {"h.0…2.mlp": "the whole residual stream, with what h.*.mlp.dense_4h_to_h adds to it"}),
        (
            "gemma2",
            {"layers.0…2.mlp": "added to the residual stream after layers.*.post_feedforward_layernorm"},
        ),
        ("granite", {"layers.0…2.self_attn": "added to the residual stream, times 0.22"}),
    ],
)
def test_the_weights_tell_what_is_there(family: str, expected: dict[str, str], tmp_path: Path) -> None:
    """Oracle: transformers' code, read; all layers say the same, so that each kind has one line."""
    families.make(family, str(tmp_path))
    lines = lines_of(call("sites", tmp_path, "--check"))
    for site, what in expected.items():
        assert what in lines[site]


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    """Oracle: an empty folder."""
    with pytest.raises(ConfigError, match="cannot load the model"):
        describe(str(tmp_path), None)


def test_same_tensors_are_told(tmp_path: Path) -> None:
    """Oracle: GPT-NeoX's attention and MLP read norms of their own; a dropout that drops nothing is the
    tensor before."""
    same: dict[str, Any] = Architecture(families.CAUSAL["gpt_neox"]()).same
    assert same["layers.1.attention:in"] == "layers.1.input_layernorm"
    assert same["layers.1.mlp:in"] == "layers.1.post_attention_layernorm"
    assert same["layers.1.post_mlp_dropout"] == "layers.1.mlp"
    assert "layers.1.mlp" not in same
    assert "layers.1.mlp.dense_4h_to_h:in" in same or "layers.1.mlp.act" not in same

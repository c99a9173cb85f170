"""Sets of transcoders for circuit-tracer: from runs, and layer by layer back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from caching import cache, tokenized
from command_line import call
from hub import Hub
from peers import require_peers, run_in_peers
from saes import ROUNDING, make_transcoder
from safetensors.torch import load_file, save_file
from torch import Tensor
from training import config

from saemill import Sae
from saemill.common.errors import ConfigError, StoreError
from saemill.train.run import run

D, N_LAYERS = 32, 3
KINDS = ("topk", "relu", "jumprelu", "batchtopk", "gated", "matryoshka")


def transcoders(folder: Path, model: str, architecture: str, **shape: Any) -> list[Path]:
    """One of each layer of the tiny GPT-NeoX, all of them other ones, saved."""
    places = []
    for layer in range(N_LAYERS):
        sae = make_transcoder(architecture, d=D, e=D, **shape)
        sites = {
            end: f"layers.{layer}.{name}"
            for end, name in (("site", "post_attention_layernorm"), ("target_site", "mlp"))
        }
        origin = sites | {"model": model, "revision": None}
        own = replace(sae.parts, config=replace(sae.config, provenance=origin))
        own.W_enc.data = own.W_enc.roll(layer, 0)
        places.append(folder / f"{architecture}-{layer}")
        Sae.of(own).save(places[-1])
    return places


def by_the_layout(folder: Path, x_LTD: Tensor) -> tuple[Tensor, Tensor]:
    """Oracle: what circuit-tracer's README and loader say of a set, densely. Latents [L, T, F] and
    predictions [L, T, D]."""
    told = yaml.safe_load((folder / "config.yaml").read_text())
    assert told["model_kind"] == "transcoder_set"
    latents, predictions = [], []
    for layer, x_TD in enumerate(x_LTD):
        p = load_file(folder / f"layer_{layer}.safetensors")
        z = x_TD @ p["W_enc"].T + p["b_enc"]
        if told["activation"] == "topk":
            f = z * torch.zeros_like(z).scatter(-1, z.topk(told["k"]).indices, 1.0)
        elif "activation_function.threshold" in p:
            f = z * (z > p["activation_function.threshold"])
        else:
            f = torch.relu(z)
        latents.append(f)
        predictions.append(f @ p["W_dec"] + p["b_dec"] + (x_TD @ p["W_skip"].T if "W_skip" in p else 0))
    return torch.stack(latents), torch.stack(predictions)


def by_saemill(places: list[Path], x_LTD: Tensor) -> tuple[Tensor, Tensor]:
    latents, predictions = [], []
    for place, x_TD in zip(places, x_LTD, strict=True):
        sae = Sae.load(place)
        prediction, acts, indices = sae(x_TD)
        latents.append(torch.zeros(len(x_TD), sae.config.num_latents).scatter_add(1, indices, acts))
        predictions.append(prediction)
    return torch.stack(latents), torch.stack(predictions)


@pytest.fixture(scope="module")
def x_LTD() -> Tensor:
    return 2 * torch.randn(N_LAYERS, 50, D, generator=torch.Generator().manual_seed(0)) + 1


@pytest.mark.parametrize("has_skip", [False, True])
@pytest.mark.parametrize("architecture", KINDS)
def test_a_set_computes_the_same_and_comes_back(
    tmp_path: Path, tiny_models: dict[str, str], x_LTD: Tensor, architecture: str, has_skip: bool
) -> None:
    """Oracle: the layout, written a second time; and each transcoder that was exported, bit by bit."""
    places = transcoders(tmp_path, tiny_models["neox"], architecture, has_skip=has_skip)
    call("export", *places, "--format", "circuit-tracer", "-o", tmp_path / "set")
    for theirs, ours in zip(by_the_layout(tmp_path / "set", x_LTD), by_saemill(places, x_LTD), strict=True):
        torch.testing.assert_close(ours, theirs, **ROUNDING)
    told = yaml.safe_load((tmp_path / "set" / "config.yaml").read_text())
    assert (told["feature_input_hook"], told["feature_output_hook"]) == ("mlp.hook_in", "mlp.hook_out")
    for layer, place in enumerate(places):
        call("import", tmp_path / "set" / f"layer_{layer}.safetensors", "-o", tmp_path / f"back-{layer}")
        for file in ("cfg.json", "sae.safetensors"):
            assert (tmp_path / f"back-{layer}" / file).read_bytes() == (place / file).read_bytes()


def test_circuit_tracer_loads_a_set(tmp_path: Path, tiny_models: dict[str, str], x_LTD: Tensor) -> None:
    """Oracle: circuit-tracer's own loader of local sets, its latents and predictions; of TopK, which it reads
    from the hub alone, none."""
    require_peers()
    np.save(tmp_path / "x.npy", x_LTD.numpy())
    jobs, expected = [], {}
    for architecture, has_skip in (
        ("relu", False),
        ("jumprelu", True),
        ("batchtopk", False),
        ("gated", True),
    ):
        out = tmp_path / f"{architecture}-set"
        places = transcoders(tmp_path, tiny_models["neox"], architecture, has_skip=has_skip)
        call("export", *places, "--format", "circuit-tracer", "-o", out)
        expected[out] = by_saemill(places, x_LTD)
        jobs.append(
            {"do": "load_set", "folder": out, "x": tmp_path / "x.npy", "out": out.with_suffix(".npz")}
        )
    run_in_peers(tmp_path, *jobs)
    for out, (latents, predictions) in expected.items():
        with np.load(out.with_suffix(".npz")) as theirs:
            torch.testing.assert_close(latents, torch.from_numpy(theirs["latents"]), **ROUNDING)
            torch.testing.assert_close(predictions, torch.from_numpy(theirs["predictions"]), **ROUNDING)


def test_a_run_is_a_set(
    corpus: Path, tokenizer_folder: str, tiny_models: dict[str, str], tmp_path: Path
) -> None:
    """Oracle: the run's transcoders, one by one on the store's activations; of two for a layer the message
    names both, and names given in place of the run choose."""
    tokens = tokenized(corpus, tokenizer_folder, tmp_path / "tokens")
    reads = [f"layers.{layer}.post_attention_layernorm" for layer in range(N_LAYERS)]
    predicts = [f"layers.{layer}.mlp" for layer in range(N_LAYERS)]
    store = cache(tokens, tiny_models["neox"], tmp_path / "acts", sites=(*reads, *predicts))
    changes: dict[str, Any] = {
        "site": tuple(reads), "target_site": tuple(predicts), "architecture": ("batchtopk",),
        "k": (4,), "num_latents": (48,), "max_tokens": 256 * 4,
    }  # fmt: skip
    places = run(config(store, tmp_path / "one", **changes))
    call("export", tmp_path / "one", "--format", "circuit-tracer", "-o", tmp_path / "set")
    x_LTD = torch.stack([store.read(site, 0, 300).float() for site in reads])
    for theirs, ours in zip(by_the_layout(tmp_path / "set", x_LTD), by_saemill(places, x_LTD), strict=True):
        torch.testing.assert_close(ours, theirs, **ROUNDING)
    two = run(config(store, tmp_path / "two", **changes | {"num_latents": (48, 64)}))
    with pytest.raises(
        ConfigError, match=r"one transcoder per layer, got two for layer 0: .*f48.* and .*f64"
    ):
        call("export", tmp_path / "two", "--format", "circuit-tracer", "-o", tmp_path / "x")
    wide = [place for place in two if "f64" in place.name]
    call("export", *wide, "--format", "circuit-tracer", "-o", tmp_path / "wide")


def test_what_a_set_cannot_hold_is_refused(tmp_path: Path, tiny_models: dict[str, str]) -> None:
    """Oracle: the messages; nothing is written."""
    model = tiny_models["neox"]
    first, second, third = transcoders(tmp_path, model, "topk")
    wide, _, _ = transcoders(tmp_path / "wide", model, "topk", f=48)
    skips, _, _ = transcoders(tmp_path / "skip", model, "topk", has_skip=True)
    thresholds, _, _ = transcoders(tmp_path, model, "jumprelu")
    other = Sae.load(first)
    other.config.provenance["target_site"] = "layers.1.mlp"
    other.save(tmp_path / "other")
    plain = make_transcoder(d=D, e=D + 1)
    plain.config.provenance.update(site="layers.0.post_attention_layernorm", target_site="layers.0.mlp")
    plain.save(tmp_path / "narrow")
    parts = Sae.load(first).parts
    Sae.of(replace(parts, config=replace(parts.config, architecture="groupmax"))).save(tmp_path / "groupmax")
    for given, message in (
        ([tmp_path / "groupmax", second, third], "GroupMax"),
        ([first, second], "a transcoder for each of the model's 3 layers, got none for 2"),
        ([wide, second, third], "same number of latents, got 48 at layer 0 and 40 at layer 1"),
        ([skips, second, third], "same skip connection, got one at layer 0 and none at layer 1"),
        ([thresholds, second, third], "same k, got thresholds at layer 0 and 5 at layer 1"),
        (
            [tmp_path / "other", second, third],
            r"from layers\.0\.post_attention_layernorm to layers\.0\.mlp and ",
        ),
        ([tmp_path / "narrow", second, third], "between sites of one width, got 32 and 33 at layer 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            call("export", *given, "--format", "circuit-tracer", "--model", model, "-o", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="saelens has a folder for each SAE, got 2 SAEs"):
        call("export", first, second, "--format", "saelens", "-o", tmp_path / "out")


def theirs(folder: Path, **told: Any) -> Path:
    """A layer as circuit-tracer writes it, without a word of saemill."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(4)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in
               {"W_enc": (40, 12), "b_enc": (40,), "W_dec": (40, 12), "b_dec": (12,)}.items()}  # fmt: skip
    save_file(tensors, folder / "layer_2.safetensors")
    config = {
        "model_name": "user/model", "model_kind": "transcoder_set", "feature_input_hook": "hook_resid_mid",
        "feature_output_hook": "hook_mlp_out", "scan": "a-set",
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config | told))
    return folder / "layer_2.safetensors"


def test_a_set_of_others_is_read(tmp_path: Path, hub: Hub) -> None:
    """Oracle: what the files say, from a folder and from the hub, of which two files are asked for; and the
    formula."""
    file = theirs(tmp_path / "set")
    sae = Sae.load(file)
    origin = sae.config.provenance
    assert (origin["hook_name"], origin["hook_name_out"]) == (
        "blocks.2.hook_resid_mid",
        "blocks.2.hook_mlp_out",
    )
    assert (sae.config.architecture, sae.config.d_out, origin["model"]) == ("relu", 12, "user/model")
    x_TD = torch.randn(9, 12, generator=torch.Generator().manual_seed(1))
    p = load_file(file)
    predicted = torch.relu(x_TD @ p["W_enc"].T + p["b_enc"]) @ p["W_dec"] + p["b_dec"]
    torch.testing.assert_close(sae(x_TD).reconstruction, predicted, **ROUNDING)
    with pytest.raises(StoreError, match=r"name one of the SAEs in it: .*layer_2\.safetensors"):
        Sae.load(file.parent)
    hub.put_folder("user/set", tmp_path)
    assert Sae.load("hf://user/set/set/layer_2.safetensors").config == sae.config
    assert hub.downloaded() == ["set/config.yaml", "set/layer_2.safetensors"]


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"model_kind": "cross_layer_transcoder"}, "model_kind must be 'transcoder_set'"),
        ({"activation": "topk"}, "k must be a whole number of 1 or more, got None"),
        ({"activation": "topk", "k": 41}, "k must be in 1..num_latents"),
        ({"activation": 3}, "activation must be text, got 3"),
    ],
)
def test_bad_sets_are_refused_by_the_field(tmp_path: Path, told: dict[str, Any], message: str) -> None:
    """Oracle: the message; it names the config."""
    file = theirs(tmp_path / "set", **told)
    with pytest.raises((ConfigError, StoreError), match=message) as caught:
        Sae.load(file)
    assert "set/" in str(caught.value)


def test_damaged_layers_are_refused(tmp_path: Path) -> None:
    """Oracle: the messages, of a tensor too many, a tensor of another shape, a cut file, no config and one
    that is no YAML."""
    file = theirs(tmp_path / "set")
    whole, tensors = file.read_bytes(), load_file(file)
    for changed, message in (
        ({"log_thresholds": torch.zeros(40)}, "log_thresholds must be absent"),
        ({"b_dec": torch.zeros(11)}, r"b_dec must be \(12,\)"),
        ({"W_enc": torch.zeros(40)}, r"W_enc must be a matrix \[F, D\], got \(40,\)"),
    ):
        save_file(tensors | changed, file)
        with pytest.raises((StoreError, ConfigError), match=message):
            Sae.load(file)
    file.write_bytes(whole[:-9])
    with pytest.raises(StoreError, match="is damaged"):
        Sae.load(file)
    save_file(tensors, file, {"saemill": json.dumps({"provenance": {"site": 3}})})
    with pytest.raises(StoreError, match="tells of the SAE's origin what it cannot"):
        Sae.load(file)
    (file.parent / "config.yaml").write_text("a: [")
    with pytest.raises(StoreError, match=r"config\.yaml is damaged"):
        Sae.load(file)
    (file.parent / "config.yaml").unlink()
    with pytest.raises(StoreError, match=r"holds no transcoders: config\.yaml is missing"):
        Sae.load(file)

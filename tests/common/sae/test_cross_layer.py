"""Cross-layer transcoders: what they compute, their files, and circuit-tracer's."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from command_line import call
from hub import Hub
from hypothesis import given
from hypothesis import strategies as st
from layered import whole_decoder, whole_encoder
from peers import require_peers, run_in_peers
from saes import ROUNDING, make_cross_layer, ours
from safetensors.torch import load_file, save_file
from torch import Tensor

from saemill import Sae, SaeConfig
from saemill.common.errors import ConfigError, StoreError
from saemill.common.sae import layers
from saemill.common.sae.parts import Joined

L, D = 3, 12


def x_of(n_layers: int = L, d: int = D, n_tokens: int = 50) -> Tensor:
    return 2 * torch.randn(n_tokens, n_layers * d, generator=torch.Generator().manual_seed(0)) + 1


def densely(sae: Sae, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Oracle: one transcoder with whole matrices, zeros where nothing is read or written; of k each layer's
    latents have an equal share. float64 latents [T, F] and predictions."""
    n, f = sae.config.n_layers, sae.config.num_latents
    pre = x_TD.double() @ whole_encoder(sae.W_enc.double(), n).T + sae.b_enc.double()
    if sae.threshold is None:
        assert sae.config.k is not None
        each = pre.view(-1, n, f // n)
        kept = each.topk(sae.config.k // n).indices
        codes = torch.relu(each * torch.zeros_like(each).scatter(2, kept, 1)).view_as(pre)
    else:
        codes = pre * (pre > sae.threshold)
    return codes, codes @ whole_decoder(sae.W_dec.double(), n) + sae.b_dec.double()


@given(n_layers=st.integers(2, 5), each=st.integers(1, 4), width=st.integers(1, 3))
def test_weights_and_whole_matrices_are_the_same(n_layers: int, each: int, width: int) -> None:
    """Oracle: whole matrices, row by row; codes in slots, in any order, some unused."""
    f, generator = n_layers * each, torch.Generator().manual_seed(each)
    w_dec = torch.randn(layers.n_rows(f, n_layers), width, generator=generator, dtype=torch.float64)
    whole = whole_decoder(w_dec, n_layers)
    torch.testing.assert_close(layers.whole_rows(w_dec, n_layers), whole, rtol=0, atol=0)
    assert sum(rows.numel() for rows in layers.blocks(w_dec, n_layers)) == w_dec.numel()
    unit = torch.nn.functional.normalize(whole, dim=1)
    torch.testing.assert_close(whole_decoder(layers.unit_rows(w_dec, n_layers), n_layers), unit)
    codes = torch.randn(7, f, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(layers.decode(codes, w_dec, n_layers), codes @ whole)
    slots = torch.stack([torch.randperm(f, generator=generator) for _ in codes])[:, : f // 2 + 1]
    acts = codes.gather(1, slots)
    kept = torch.zeros_like(codes).scatter(1, slots, acts)
    torch.testing.assert_close(layers.decode_active(acts, slots, w_dec, n_layers), kept @ whole)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu", "relu"])
def test_it_computes_what_whole_matrices_do_and_comes_back(tmp_path: Path, architecture: str) -> None:
    """Oracles: whole matrices in float64; the transcoders of its layers, added up; the files, bit by bit."""
    sae, x_TD = make_cross_layer(architecture, e=7), x_of()
    expected, predicted = densely(sae, x_TD)
    latents, found = ours(sae, x_TD)
    torch.testing.assert_close(latents.double(), expected, **ROUNDING)
    torch.testing.assert_close(found.double(), predicted, rtol=1e-5, atol=1e-4)
    assert (latents > 0).sum() > len(x_TD)
    parts = zip(sae.layers, x_TD.split(D, 1), strict=True)
    added = [torch.nn.functional.pad(one(x)[0], (7 * layer, 0)) for layer, (one, x) in enumerate(parts)]
    torch.testing.assert_close(torch.stack(added).sum(0), found, rtol=1e-5, atol=1e-4)
    assert sae(x_TD.view(5, 10, -1)).reconstruction.shape == (5, 10, L * 7)
    sae.save(tmp_path / "a")
    again = Sae.load(tmp_path / "a")
    assert again.config == sae.config
    assert "cross-layer transcoder of 3 layers" in again.config.described
    for name, weights in sae.parts.weights.items():
        assert torch.equal(again.parts.weights[name], weights)
    for name in ("saelens", "dictionary_learning", "sparsify"):
        with pytest.raises(ConfigError, match=f"{name} has no SAE like a cross-layer transcoder"):
            call("export", tmp_path / "a", "--format", name, "-o", tmp_path / "x")


def test_with_decoders_of_their_own_layer_alone_it_is_a_transcoder_of_each() -> None:
    """Oracle: separate transcoders of each layer, with its weights."""
    sae, x_TD = make_cross_layer("jumprelu"), x_of()
    own = []
    for layer, rows in enumerate(layers.blocks(sae.W_dec.data, L)):
        rows[:, D:] = 0
        some = slice(10 * layer, 10 * layer + 10)
        config = SaeConfig(d_in=D, d_out=D, num_latents=10, k=None, architecture="jumprelu", provenance={})
        b_dec, threshold = sae.b_dec.data.split(D)[layer], sae.threshold
        assert threshold is not None
        own.append(
            Sae(config, sae.W_enc[some], sae.b_enc[some], rows[:, :D].clone(), b_dec, threshold.data[some])
        )
    expected = [one(x).reconstruction for one, x in zip(own, x_TD.split(D, 1), strict=True)]
    torch.testing.assert_close(sae(x_TD).reconstruction, torch.cat(expected, 1), **ROUNDING)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_out": 35}, r"predicted must be two or more sites whose widths add up to d_out \(35\)"),
        ({"num_latents": 31}, "equal shares of latents and k, got 3 and 3 sites, num_latents 31"),
        (
            {"architecture": "matryoshka", "prefixes": (10, 30)},
            "architecture of a cross-layer transcoder must be one of topk, batchtopk",
        ),
        ({"joined": ()}, "as many sites, of one width, with equal shares of latents and k, got 0 and 3"),
        ({"predicted": (), "d_out": 36}, "joined must be empty of a transcoder without predicted"),
        (
            {"joined": (Joined("a", 11, 1), Joined("b", 12, 1), Joined("c", 13, 1))},
            "as many sites, of one width",
        ),
    ],
)
def test_what_it_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    """Oracle: the messages."""
    with pytest.raises(ConfigError, match=message):
        replace(make_cross_layer().config, **changes)


def files_of(folder: Path, model: str, architecture: str = "jumprelu") -> Sae:
    """One of the tiny GPT-NeoX's three layers, saved."""
    sae = make_cross_layer(architecture, d=32, e=32, model=model, revision=None)
    sae.save(folder)
    return sae


@pytest.mark.parametrize("architecture", ["jumprelu", "batchtopk", "relu"])
def test_circuit_tracer_has_the_same_and_it_comes_back(
    tmp_path: Path, tiny_models: dict[str, str], architecture: str
) -> None:
    """Oracle: circuit-tracer's own loader, its latents and predictions, decoders read at once and one by one;
    the SAE that was exported, bit by bit; and the same weights of the files that circuit-tracer saves."""
    require_peers()
    sae, x_TD = files_of(tmp_path / "sae", tiny_models["neox"], architecture), x_of(L, 32)
    call("export", tmp_path / "sae", "--format", "circuit-tracer", "-o", tmp_path / "clt")
    np.save(tmp_path / "x.npy", np.stack([part.numpy() for part in x_TD.split(32, 1)]))
    job = {"do": "load_cross_layer", "folder": tmp_path / "clt", "x": tmp_path / "x.npy"}
    run_in_peers(tmp_path, job | {"out": tmp_path / "theirs.npz"})
    latents, predicted = ours(sae, x_TD)
    with np.load(tmp_path / "theirs.npz") as theirs:
        found = {name: torch.from_numpy(theirs[name]) for name in theirs.files}
    torch.testing.assert_close(torch.cat(list(found["latents"]), 1), latents, **ROUNDING)
    torch.testing.assert_close(torch.cat(list(found["predictions"]), 1), predicted, rtol=1e-5, atol=1e-4)

    call("import", tmp_path / "clt", "-o", tmp_path / "back")
    for file in ("cfg.json", "sae.safetensors"):
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "sae" / file).read_bytes()
    again = Path(f"{tmp_path / 'theirs.npz'}-again")
    (again / "config.yaml").write_text((tmp_path / "clt" / "config.yaml").read_text())
    call("import", again, "--model", tiny_models["neox"], "-o", tmp_path / "theirs")
    other = Sae.load(tmp_path / "theirs")
    for name, weights in sae.parts.weights.items():
        assert torch.equal(other.parts.weights[name], weights)
    assert other.config.architecture == ("relu" if architecture == "relu" else "jumprelu")
    assert other.site == sae.site
    assert other.target_site == sae.target_site
    assert [part.scale for part in other.config.predicted] == [1.0] * L


def test_one_on_the_hub_is_read_by_its_own_files(
    tmp_path: Path, tiny_models: dict[str, str], hub: Hub
) -> None:
    """Oracle: the same SAE; the files that are asked for."""
    sae = files_of(tmp_path / "sae", tiny_models["neox"])
    call("export", tmp_path / "sae", "--format", "circuit-tracer", "-o", tmp_path / "repo" / "clt")
    (tmp_path / "repo" / "clt" / "features.bin").write_bytes(b"x")
    hub.put_folder("user/clt", tmp_path / "repo")
    assert Sae.load("hf://user/clt/clt").config == sae.config
    weights = [f"clt/W_{part}_{layer}.safetensors" for part in ("dec", "enc") for layer in range(L)]
    assert hub.downloaded() == [*weights, "clt/config.yaml"]


def test_what_circuit_tracer_cannot_hold_is_refused(tmp_path: Path, tiny_models: dict[str, str]) -> None:
    """Oracle: the messages; nothing is written."""
    model = tiny_models["neox"]
    files_of(tmp_path / "topk", model, "topk")
    files_of(tmp_path / "good", model)
    make_cross_layer(n_layers=2, d=32, e=32, f=20, model=model).save(tmp_path / "two")
    make_cross_layer(d=32, e=16, model=model).save(tmp_path / "narrow")
    for names, message in (
        (["topk"], "with thresholds alone, got one with k 6; train one as batchtopk or jumprelu"),
        (["two"], "must have each of the model's 3 layers in order, got 0, 1"),
        (["narrow"], "between sites of one width, got 32 and 16"),
        (["good", "two"], "has a folder for each cross-layer transcoder, got .*good and .*two; name one"),
    ):
        places = [tmp_path / name for name in names]
        with pytest.raises(ConfigError, match=message):
            call("export", *places, "--format", "circuit-tracer", "-o", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_damaged_files_are_refused(tmp_path: Path, tiny_models: dict[str, str]) -> None:
    """Oracle: the messages, of a missing layer, a tensor of another shape, one too many, thresholds of some
    layers alone, and another kind of transcoder."""
    files_of(tmp_path / "sae", tiny_models["neox"])
    call("export", tmp_path / "sae", "--format", "circuit-tracer", "-o", tmp_path / "clt")
    decoder, encoder = (tmp_path / "clt" / f"W_{part}_1.safetensors" for part in ("dec", "enc"))
    for file, changes, message in (
        (decoder, {"W_dec_1": torch.zeros(10, 3, 32)}, r"W_dec_1 must be \(10, 2, 32\) .*got \(10, 3, 32\)"),
        (encoder, {"W_skip_1": torch.zeros(32, 32)}, "W_skip_1 must be absent"),
        (encoder, {"threshold_1": None}, r"threshold_1 must be \(10,\) .*got nothing"),
    ):
        whole = file.read_bytes()
        tensors = load_file(file) | changes
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
        with pytest.raises((StoreError, ConfigError), match=message):
            Sae.load(tmp_path / "clt")
        file.write_bytes(whole)
    Sae.load(tmp_path / "clt")
    config = tmp_path / "clt" / "config.yaml"
    told = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(told | {"model_kind": "transcoder_set"}))
    with pytest.raises(ConfigError, match="model_kind must be 'cross_layer_transcoder'"):
        Sae.load(tmp_path / "clt")
    config.write_text(yaml.safe_dump(told))
    decoder.unlink()
    with pytest.raises(StoreError, match=r"alone or missing: W_dec_1\.safetensors"):
        Sae.load(tmp_path / "clt")


def test_sites_that_do_not_fit_are_damage(tmp_path: Path) -> None:
    """Oracle: the message, of a config in which a site that is predicted is missing."""
    make_cross_layer().save(tmp_path / "a")
    cfg = json.loads((tmp_path / "a" / "cfg.json").read_text())
    cfg["predicted"] = cfg["predicted"][:2]
    (tmp_path / "a" / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises((StoreError, ConfigError), match=r"is damaged|widths add up"):
        Sae.load(tmp_path / "a")

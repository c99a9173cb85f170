"""Transcoders: what they compute, their files, and those of other tools."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import call
from peers import require_peers, run_in_peers
from saes import check_same, make_sae, make_transcoder

from saemill import Sae
from saemill.common.errors import ConfigError, StoreError
from saemill.common.sae.parts import Parts

D, E = 12, 7


def some_activations(folder: Path) -> torch.Tensor:
    x_TD = 2 * torch.randn(200, D, generator=torch.Generator().manual_seed(0)) + 1
    np.save(folder / "x.npy", x_TD.numpy())
    return x_TD


@pytest.mark.parametrize("has_skip", [False, True])
@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "relu"])
def test_they_compute_the_formula(architecture: str, has_skip: bool) -> None:
    """Oracle: z = W_enc x + b_enc, ŷ = W_decᵀ f + b_dec + W_skip x written densely in float64."""
    sae = make_transcoder(architecture, has_skip=has_skip, e=E)
    x = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(1))
    p = {name: weight.double() for name, weight in sae.parts.weights.items()}
    z = x.double() @ p["W_enc"].T + p["b_enc"]
    if architecture == "topk":
        f = torch.relu(z * torch.zeros_like(z).scatter(-1, z.topk(5).indices, 1.0))
    else:
        f = z * (z > p["threshold"])
    y = f @ p["W_dec"] + p["b_dec"] + (x.double() @ p["W_skip"].T if has_skip else 0)
    found = sae(x).reconstruction
    assert found.shape == (3, 5, E)
    torch.testing.assert_close(found.double(), y, rtol=1e-5, atol=1e-5)
    assert sae.decode(torch.empty(4, 0), torch.empty(4, 0, dtype=torch.int64), x[0, :4]).shape == (4, E)


@pytest.mark.parametrize("architecture", ["topk", "gated"])
def test_saved_and_loaded_it_is_the_same(tmp_path: Path, architecture: str) -> None:
    """Oracle: the transcoder before, bit by bit; with other weights than were saved it is refused."""
    sae = make_transcoder(architecture, has_skip=True, e=E)
    sae.save(tmp_path)
    back = Sae.load(tmp_path)
    assert back.config == sae.config
    assert all(torch.equal(weight, back.parts.weights[name]) for name, weight in sae.parts.weights.items())
    file = tmp_path / "sae.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(StoreError, match="damaged"):
        Sae.load(tmp_path)


EXPORTS = (
    *(("topk", has_skip, "sparsify", "") for has_skip in (False, True)),
    ("relu", False, "saelens", "transcoder"),
    ("relu", True, "saelens", "skip_transcoder"),
    ("jumprelu", False, "saelens", "jumprelu_transcoder"),
    ("batchtopk", True, "saelens", "jumprelu_skip_transcoder"),
)


def test_exports_compute_the_same_in_each_tool_and_come_back(tmp_path: Path) -> None:
    """Oracle: each tool's own loader and forward pass; and the transcoder that was exported, bit by bit."""
    require_peers()
    x_TD, jobs, saes = some_activations(tmp_path), [], {}
    for architecture, has_skip, tool, kind in EXPORTS:
        name = f"{architecture}-{has_skip}"
        sae = make_transcoder(architecture, has_skip=has_skip, e=D if tool == "sparsify" else E)
        sae.save(tmp_path / name)
        out = tmp_path / f"{name}-{tool}"
        call("export", tmp_path / name, "--format", tool, "-o", out)
        saes[out] = sae
        jobs.append(
            {"do": "encode", "format": tool, "folder": out, "x": tmp_path / "x.npy", "out": f"{out}.npz"}
        )
        if kind:
            assert f'"architecture": "{kind}"' in (out / "cfg.json").read_text()
        call("import", out, "-o", tmp_path / f"{name}-back")
        for file in ("cfg.json", "sae.safetensors"):
            there, back = (tmp_path / folder / file for folder in (name, f"{name}-back"))
            assert back.read_bytes() == there.read_bytes()
    run_in_peers(tmp_path, *jobs)
    for out, sae in saes.items():
        check_same(sae, x_TD, Path(f"{out}.npz"))


SAELENS: dict[str, dict[str, Any]] = {
    name: {"do": "make_saelens", "architecture": name, "d_in": D, "d_out": E, "d_sae": 40,
           "apply_b_dec_to_input": False}
    for name in ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
}  # fmt: skip
SPARSIFY: dict[str, dict[str, Any]] = {
    name: {"do": "make_sparsify", "d_in": D, "num_latents": 40, "k": 5, "transcode": True,
           "skip_connection": "skip" in name}
    for name in ("transcode", "transcode_skip")
}  # fmt: skip


def test_their_transcoders_compute_the_same_here(tmp_path: Path) -> None:
    """Oracle: transcoders of random weights that SAELens and sparsify make and save, and their own latents
    and predictions."""
    require_peers()
    x_TD, jobs = some_activations(tmp_path), []
    for tool, made in (("saelens", SAELENS), ("sparsify", SPARSIFY)):
        for name, job in made.items():
            folder = tmp_path / tool / name
            jobs += [
                job | {"folder": folder},
                {"do": "encode", "format": tool, "folder": folder, "x": tmp_path / "x.npy",
                 "out": f"{folder}.npz"},
            ]  # fmt: skip
    run_in_peers(tmp_path, *jobs)
    for tool, made in (("saelens", SAELENS), ("sparsify", SPARSIFY)):
        for name in made:
            sae = Sae.load(tmp_path / tool / name)
            assert (sae.W_skip is not None) == ("skip" in name)
            check_same(sae, x_TD, tmp_path / tool / f"{name}.npz")


def test_transcoders_of_before_sparsify_1_subtract_b_dec(tmp_path: Path) -> None:
    """Oracle: sparsify's own loader, which takes what does not say `transcode` for what it was then; the
    config of the run says it here."""
    require_peers()
    x_TD, folder = some_activations(tmp_path), tmp_path / "run/layers.3.mlp"
    job = {"d_in": D, "num_latents": 40, "k": 5, "skip_connection": True, "normalize_decoder": False}
    run_in_peers(tmp_path, {"do": "make_sparsify", "folder": folder, **job})
    cfg = json.loads((folder / "cfg.json").read_text())
    del cfg["transcode"]
    (folder / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(ConfigError, match="skip_connection must be False"):
        Sae.load(folder)
    (tmp_path / "run/config.json").write_text(json.dumps({"transcode": True, "model": "a", "dataset": "b"}))
    asked = {"do": "encode", "format": "sparsify", "folder": folder, "x": tmp_path / "x.npy"}
    run_in_peers(tmp_path, asked | {"out": tmp_path / "old.npz"})
    sae = Sae.load(folder)
    check_same(sae, x_TD, tmp_path / "old.npz")
    assert (sae.site, sae.target_site) == (None, "layers.3.mlp")


@pytest.mark.parametrize(
    ("architecture", "e", "tool", "message"),
    [
        ("topk", E, "sparsify", "between sites of one width, got 12 and 7"),
        ("jumprelu", D, "sparsify", "sparsify has SAEs with k alone"),
        ("topk", D, "saelens", "SAELens has transcoders with thresholds, and none with k"),
        ("topk", D, "dictionary_learning", "dictionary_learning has no transcoders"),
    ],
)
def test_what_a_tool_has_not_is_refused(
    tmp_path: Path, architecture: str, e: int, tool: str, message: str
) -> None:
    """Oracle: the message."""
    make_transcoder(architecture, e=e).save(tmp_path / "t")
    with pytest.raises(ConfigError, match=message):
        call("export", tmp_path / "t", "--format", tool, "-o", tmp_path / "out")


def test_a_skip_is_of_transcoders_and_needs_the_input() -> None:
    """Oracle: the messages."""
    parts = make_sae().parts
    with pytest.raises(ConfigError, match="W_skip must be absent from an SAE"):
        Parts(parts.config, parts.W_enc, parts.b_enc, parts.W_dec, parts.b_dec, None, torch.zeros(12, 12))
    sae = make_transcoder(has_skip=True)
    codes = sae.encode(torch.randn(2, D))
    with pytest.raises(ConfigError, match=r"decodes with its input: decode\(acts, indices, x\)"):
        sae.decode(*codes)

"""SAEs whose activations keep their signs: their encoder, their files, and who else has them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peers import require_peers, run_in_peers
from saes import check_same, make_sae, make_transcoder, ours
from safetensors.torch import load_file, save_file

from saemill import Sae
from saemill.common.errors import ConfigError
from saemill.common.sae import formats
from saemill.common.sae.formats import circuit_tracer
from saemill.hub import kinds


def made() -> Sae:
    """The SAE of random weights, of 40 latents 5 by absolute value."""
    parts = make_sae().parts
    return Sae.of(replace(parts, config=replace(parts.config, architecture="abs-topk")))


def test_encode_and_decode_follow_the_definition() -> None:
    """Oracle: the dense formula: of each token the entries that fewer than k exceed in size."""
    sae, x_TD = made(), 2 * torch.randn(30, 12, generator=torch.Generator().manual_seed(2))
    z = (x_TD - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    wanted = z * ((z.abs()[:, None] > z.abs()[:, :, None]).sum(2) < 5)
    latents, reconstruction = ours(sae, x_TD)
    torch.testing.assert_close(latents, wanted)
    torch.testing.assert_close(reconstruction, wanted @ sae.W_dec + sae.b_dec)
    assert ((latents < 0).any(), (latents > 0).any()) == (True, True)
    assert sae.encode(x_TD).active.sum(1).tolist() == [5] * 30


def test_it_is_saved_and_loaded_as_what_it_is(tmp_path: Path) -> None:
    """Oracle: the SAE that was saved; an activation that sparsify does not know; the card's words."""
    sae, x_TD = made(), torch.randn(9, 12)
    sae.save(tmp_path / "s")
    cfg = json.loads((tmp_path / "s" / "cfg.json").read_text())
    found = Sae.load(tmp_path / "s")
    assert (cfg["activation"], cfg["k"]) == ("abs-topk", 5)
    assert (found.config.architecture, found.config.described) == ("abs-topk", "abs-topk, k 5, 40 latents")
    assert torch.equal(ours(found, x_TD)[1], ours(sae, x_TD)[1])
    assert kinds.formula({"s": cfg}).startswith("f = z where |z| is among the k largest, with z = W_enc")
    assert kinds.tools(cfg) == ["saelens"]


def test_saelens_computes_the_same_and_back(tmp_path: Path) -> None:
    """Oracle: SAELens' own abstopk, encoder and decoder: of what is exported, of what it saves itself, and of
    a checkpoint of its training, which scales by the decoder's norms."""
    require_peers()
    x_TD = 2 * torch.randn(50, 12, generator=torch.Generator().manual_seed(3))
    np.save(tmp_path / "x.npy", x_TD.numpy())
    formats.save(made().parts, "saelens", tmp_path / "exported")
    shape = {"do": "make_saelens", "architecture": "abstopk", "d_in": 12, "d_sae": 40, "k": 5}
    jobs = [
        {"do": "encode", "format": "saelens", "folder": tmp_path / name, "x": tmp_path / "x.npy",
         "out": tmp_path / f"{name}.npz"}
        for name in ("exported", "theirs", "trained")
    ]  # fmt: skip
    run_in_peers(
        tmp_path,
        {**shape, "folder": tmp_path / "theirs"},
        {**shape, "folder": tmp_path / "trained", "training": True},
        *jobs,
    )
    check_same(made(), x_TD, tmp_path / "exported.npz")
    for name in ("theirs", "trained"):
        found = Sae.load(tmp_path / name)
        check_same(found, x_TD, tmp_path / f"{name}.npz")
        assert found.config.architecture == "abs-topk"


def test_what_sparsify_once_called_signed_is_read_as_it_is(tmp_path: Path) -> None:
    """Oracle: the same weights as an `abs-topk` SAE. Its `signed` ranked by absolute value and kept signs;
    beside another activation it is refused."""
    make_sae().save(tmp_path / "s")
    file = tmp_path / "s" / "cfg.json"
    cfg = json.loads(file.read_text())
    del cfg["saemill"]
    save_file(load_file(tmp_path / "s" / "sae.safetensors"), tmp_path / "s" / "sae.safetensors")
    file.write_text(json.dumps(cfg | {"signed": True}))
    found, x_TD = Sae.load(tmp_path / "s"), torch.randn(9, 12)
    assert found.config.architecture == "abs-topk"
    assert torch.equal(ours(found, x_TD)[1], ours(made(), x_TD)[1])
    file.write_text(json.dumps(cfg | {"signed": True, "activation": "groupmax"}))
    with pytest.raises(ConfigError, match="signed must be False of groupmax, got True"):
        Sae.load(tmp_path / "s")


@pytest.mark.parametrize("name", ["sparsify", "dictionary_learning"])
def test_tools_without_it_get_no_other_sae_in_its_place(tmp_path: Path, name: str) -> None:
    """Oracle: the message; nothing is written."""
    with pytest.raises(ConfigError, match=f"{name} has no SAEs whose activations may be negative"):
        formats.save(made().parts, name, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_transcoders_of_it_are_refused_by_circuit_tracer() -> None:
    """Oracle: the message."""
    parts = make_transcoder().parts
    signed = replace(parts, config=replace(parts.config, architecture="abs-topk"))
    with pytest.raises(ConfigError, match="no transcoders whose activations may be negative"):
        circuit_tracer.check([signed])

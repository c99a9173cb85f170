"""SAEs that keep the largest latent of each group: their encoder, their files, and who else has them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peers import require_peers, run_in_peers
from saes import check_same, make_sae, ours

from saemill import Sae
from saemill.common.errors import ConfigError
from saemill.common.sae import formats
from saemill.common.sae.groupmax import groupmax
from saemill.hub import kinds


def made(k: int = 5) -> Sae:
    """The SAE of random weights, 40 latents in k groups."""
    parts = make_sae().parts
    return Sae.of(replace(parts, config=replace(parts.config, architecture="groupmax", k=k)))


def dense(sae: Sae, x_TD: torch.Tensor) -> torch.Tensor:
    """The definition, latent by latent: a latent is active if no other of its group is larger."""
    z = torch.relu((x_TD - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
    k, f = sae.config.k or 0, sae.config.num_latents
    groups = torch.arange(f) * k // f
    largest = torch.stack([z[:, groups == groups[i]].amax(1) for i in range(f)], 1)
    return z * (z == largest)


@pytest.mark.parametrize("k", [1, 5, 40])
def test_encode_and_decode_follow_the_definition(k: int) -> None:
    """Oracle: the dense formula, latent by latent."""
    sae, x_TD = made(k), 2 * torch.randn(30, 12, generator=torch.Generator().manual_seed(2))
    latents, reconstruction = ours(sae, x_TD)
    wanted = dense(sae, x_TD)
    torch.testing.assert_close(latents, wanted)
    torch.testing.assert_close(reconstruction, wanted @ sae.W_dec + sae.b_dec)
    assert k < 40 or (latents > 0).sum(1).max() > 20


def test_of_equal_entries_one_is_taken_and_a_nan_is_seen() -> None:
    """Oracle: by hand."""
    pre_TF = torch.tensor([[1.0, 1.0, -1.0, -2.0], [3.0, torch.nan, 0.0, 4.0]])
    values, indices = groupmax(pre_TF, 2)
    assert values[0].tolist() == [1, 0]
    assert indices[0, 0] in (0, 1)
    assert values[1].isnan().tolist() == [True, False]
    assert indices[1].tolist() == [1, 3]


def test_it_is_saved_and_loaded_as_what_it_is(tmp_path: Path) -> None:
    """Oracle: the SAE that was saved; sparsify's name of the activation in its config; the card's words."""
    sae, x_TD = made(), torch.randn(9, 12)
    sae.save(tmp_path / "s")
    cfg = json.loads((tmp_path / "s" / "cfg.json").read_text())
    found = Sae.load(tmp_path / "s")
    assert (cfg["activation"], cfg["k"]) == ("groupmax", 5)
    assert (found.config.architecture, found.config.described) == ("groupmax", "groupmax, k 5, 40 latents")
    assert torch.equal(ours(found, x_TD)[1], ours(sae, x_TD)[1])
    assert kinds.formula({"s": cfg}).startswith("f = ReLU(z) where it is the largest of its group of F/k")


def test_sparsify_computes_the_same_and_back(tmp_path: Path) -> None:
    """Oracle: sparsify's own loader, encoder and decoder, of what is exported and of what it saves itself."""
    require_peers()
    x_TD = 2 * torch.randn(50, 12, generator=torch.Generator().manual_seed(3))
    np.save(tmp_path / "x.npy", x_TD.numpy())
    formats.save(made().parts, "sparsify", tmp_path / "exported")
    config = {"activation": "groupmax", "num_latents": 40, "k": 5}
    jobs = [
        {"do": "encode", "format": "sparsify", "folder": tmp_path / name, "x": tmp_path / "x.npy",
         "out": tmp_path / f"{name}.npz"}
        for name in ("exported", "theirs")
    ]  # fmt: skip
    run_in_peers(
        tmp_path, {"do": "make_sparsify", "folder": tmp_path / "theirs", "d_in": 12, **config}, *jobs
    )
    check_same(made(), x_TD, tmp_path / "exported.npz")
    check_same(Sae.load(tmp_path / "theirs"), x_TD, tmp_path / "theirs.npz")


@pytest.mark.parametrize("name", ["saelens", "dictionary_learning"])
def test_tools_without_it_get_no_other_sae_in_its_place(tmp_path: Path, name: str) -> None:
    """Oracle: the message; nothing is written."""
    with pytest.raises(ConfigError, match=f"{name} has no GroupMax; export it as sparsify"):
        formats.save(made().parts, name, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_groups_of_unequal_size_are_refused() -> None:
    """Oracle: the message."""
    with pytest.raises(ConfigError, match=r"k must divide num_latents \(40\) of a GroupMax SAE, got 7"):
        made(7)

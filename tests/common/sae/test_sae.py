"""An SAE's meaning and its files."""

import json
from pathlib import Path

import pytest
import torch
from saes import make_sae

from saemill import Sae, SaeConfig
from saemill.common.errors import ConfigError, StoreError
from saemill.common.sae.formats.seal import sealed_again


def test_encode_and_decode_follow_the_definition() -> None:
    """Oracle: the dense formula relu(TopK(W (x − b_dec) + b)) and f·W_dec + b_dec."""
    sae = make_sae()
    x = torch.randn(3, 7, 12)
    assert sae.encode(x[0, 0]).top_acts.shape == (5,)
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    dense = torch.relu(pre * torch.zeros_like(pre).scatter(-1, pre.topk(5).indices, 1.0))
    acts, indices = sae.encode(x)
    assert acts.shape == indices.shape == (3, 7, 5)
    torch.testing.assert_close(torch.zeros_like(pre).scatter(-1, indices, acts), dense)
    torch.testing.assert_close(sae.decode(acts, indices), dense @ sae.W_dec + sae.b_dec)
    output = sae(x)
    assert output.reconstruction.shape == x.shape
    torch.testing.assert_close(output.reconstruction, dense @ sae.W_dec + sae.b_dec)


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    """Oracle: the SAE that was saved."""
    sae = make_sae()
    sae.save(tmp_path)
    again = Sae.load(tmp_path)
    assert again.config == sae.config
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(again, name), getattr(sae, name))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """Oracle: the messages."""
    with pytest.raises(StoreError, match="holds no SAE"):
        Sae.load(tmp_path)
    make_sae().save(tmp_path)
    make_sae(f=41).save(tmp_path / "other")
    own = (tmp_path / "cfg.json").read_text()
    (tmp_path / "cfg.json").write_text((tmp_path / "other" / "cfg.json").read_text())
    with pytest.raises(StoreError, match=r"sae.safetensors is damaged: .* bytes, expected"):
        Sae.load(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps(sealed_again(json.loads(own) | {"num_latents": 41})))
    with pytest.raises(StoreError, match="must be"):
        Sae.load(tmp_path)
    with pytest.raises(ConfigError, match="k must be"):
        SaeConfig(d_in=4, num_latents=8, k=9, provenance={})


def test_pre_activations_are_written_to_given_memory() -> None:
    """Oracle: those without it, of SAEs and transcoders."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 6, generator=generator)
    for d_out in (None, 4):
        config = SaeConfig(d_in=6, num_latents=9, k=2, provenance={}, d_out=d_out)
        shapes = ((9, 6), (9,), (9, d_out or 6), (d_out or 6,))
        sae = Sae(config, *(torch.randn(shape, generator=generator) for shape in shapes))
        memory = torch.empty(5, 9)
        assert sae.pre_acts(x, out=memory) is memory
        torch.testing.assert_close(memory, sae.pre_acts(x))

"""SAEs whose latents have thresholds, and SAEs within an SAE: prefixes, and several k."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from saes import make_sae, make_threshold_sae
from safetensors.torch import load_file

from saemill import Sae, SaeConfig
from saemill.common import durable
from saemill.common.errors import ConfigError, DataError, StoreError
from saemill.common.sae import formats
from saemill.common.sae.formats import seal, sparsify
from saemill.common.sae.parts import BY_THRESHOLD, Parts


def dense(sae: Sae, x: torch.Tensor) -> torch.Tensor:
    """The definition z · 1[z > θ], for all latents."""
    z = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    assert sae.threshold is not None
    return z * (z > sae.threshold)


def scattered(sae: Sae, x: torch.Tensor) -> torch.Tensor:
    """What `encode` gives, as a value of every latent; unused slots add nothing."""
    acts, indices = sae.encode(x)
    return torch.zeros(*x.shape[:-1], sae.config.num_latents).scatter_add(-1, indices, acts)


@pytest.mark.parametrize("architecture", BY_THRESHOLD)
def test_encode_and_decode_follow_the_definition(architecture: str) -> None:
    """Oracle: the dense formula; the number of slots is that of the token with the most active latents."""
    sae, x = make_threshold_sae(architecture), 2 * torch.randn(3, 7, 12)
    wanted = dense(sae, x)
    acts, indices = sae.encode(x)
    assert acts.shape == indices.shape == (3, 7, int((wanted > 0).sum(-1).max()))
    torch.testing.assert_close(scattered(sae, x), wanted)
    torch.testing.assert_close(sae.decode(acts, indices), wanted @ sae.W_dec + sae.b_dec)
    torch.testing.assert_close(scattered(sae, x[0, 0]), wanted[0, 0])
    assert not indices[acts == 0].any()


def test_no_latent_is_above_its_threshold() -> None:
    """Oracle: the definition: one unused slot, and the decoder's bias."""
    sae = make_threshold_sae("batchtopk")
    assert sae.threshold is not None
    sae.threshold.fill_(1e9)
    reconstruction, acts, indices = sae(torch.randn(4, 12))
    assert acts.shape == indices.shape == (4, 1)
    assert not acts.any()
    assert torch.equal(reconstruction, sae.b_dec.expand(4, 12))
    for shape in ((0,), (2, 0)):
        reconstruction, acts, _ = sae(torch.zeros(*shape, 12))
        assert reconstruction.shape == (*shape, 12)
        assert acts.shape == (*shape, 1)


def test_gradients_are_those_of_the_definition() -> None:
    """Oracle: autograd of the dense formula, with respect to the activations and the encoder."""
    sae, x = make_threshold_sae().requires_grad_(), torch.randn(9, 12, requires_grad=True)
    target = torch.randn(9, 12)
    found = torch.autograd.grad((sae(x).reconstruction - target).square().sum(), [x, sae.W_enc, sae.W_dec])
    reconstruction = dense(sae, x) @ sae.W_dec + sae.b_dec
    wanted = torch.autograd.grad((reconstruction - target).square().sum(), [x, sae.W_enc, sae.W_dec])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_thresholds_are_never_rounded(tmp_path: Path) -> None:
    """Oracle: the thresholds that were given, bit by bit, when weights are converted, saved and loaded."""
    sae = make_threshold_sae()
    assert sae.threshold is not None
    given = sae.threshold.clone()
    for converted in (sae.bfloat16(), sae.half(), sae.to(torch.float64)):
        assert converted.threshold is not None
        assert torch.equal(converted.threshold, given)
    sae.bfloat16().save(tmp_path)
    again = Sae.load(tmp_path)
    assert again.W_enc.dtype == torch.bfloat16
    assert again.threshold is not None
    assert torch.equal(again.threshold, given)


@pytest.mark.parametrize("architecture", BY_THRESHOLD)
def test_save_and_load_round_trip(tmp_path: Path, architecture: str) -> None:
    """Oracle: the SAE that was saved."""
    sae = make_threshold_sae(architecture)
    sae.save(tmp_path)
    again = Sae.load(tmp_path)
    assert again.config == sae.config
    for name, tensor in sae.parts.weights.items():
        assert torch.equal(again.parts.weights[name], tensor), name


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        (None, "threshold must be given exactly where k is None"),
        (torch.zeros(39), r"threshold must be float32 \(40,\), got torch.float32 \(39,\)"),
        (torch.zeros(40, dtype=torch.float64), r"threshold must be float32 \(40,\), got torch.float64"),
        (torch.full((40,), -0.5), "threshold must be 0 or more, got 40 negative values, -0.5 the least"),
    ],
)
def test_thresholds_that_are_none_are_refused(threshold: torch.Tensor | None, message: str) -> None:
    """Oracle: the messages."""
    parts = make_threshold_sae().parts
    with pytest.raises(ConfigError, match=message):
        Sae.of(replace(parts, threshold=threshold))
    with pytest.raises(ConfigError, match="given exactly where k is None, got k 5 and one"):
        replace(make_sae().parts, threshold=torch.zeros(40))
    with pytest.raises(ConfigError, match="threshold must be 0 of a ReLU SAE, got up to 1"):
        replace(make_threshold_sae("relu").parts, threshold=torch.ones(40))


def test_thresholds_that_are_not_finite_are_of_no_use(tmp_path: Path) -> None:
    """Oracle: the messages, when it encodes, is saved and is loaded. A run that diverged may write it."""
    sae = make_threshold_sae()
    assert sae.threshold is not None
    sae.threshold[3] = torch.nan
    with pytest.raises(DataError, match="1 value of threshold is NaN"):
        sae.encode(torch.ones(2, 12))
    with pytest.raises(DataError, match="1 value of threshold is NaN"):
        sae.save(tmp_path)
    sparsify.write(sae.parts, tmp_path)
    with pytest.raises(StoreError, match="1 value of threshold is NaN"):
        Sae.load(tmp_path)
    assert formats.read(tmp_path).threshold is not None


def test_a_nan_is_not_taken_for_an_inactive_latent() -> None:
    """Oracle: that of a TopK SAE, whose reconstruction of such an activation is no number either."""
    x = torch.ones(2, 12)
    x[1] = torch.nan
    reconstruction = make_threshold_sae()(x).reconstruction
    assert reconstruction[0].isfinite().all()
    assert reconstruction[1].isnan().all()
    sae = make_threshold_sae()
    sae.W_enc[2] = torch.nan
    with pytest.raises(DataError, match="12 values of W_enc are NaN"):
        sae.encode(torch.ones(2, 12))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "vanilla"}, "architecture must be one of topk, .*got 'vanilla'"),
        ({"architecture": "jumprelu"}, r"k must be None where latents have thresholds \(jumprelu\), got 5"),
        ({"k": None}, "k must be in 1..num_latents .* of a TopK SAE, got None"),
        ({"prefixes": (20, 40)}, "prefixes must be there of a Matryoshka SAE and of no other"),
        ({"architecture": "matryoshka"}, "prefixes must be there of a Matryoshka SAE"),
        ({"architecture": "matryoshka", "prefixes": (20, 39)}, r"to num_latents \(40\), got \(20, 39\)"),
        ({"architecture": "matryoshka", "prefixes": (20, 20, 40)}, "must rise from 1 or more"),
        ({"architecture": "matryoshka", "prefixes": (0, 40)}, "must rise from 1 or more"),
        ({"ks": (2, 4)}, r"ks must rise from 1 or more to k \(5\), got \(2, 4\)"),
    ],
)
def test_configs_that_contradict_themselves_are_refused(changes: dict[str, Any], message: str) -> None:
    """Oracle: the messages."""
    with pytest.raises(ConfigError, match=message):
        replace(make_sae().config, **changes)


def test_files_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    """Oracle: the message names the folder and the field, or the tensor."""
    make_threshold_sae("matryoshka").save(tmp_path)
    cfg = sparsify.read_config(tmp_path / "cfg.json")
    for changes, message in (
        ({"prefixes": [20, 39]}, r"prefixes must rise from 1 or more to num_latents \(40\), got \(20, 39\)"),
        ({"prefixes": "20"}, "prefixes must be a list of whole numbers, got '20'"),
        ({"prefixes": [20, 40.0]}, "prefixes must be a whole number of 1 or more, got 40.0"),
        ({"architecture": "topk"}, "k must be in 1..num_latents .* of a TopK SAE, got None"),
        ({"activation": "topk"}, "k must be a whole number of 1 or more, got None"),
        ({"activation": "topk", "k": 5}, "threshold must be absent from an SAE of this kind"),
        ({"activation": "relu"}, "activation must be one of topk, groupmax, abs-topk, jumprelu, got 'relu'"),
        ({"architecture": "relu", "prefixes": []}, "threshold must be 0 of a ReLU SAE, got up to 1.7"),
    ):
        durable.write_json(tmp_path / "cfg.json", seal.sealed_again({**cfg, **changes}))
        with pytest.raises((ConfigError, StoreError), match=message) as caught:
            Sae.load(tmp_path)
        assert str(tmp_path) in str(caught.value)


def test_a_prefix_is_the_codes_below_it() -> None:
    """Oracle: the whole SAE's codes, those of later latents set to 0. It is saved like any other."""
    sae, x = make_threshold_sae("matryoshka"), torch.randn(50, 12)
    assert list(sae.cuts) == ["first 10", "first 20"]
    for n in (10, 20, 40):
        cut = sae.prefix(n)
        wanted = dense(sae, x)[:, :n]
        assert cut.config.num_latents == cut.config.prefixes[-1] == n
        torch.testing.assert_close(scattered(cut, x), wanted)
        torch.testing.assert_close(cut(x).reconstruction, wanted @ sae.W_dec[:n] + sae.b_dec)
    with pytest.raises(ConfigError, match="the prefix must be one of 10, 20, 40, got 15"):
        sae.prefix(15)
    with pytest.raises(ConfigError, match="the prefix must be of a Matryoshka SAE, got 10 of a jumprelu SAE"):
        make_threshold_sae().prefix(10)


def test_a_prefix_of_a_topk_sae_has_its_own_k_largest(tmp_path: Path) -> None:
    """Oracle: the definition on the first latents; a prefix of fewer latents than k has all of them."""
    parts, x = make_sae().parts, torch.randn(50, 12)
    config = replace(parts.config, architecture="matryoshka", prefixes=(3, 20, 40), ks=(2, 4, 5))
    sae = Sae.of(replace(parts, config=config))
    sae.save(tmp_path / "sae")
    assert Sae.load(tmp_path / "sae").config == config
    z = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    for n, k in ((3, 3), (20, 5)):
        wanted = z[:, :n].topk(k).values.relu().sort().values
        torch.testing.assert_close(sae.prefix(n).encode(x).top_acts.sort().values, wanted)
    assert sae.prefix(3).config.ks == (2, 3)
    sae.prefix(20).save(tmp_path / "cut")
    assert Sae.load(tmp_path / "cut").config.prefixes == (3, 20)


def test_another_k_is_its_k_largest() -> None:
    """Oracle: a TopK SAE of these weights with that k."""
    parts, x = make_sae().parts, torch.randn(50, 12)
    sae = Sae.of(replace(parts, config=replace(parts.config, ks=(2, 3, 5))))
    wanted = Sae.of(replace(parts, config=replace(parts.config, k=3)))
    assert list(sae.cuts) == ["k 2", "k 3"]
    for found, expected in zip(sae.at_k(3)(x), wanted(x), strict=True):
        assert torch.equal(found, expected)
    with pytest.raises(ConfigError, match="k must be one of 2, 3, 5, got 4 of an SAE with k 5"):
        sae.at_k(4)
    with pytest.raises(ConfigError, match="k must be of an SAE that was trained for several"):
        wanted.at_k(2)


def test_the_files_of_a_topk_sae_are_as_they_were(tmp_path: Path) -> None:
    """Oracle: the names of fields and tensors that sparsify reads, and no others."""
    make_sae().save(tmp_path)
    assert set(load_file(tmp_path / "sae.safetensors")) == {
        "encoder.weight",
        "encoder.bias",
        "W_dec",
        "b_dec",
    }
    assert list(formats.sparsify.read_config(tmp_path / "cfg.json")) == [
        "activation", "expansion_factor", "normalize_decoder", "num_latents", "k", "multi_topk",
        "skip_connection", "transcode", "d_in", "saemill",
    ]  # fmt: skip


def test_parts_of_the_trainer() -> None:
    """Oracle: the arguments that `Learner.export` gives, by position, without thresholds."""
    sae = make_sae()
    config = SaeConfig(d_in=12, num_latents=40, k=5, provenance={})
    parts = Parts(config, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
    assert parts.threshold is None
    assert (config.architecture, config.prefixes, config.ks) == ("topk", (), ())

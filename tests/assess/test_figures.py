"""Figures at any scale, and those that cannot be computed: null with the reason, the verdict unknown."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reconstructions import ALONE, D, evalset, held_out, random_sae, reconstruct
from stores import make_store

from saemill.assess.baselines import fit_baselines
from saemill.assess.config import Thresholds
from saemill.assess.reconstruction import Reconstruction
from saemill.assess.splicing import Splicing, _kl
from saemill.assess.spread import Spread
from saemill.assess.sums import N_DRAWS, Bootstrap, DocumentSums, Ratio, Split
from saemill.assess.verdict import summary, thresholds_checks
from saemill.common.stores.statistics import Statistics

SCALES = [1e-25, 1e-8, 1.0, 1e8, 1e18]


def everyone(found: Reconstruction) -> Bootstrap:
    return Split(found.sums.documents).all


def values_of(n: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) + 1


@pytest.mark.parametrize("scale", SCALES)
def test_figures_are_those_of_float64_at_any_scale(tmp_path: Path, scale: float) -> None:
    """Oracle: numpy's float64 over all held-out rows, of which some are zero vectors, as some x̂ are."""
    x_TD = values_of(64 * 16) * scale
    x_TD[::7] = 0.0
    store = make_store(tmp_path, 64, 16, D, 500, values_TD=x_TD)
    sae = random_sae(2)
    sae.b_dec.data.zero_()  # x̂ = 0 where no latent is active: of zero vectors, and of some others
    sae.b_enc.data.fill_(-1.2 * scale)
    found = reconstruct(store, {"v": sae})
    x = held_out(store)[0].numpy().astype(np.float64)
    with torch.no_grad():
        r = sae(held_out(store)[0]).reconstruction.numpy().astype(np.float64)
    kept = np.linalg.norm(x, axis=1) > 0
    r_norm, x_norm = np.linalg.norm(r[kept], axis=1), np.linalg.norm(x[kept], axis=1)
    dot = (x[kept] * r[kept]).sum(1)
    cosine = np.divide(dot, r_norm * x_norm, out=np.zeros(len(dot)), where=r_norm > 0)
    assert 0 < (r_norm == 0).sum() < len(r_norm)
    assert 0 < (~kept).sum() < len(kept)
    expected = {
        "cosine": cosine.mean(),
        "norm_ratio": (r_norm / x_norm).mean(),
        "fvu": np.square(x - r).sum() / np.square(x - x.mean(0)).sum(),
        "mse": np.square(x - r).mean(),
    }
    metrics = found.metrics("v", everyone(found))
    assert {name: metrics[name]["value"] for name in expected} == pytest.approx(expected, rel=1e-6, abs=0)
    assert found.place("a")["n_zero"] == (~kept).sum()


@pytest.mark.parametrize("scale", SCALES)
def test_controls_do_not_depend_on_the_scale(tmp_path: Path, scale: float) -> None:
    """Oracle: the controls at scale 1: the same directions and gain, times the scale."""
    found, at_site_a = [], random_sae(0)
    at_site_a.config.provenance["site"] = "a"
    for name, factor in (("one", 1.0), ("other", scale)):
        small = make_store(tmp_path / name, 64, 16, D, 500, values_TD=values_of(64 * 16) * factor)
        x_TD = small.read("a", 0, 100)
        with torch.no_grad():
            saes = fit_baselines({"v": at_site_a}, {}, evalset(small)).saes.values()
            found.append([sae(x_TD).reconstruction.double() / factor for sae in saes])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-3)


@settings(max_examples=40)
@given(st.integers(1, 30), st.integers(0, 9), st.integers(1, 9), st.sampled_from([0.0, 1e9]))
def test_the_spread_does_not_depend_on_chunks(n: int, seed: int, size: int, offset: float) -> None:
    """Oracle: numpy's sums around the means of all, of near and of far rows, far from the cached mean."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((n, 3)) + offset
    x[generator.random(n) < 0.2] += 300
    units = generator.integers(0, 4, n)
    centre = torch.full((3,), offset + 0.5, dtype=torch.float64)
    spread = Spread(Statistics(9, centre, torch.ones(3).double(), 1.0, {0: 9}))
    far = np.concatenate(
        [
            spread.add(torch.from_numpy(x[i : i + size]), units[i : i + size].astype(np.uint64))
            for i in range(0, n, size)
        ]
    )
    np.testing.assert_array_equal(far, np.linalg.norm(x - centre.numpy(), axis=1) > 10 * spread.median)
    spread.merge(ALONE)
    near_and_far = (False, True)
    for counted, around in ((near_and_far, near_and_far), ((False,), (False,)), ((True,), near_and_far)):
        inside = np.isin(far, around)
        mean = x[inside].mean(0) if inside.any() else np.zeros(3)
        chosen = np.isin(far, counted)
        expected = np.zeros(4)
        np.add.at(expected, units[chosen], np.square(x[chosen] - mean).sum(1))
        if len(x[inside]) == 1:
            expected[:] = 0
        documents, sums = spread.squares(ALONE, counted, around)
        found = np.bincount(documents.astype(int), sums, 4)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("n_tokens", [1, 40])
def test_rows_without_variance_have_no_fvu(tmp_path: Path, n_tokens: int) -> None:
    """Oracle: one row, and many that are alike, have no variance; what is left of it is rounding."""
    x_TD = values_of(64 * 16)
    x_TD[:] = torch.where(torch.arange(len(x_TD))[:, None] % 128 // 16 == 1, torch.full((D,), 0.1), x_TD)
    store = make_store(tmp_path, 64, 16, D, 500, values_TD=x_TD)
    x, _ = held_out(store)
    if n_tokens > 1:
        store_x = x[:1].expand_as(x)
        x_TD[torch.from_numpy(held_out(store)[1])] = store_x
        store = make_store(tmp_path / "alike", 64, 16, D, 500, values_TD=x_TD)
    found = reconstruct(store, {"v": random_sae(0)}, max_tokens=n_tokens)
    metrics = found.metrics("v", everyone(found))
    reason = (
        "one token has no variance to explain"
        if n_tokens == 1
        else "the tokens are all alike: there is no variance to explain"
    )
    for name in ("fvu", "explained_variance"):
        assert (metrics[name]["value"], metrics[name]["reason"]) == (None, reason)
    assert metrics["mse"]["value"] > 0
    assert math.isinf(Split(found.sums.documents).loss(found.ratios("v")["fvu"]))


def test_long_rows_are_told_apart(tmp_path: Path) -> None:
    """Oracle: numpy over the held-out rows with and without the planted ones."""
    x_TD = values_of(400 * 16)
    x_TD[5::97] *= 100
    store = make_store(tmp_path, 400, 16, D, 1000, values_TD=x_TD)
    found = reconstruct(store, {"v": random_sae(1)})
    x = held_out(store)[0].double()
    with torch.no_grad():
        errors = (random_sae(1)(held_out(store)[0]).reconstruction.double() - x).square().sum(1)
    far = (x - x.mean(0)).norm(dim=1) > 10 * (x - x.mean(0)).norm(dim=1).median()
    squares = (x - x.mean(0)).square().sum(1)
    near = x[~far]
    metrics = found.metrics("v", everyone(found))
    assert found.n_far("a") == far.sum() > 0
    expected = {
        "fvu": errors.sum() / squares.sum(),
        "fvu_without_far": errors[~far].sum() / (near - near.mean(0)).square().sum(),
        "far_error_share": errors[far].sum() / errors.sum(),
        "far_variance_share": squares[far].sum() / squares.sum(),
    }
    for name, value in expected.items():
        assert metrics[name]["value"] == pytest.approx(float(value), rel=1e-6), name
    ordinary = reconstruct(
        make_store(tmp_path / "b", 64, 16, D, 500, values_TD=values_of(1024)), {"v": random_sae(1)}
    )
    figure = ordinary.metrics("v", everyone(ordinary))["fvu_without_far"]
    assert figure["value"] is None
    assert figure["reason"] == "no token is more than 10 times as far from the mean as the median"


def test_a_variant_that_computes_no_numbers_has_no_figures(tmp_path: Path) -> None:
    """Oracle: a decoder row that overflows float32 on some rows; the other variant keeps its figures."""
    store = make_store(tmp_path, 64, 16, D, 500, values_TD=values_of(1024))
    bad = random_sae(0)
    bad.b_dec.data.zero_()
    bad.W_dec.data[3] = 3e38
    bad.W_enc.data[3] *= 10
    found = reconstruct(store, {"bad": bad, "good": random_sae(1)})
    reason = found.unusable("bad")
    assert reason is not None
    assert reason.startswith("x̂ is not finite on ")
    assert {f["value"] for f in found.metrics("bad", everyone(found)).values()} == {None}
    assert {f["reason"] for f in found.metrics("bad", everyone(found)).values()} == {reason}
    assert found.metrics("good", everyone(found))["fvu"]["value"] is not None
    assert found.unusable("good") is None


class _Losses(Splicing):
    """Losses of 40 documents of 10 tokens."""

    def __init__(self, zero: float, spread: float = 0.0) -> None:
        self.sites, self.places, self.no_loss = {"v": "layers.1"}, {"v": {"": "layers.1"}}, None
        own = [f"layers.1/{what}" for what in ("zero", "mean", "zero_kl")]
        self.sums = DocumentSums(["n", "clean", *own, "v/ce", "v/kl"])
        generator = np.random.default_rng(0)
        for document in range(40):
            noise = spread * generator.standard_normal()
            row = [10, 30, 10 * zero + noise, 40, 20, 35, 1]
            self.sums.rows[document] = np.array(row, np.float64)


def test_where_zeros_cost_nothing_no_loss_is_recovered() -> None:
    """Oracle: the definition by hand. CE 3 untouched and 3.5 spliced; with zeros 5, 3 and 2."""
    bootstrap = Bootstrap(np.ones(40, bool))
    whole = _Losses(5.0).metrics("v", bootstrap)["loss_recovered"]
    assert whole["value"] == pytest.approx(0.75)
    for zero in (3.0, 2.0):
        figures = _Losses(zero).metrics("v", bootstrap)
        told = "zeros at layers.1 cost the model no loss, so there is none to recover"
        assert figures["loss_recovered"] == {"value": None, "reason": told}
        assert figures["loss_recovered_from_mean"]["value"] == pytest.approx(0.5)
        assert figures["delta_ce"]["value"] == pytest.approx(0.5)
        figures |= {
            name: {"value": 0.0}
            for name in ("l0", "dead_fraction", "max_decoder_cosine", "max_decoder_cosine_random")
        }
        found = thresholds_checks(figures, Thresholds(min_l0=0))
        assert (found[0]["passed"], found[0]["reason"]) == (None, told)
        assert summary(found) == "3/3, 1 unknown"
    unsure = _Losses(3.05, spread=2.0).metrics("v", bootstrap)["loss_recovered"]
    assert unsure["value"] is not None
    assert unsure["lo"] is None
    assert f"of {N_DRAWS:,} draws of documents zeros at layers.1 cost the model no loss" in unsure["reason"]


def test_a_model_that_sees_its_targets_has_no_loss_but_a_divergence() -> None:
    """Oracle: the reason everywhere but at the KL divergences."""
    losses = _Losses(5.0)
    losses.no_loss = "it looks ahead"
    figures = losses.metrics("v", Bootstrap(np.ones(40, bool)))
    assert figures.pop("kl")["value"] == pytest.approx(0.1)
    assert figures.pop("kl_zero")["value"] == pytest.approx(2)
    assert list(figures.values()) == [{"value": None, "reason": "it looks ahead"}] * len(figures)


def test_divergence_counts_impossible_tokens_as_nothing() -> None:
    """Oracle: torch's own KL divergence over the tokens that are possible."""
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    other = logits + torch.randn(5, 9, generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.kl_div(
        other.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="none"
    ).sum(1)
    never = torch.full((5, 2), -math.inf)
    found = _kl(torch.cat([logits, never], 1).log_softmax(-1), torch.cat([other, never], 1).log_softmax(-1))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)


def test_a_check_of_no_number_is_unknown() -> None:
    """Oracle: NaN is neither passed nor failed; a verdict of unknown checks says so."""
    figures: dict[str, Any] = {
        name: {"value": math.nan} for name in ("loss_recovered", "l0", "dead_fraction", "max_decoder_cosine")
    }
    found = thresholds_checks(figures | {"max_decoder_cosine_random": {"value": math.nan}}, Thresholds())
    assert [check["passed"] for check in found] == [None] * 4
    assert summary(found) == "unknown"


def test_draws_without_a_denominator_give_no_interval() -> None:
    """Oracle: one of 40 documents holds all of the denominator; about 1/e of the draws leave it out."""
    below = np.zeros(40)
    below[7] = 1
    figure = Bootstrap(np.ones(40, bool), "distinct passage").figure(
        Ratio(np.ones(40), below, "all is alike")
    )
    assert figure["value"] == 40
    assert (figure["lo"], figure["hi"]) == (None, None)
    n, _, rest = figure["reason"].removeprefix("in ").partition(" of ")
    assert rest == "2,000 draws of distinct passages all is alike"
    assert int(n) / N_DRAWS == pytest.approx(math.exp(-1), abs=0.05)

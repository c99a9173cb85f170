"""Assessment figures against their definitions, mean and identity baselines."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reconstructions import (
    D,
    constant_sae,
    evalset,
    held_out,
    over,
    random_sae,
    reconstruct,
    signed_identity,
)
from stores import make_store

from saemill.assess.baselines import fit_baselines
from saemill.assess.config import Thresholds
from saemill.assess.features import check_latents, choose_latents
from saemill.assess.sums import Bootstrap, DocumentSums, Ratio, Split
from saemill.assess.verdict import summary, thresholds_checks
from saemill.common.errors import ConfigError
from saemill.common.stores.activations import ActivationStore


def test_mean_predictor_identity_and_constant_bias(store: ActivationStore) -> None:
    """Oracles: FVU of the mean is 1, of the identity 0, and a bias c adds ‖c‖² / variance."""
    x, _ = held_out(store)
    mean = x.double().mean(0)
    shifted = mean + 2.0
    saes = {
        "mean": constant_sae(mean.float()),
        "id": signed_identity(),
        "bias": constant_sae(shifted.float()),
    }
    found = reconstruct(store, saes)
    bootstrap = over(found)
    fvu = {name: found.metrics(name, bootstrap)["fvu"]["value"] for name in saes}
    variance = float((x.double() - mean).square().sum(1).mean())
    assert fvu["mean"] == pytest.approx(1, abs=1e-6)
    assert fvu["id"] == pytest.approx(0, abs=1e-6)
    assert fvu["bias"] == pytest.approx(1 + 4 * D / variance, rel=1e-6)


def test_figures_equal_their_definitions(store: ActivationStore) -> None:
    """Oracle: float64 formulas over all held-out activations at once."""
    x, _ = held_out(store)
    sae = random_sae(0)
    found = reconstruct(store, {"v": sae})
    metrics = found.metrics("v", over(found))
    with torch.no_grad():
        out = sae(x)
    xd, rd = x.double(), out.reconstruction.double()
    sse = (xd - rd).square().sum()
    assert found.n_tokens == len(x)
    assert metrics["fvu"]["value"] == pytest.approx(float(sse / (xd - xd.mean(0)).square().sum()), rel=1e-6)
    assert metrics["explained_variance"]["value"] == pytest.approx(1 - metrics["fvu"]["value"])
    assert metrics["mse"]["value"] == pytest.approx(float(sse / xd.numel()), rel=1e-6)
    cosine = torch.nn.functional.cosine_similarity(xd, rd).mean()
    assert metrics["cosine"]["value"] == pytest.approx(float(cosine), rel=1e-6)
    assert metrics["l0"]["value"] == pytest.approx(float((out.top_acts > 0).sum(1).double().mean()))
    fired = torch.zeros(len(x), 24).scatter_(1, out.top_indices, (out.top_acts > 0).float())
    np.testing.assert_allclose(found.density("v"), fired.mean(0).numpy(), rtol=1e-6)


def test_controls_are_a_random_dictionary_and_pca(tmp_path: Path) -> None:
    """Oracles: numpy's SVD of the training tokens; the random dictionary's gain, which no other beats."""
    mixing = torch.randn(D, D, generator=torch.Generator().manual_seed(5)) * torch.linspace(3, 0.1, D)
    values = torch.randn(400 * 16, D, generator=torch.Generator().manual_seed(6)) @ mixing.T + 7
    store = make_store(tmp_path, 400, 16, D, 1000, values_TD=values)
    sae = random_sae(0, k=3, f=24)
    sae.config.provenance["site"] = "a"
    found = fit_baselines({"v": sae}, {}, evalset(store)).saes
    assert list(found) == ["random-k3-f24", "pca-k3"]
    addresses = [
        row * 16 + p
        for row in np.flatnonzero(~store.tokens.held_out_R)
        for p in range(1, 16)
        if store.tokens.rows(row, row + 1)[0][p] != 0
    ]
    x = values[torch.tensor(addresses)].double()
    mean = x.mean(0)
    axes = torch.from_numpy(np.linalg.svd((x - mean).numpy(), full_matrices=False)[2][:3])
    expected = mean + (x - mean) @ axes.T @ axes
    with torch.no_grad():
        torch.testing.assert_close(
            found["pca-k3"](x.float()).reconstruction, expected.float(), rtol=1e-3, atol=1e-3
        )
        random = found["random-k3-f24"]
        y = random(x.float()).reconstruction.double() - mean
        errors = [float((x - mean - gain * y).square().sum()) for gain in (0.99, 1, 1.01)]
        assert min(errors) == errors[1] < float((x - mean).square().sum())
    np.testing.assert_allclose(random.W_enc.detach().norm(dim=1), 1, rtol=1e-5)


def test_scale_of_the_activations_changes_nothing(tmp_path: Path) -> None:
    """Oracle: the same data times 64 (exact in binary), SAE scaled along."""
    values = torch.randn(64 * 16, D, generator=torch.Generator().manual_seed(3))
    results = []
    for factor in (1.0, 64.0):
        small = make_store(tmp_path / str(factor), 64, 16, D, 500, values_TD=values * factor)
        sae = random_sae(2)
        sae.b_dec.data.mul_(0)
        found = reconstruct(small, {"v": sae})
        metrics = found.metrics("v", over(found))
        results.append([metrics[name]["value"] for name in ("fvu", "cosine", "l0")])
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_max_tokens_takes_the_first_tokens(store: ActivationStore) -> None:
    """Oracle: the definition over the first 100 held-out tokens."""
    x, _ = held_out(store)
    found = reconstruct(store, {"v": random_sae(0)}, max_tokens=100)
    assert found.n_tokens == 100
    with torch.no_grad():
        sse = (random_sae(0)(x[:100]).reconstruction - x[:100]).square().sum()
    fvu = float(sse / (x[:100] - x[:100].mean(0)).square().sum())
    assert found.metrics("v", over(found))["fvu"]["value"] == pytest.approx(fvu, rel=1e-4)


def test_intervals_cover_the_truth() -> None:
    """Oracle: 400 synthetic sets of documents with a known ratio; 95% intervals cover it about as often."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        n = generator.integers(5, 50, 80).astype(float)
        level = generator.gamma(4, 0.25, 80)
        figure = Bootstrap(np.ones(80, bool)).figure(Ratio(level * n, n))
        covered += figure["lo"] <= 1.0 <= figure["hi"]
    assert 0.90 <= covered / 400 <= 0.98


def test_too_few_documents_have_no_interval() -> None:
    """Oracle: null with a reason, the value itself kept."""
    figure = Bootstrap(np.ones(3, bool)).figure(Ratio(np.array([1.0, 2, 3]), np.array([2.0, 2, 2])))
    assert figure["value"] == 1.0
    assert figure["lo"] is None
    assert figure["reason"] == "only 3 documents; an interval needs 30"


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 5), st.floats(-10, 10)), min_size=1, max_size=40), st.integers(1, 7))
def test_document_sums_do_not_depend_on_chunks(tokens: list[tuple[int, float]], size: int) -> None:
    """Oracle: a dictionary of sums."""
    sums = DocumentSums(["v"])
    for start in range(0, len(tokens), size):
        part = tokens[start : start + size]
        sums.add(np.array([unit for unit, _ in part]), {"v": [value for _, value in part]})
    expected: dict[int, float] = {}
    for unit, value in tokens:
        expected[unit] = expected.get(unit, 0.0) + value
    np.testing.assert_allclose(sums.column("v"), [expected[u] for u in sorted(expected)], atol=1e-9)


def test_copies_of_a_document_count_as_one(store: ActivationStore) -> None:
    """Oracle: the number of distinct text hashes among held-out documents."""
    found = reconstruct(store, {"v": random_sae(0)})
    table = store.tokens.documents
    kept = table["held_out"].to_numpy(zero_copy_only=False)
    assert sorted(found.sums.rows) == sorted(set(table["text_hash"].to_numpy()[kept].tolist()))


def test_latents_shown_are_asked_or_random_live_ones() -> None:
    """Oracle: the asked first; the rest live and without repeats."""
    density = np.array([0, 0.1, 0.2, 0, 0.3])
    chosen = choose_latents(density > 0, (3,), 10)
    assert chosen[0] == 3
    assert sorted(chosen) == [1, 2, 3, 4]
    check_latents((0, 4), [5, 9])
    with pytest.raises(ConfigError, match=r"latents must be in 0\.\.4, got 5, -1$"):
        check_latents((5, 4, -1), [5])
    with pytest.raises(
        ConfigError, match=r"in 0\.\.4, got 5; name the variant they belong to with --variant"
    ):
        check_latents((5,), [9, 5])


def test_the_thresholds_count_only_checks_that_ran() -> None:
    """Oracle: counted by hand."""
    figures = {
        "loss_recovered": {"value": None, "reason": "no head"},
        "l0": {"value": 32.0},
        "dead_fraction": {"value": 0.5},
        "max_decoder_cosine": {"value": 0.25},
        "max_decoder_cosine_random": {"value": None, "reason": "1 live latent"},
    }
    found = thresholds_checks(figures, Thresholds())
    assert [check["passed"] for check in found] == [None, True, False, True]
    assert summary(found) == "2/3, 1 unknown"


def test_the_best_is_reported_on_documents_it_was_not_chosen_on() -> None:
    """Oracle: 50 variants of one true loss, 200 documents; the choice leaves a bias in its own half only."""
    generator = np.random.default_rng(0)
    split, n = Split(list(range(200))), np.ones(200)
    chosen, reported, same = [], [], []
    for _ in range(100):
        variants = generator.normal(1.0, 1.0, (50, 200))
        best = min(variants, key=lambda sums: split.loss(Ratio(sums, n)))
        chosen.append(split.loss(Ratio(best, n)))
        reported.append(split.reported_on.figure(Ratio(best, n))["value"])
        same.append(split.all.figure(Ratio(min(variants, key=np.mean), n))["value"])
    assert np.mean(chosen) < 0.8
    assert np.mean(same) < 0.87
    assert np.mean(reported) == pytest.approx(1.0, abs=0.04)
    assert not split.overlap
    alone = Split([4, 8])
    assert alone.overlap
    assert alone.chosen_on.all()
    assert alone.reported_on.n_documents == 2


@pytest.mark.parametrize(
    ("value", "random", "passed", "threshold"),
    [(0.28, 0.2, False, 0.25), (0.28, 0.3, True, 0.3), (0.3, 0.3, True, 0.3), (0.31, 0.3, False, 0.3)],
)
def test_absorption_is_judged_against_what_random_directions_show(
    value: float, random: float, passed: bool, threshold: float
) -> None:
    """Oracle: the larger of threshold and baseline, by hand; the reason where it is the baseline."""
    figures = {name: {"value": 0.0} for name in ("loss_recovered", "l0", "dead_fraction")}
    figures |= {"max_decoder_cosine": {"value": value}, "max_decoder_cosine_random": {"value": random}}
    check = thresholds_checks(figures, Thresholds())[3]
    assert (check["passed"], check["threshold"]) == (passed, f"at most {threshold}")
    assert check.get("reason") == (
        "as many random directions show 0.300, more than the threshold of 0.25" if random > 0.25 else None
    )


def test_a_figure_that_is_not_finite_is_null() -> None:
    """Oracle: null with a reason, never NaN or infinity in the JSON."""
    for bad in (np.inf, np.nan):
        figure = Bootstrap(np.ones(40, bool)).figure(Ratio(np.array([bad] * 40), np.ones(40)))
        assert figure == {"value": None, "reason": "a value of it is not finite"}

"""Probes, their areas and intervals: against scikit-learn, numpy, and a bootstrap over whole groups."""

import tracemalloc

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from saemill.assess.probes import sparse
from saemill.assess.probes.absorption import absorbed_fraction
from saemill.assess.probes.probe import Probe, Standard, area, best_threshold, fit, mean, ratio
from saemill.assess.probes.sparse import best_latents


def grouped(seed: int, n_groups: int = 60, each: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores whose errors are shared by a group, and labels of groups."""
    generator = np.random.default_rng(seed)
    group = np.repeat(np.arange(n_groups), each)
    y = np.arange(n_groups)[group] % 3 == 0
    score = y + generator.standard_normal(n_groups)[group] + 0.3 * generator.standard_normal(len(group))
    return score, y, group


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=40))
def test_the_area_is_that_of_scikit_learn(pairs: list[tuple[int, bool]]) -> None:
    """Oracle: roc_auc_score, with many ties; influences of all groups add up to nothing."""
    score, y = np.array([s for s, _ in pairs], float), np.array([label for _, label in pairs])
    if y.all() or not y.any():
        return
    found = area(score, y, np.arange(len(y)) // 2, len(y))
    assert found.value == pytest.approx(roc_auc_score(y, score))
    assert found.influence_G.sum() == pytest.approx(0, abs=1e-12)


def test_the_interval_is_that_of_resampled_groups() -> None:
    """Oracle: the deviation of AUCs of 800 draws of whole groups; single examples give far less."""
    score, y, group = grouped(0)
    generator = np.random.default_rng(1)
    draws = []
    for _ in range(800):
        rows = np.concatenate([np.flatnonzero(group == g) for g in generator.integers(0, 60, 60)])
        draws.append(roc_auc_score(y[rows], score[rows]))
    found = area(score, y, group, 60).figure("word type")
    half = (found["hi"] - found["lo"]) / 2
    assert half == pytest.approx(1.96 * np.std(draws), rel=0.12)
    alone = area(score, y, np.arange(len(y)), len(y)).figure("word type")
    assert half > 1.7 * (alone["hi"] - alone["lo"]) / 2


def test_intervals_cover_the_truth() -> None:
    """Oracle: 95% of 400 intervals hold the area of the distribution, Φ(1 / √(2 · 1.09))."""
    truth = 0.7509  # two normal distributions of variance 1.09 whose means differ by 1
    figures = [area(*grouped(seed, 90), 90).figure("g") for seed in range(400)]
    covered = np.mean([figure["lo"] <= truth <= figure["hi"] for figure in figures])
    assert 0.91 <= covered <= 0.98
    assert area(*grouped(0, 29), 29).figure("word type")["reason"] == (
        "only 29 word types; an interval needs 30"
    )
    y = np.arange(80) % 2 == 1
    assert area(y.astype(float), y, np.arange(80), 80).figure("word type") == {
        "value": 1.0, "lo": None, "hi": None,
        "reason": "it is the same for each word type, which tells of no error",
    }  # fmt: skip


def test_differences_and_means_are_paired() -> None:
    """Oracle: the definition; a score minus itself, moved, has no error at all."""
    score, y, group = grouped(3)
    one, other = area(score, y, group, 60), area(3 * score + 1, y, group, 60)
    assert (one - other).figure("g")["value"] == 0
    assert np.abs((one - other).influence_G).max() == 0
    both = mean([one, area(-score, y, group, 60)])
    assert both.value == pytest.approx(0.5)
    assert np.abs(both.influence_G).max() < 1e-12
    share = ratio(np.array([1.0, 2, 0]), np.array([2.0, 2, 1]))
    assert share.value == pytest.approx(3 / 5)
    np.testing.assert_allclose(share.influence_G, (np.array([1, 2, 0]) - 0.6 * np.array([2, 2, 1])) / 5)


def test_a_fit_is_that_of_scikit_learn() -> None:
    """Oracle: StandardScaler and LogisticRegression in float64; a constant feature weighs nothing."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((500, 6)) * [1, 100, 1e-3, 1, 1, 0] + [0, 5000, 0, 1, 2, 7]
    y = x[:, 0] + x[:, 1] / 100 - 50 + generator.standard_normal(500) > 1
    scaled = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, class_weight="balanced", tol=1e-8))
    expected = scaled.fit(x[:, :5], y).decision_function(x[:, :5])
    probe = fit(Standard.of(x, np.ones(500, bool)), y, (0.01, 0.3))[1]
    np.testing.assert_allclose(probe.score(x), expected, atol=5e-3)
    assert probe.weight_D[5] == 0


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30))
def test_the_threshold_is_the_best_of_all(pairs: list[tuple[int, bool]]) -> None:
    """Oracle: f1_score of every threshold."""
    score, y = np.array([s for s, _ in pairs], float), np.array([label for _, label in pairs])
    if not y.any():
        return
    threshold, f1 = best_threshold(score, y)
    assert f1 == pytest.approx(max(f1_score(y, score >= t) for t in np.unique(score)))
    assert f1 == pytest.approx(f1_score(y, score >= threshold))


def test_the_best_latents_are_those_that_correlate_most() -> None:
    """Oracle: numpy.corrcoef on the chosen examples; latents that never fire there are left out, and if asked
    for, those against the label."""
    generator = np.random.default_rng(0)
    acts = np.where(generator.random((300, 9)) < 0.3, generator.random((300, 9)), 0).astype(np.float32)
    y = acts[:, 4] - acts[:, 7] + generator.standard_normal(300) * 0.1 > 0.1
    chosen = generator.random(300) < 0.8
    acts[chosen, 2] = 0
    acts[~chosen] *= 3
    r = [np.corrcoef(acts[chosen, f], y[chosen])[0, 1] if f != 2 else 0 for f in range(9)]
    codes = scipy.sparse.csc_array(acts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "LATENTS_AT_ONCE", 4)
        found = best_latents(codes, y, chosen, 9).tolist()
    assert found == np.argsort(-np.abs(r), kind="stable")[:8].tolist()
    assert r[7] < -0.2
    assert 7 not in best_latents(codes, y, chosen, 9, only_for=True)
    assert best_latents(codes, y, chosen, 1).tolist() == [4]


def test_pieces_give_the_same_and_no_copy_of_all_is_made() -> None:
    """Oracle: numpy on all examples at once; and the peak of the bytes that numpy takes, which is far below a
    copy in float64."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((40_000, 64)).astype(np.float32)
    chosen = generator.random(len(x)) < 0.5
    probe = Probe(generator.standard_normal(64), 2.0)
    codes = scipy.sparse.random_array((4000, 5000), density=0.1, format="csc", rng=0, dtype=np.float32)
    y = generator.random(4000) < 0.5
    peaks = []
    for do in (
        lambda: probe.score(x, chosen),
        lambda: probe.score(x),
        lambda: best_latents(codes, y, np.ones(4000, bool), 3),
    ):
        tracemalloc.start()
        do()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks[:2]) < x.nbytes / 4
    assert peaks[2] < codes.data.nbytes / 2
    np.testing.assert_allclose(probe.score(x, chosen), x[chosen] @ probe.weight_D + 2)
    made = Standard.of(x, chosen)
    np.testing.assert_allclose(made.mean_D, x[chosen].mean(0, dtype=float), atol=1e-12)
    np.testing.assert_allclose(1 / made.scale_D, x[chosen].std(0, dtype=float))
    np.testing.assert_allclose(made.z_ND, (x[chosen] - made.mean_D) * made.scale_D, rtol=1e-6)


def test_absorbed_fractions_of_each_case() -> None:
    """Oracle: worked by hand, p being 1."""
    p = np.ones(6)
    main = np.array([1.0, 0.9, 0.5, 0.0, -0.1, 0.2])
    absorbers = np.array([2.0, 0.3, 0.4, 0.4, 0.39, 5.0])
    expected = [0, 0, 0.4 / 0.9, 1, 0, 0.8]
    np.testing.assert_allclose(absorbed_fraction(p, main, absorbers), expected)

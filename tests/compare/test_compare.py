"""Dictionaries matched: the definitions by brute force, permuted copies, what chance gives, real runs."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import Pipeline
from replaced import run_of_other_saes
from saes import make_transcoder
from stores import make_store
from typer.testing import CliRunner

from saemill import ActivationStore, Sae, SaeConfig, cli
from saemill.common.errors import ConfigError, StoreError
from saemill.common.sae.formats import sparsify
from saemill.compare.config import CompareConfig
from saemill.compare.matching import cosines, match
from saemill.compare.random_rows import isotropic, same_covariance
from saemill.compare.run import run
from saemill.train.config import TrainConfig
from saemill.train.run import run as train


def unit(rows_FD: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(rows_FD, dim=1)


def random_rows(f: int, d: int, seed: int) -> torch.Tensor:
    return unit(torch.randn(f, d, generator=torch.Generator().manual_seed(seed)))


def save(
    folder: Path, w_dec_FD: torch.Tensor, w_enc_FD: torch.Tensor | None = None, site: str = "layers.1"
) -> Path:
    f, d = w_dec_FD.shape
    config = SaeConfig(d_in=d, num_latents=f, k=3, provenance={"site": site})
    w_enc_FD = w_dec_FD.clone() if w_enc_FD is None else w_enc_FD
    Sae(config, w_enc_FD, torch.zeros(f), w_dec_FD, torch.zeros(d)).save(folder)
    return folder


def compared(*saes: Path, **changes: Any) -> dict[str, Any]:
    return run(CompareConfig(saes=saes, device="cpu", **changes))


@settings(max_examples=40)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
def test_matching_is_the_definition(n_a: int, n_b: int, seed: int) -> None:
    """Oracle: every one-to-one matching tried, argmax by hand; blocks of one row give the same."""
    a_FD, b_FD = random_rows(n_a, 3, seed), random_rows(n_b, 3, seed + 5000)
    s = (a_FD.double() @ b_FD.double().T).numpy()
    best = max(
        sum(s[i, j] for i, j in (zip(range(n_a), p) if n_a <= n_b else zip(p, range(n_b))))  # noqa: B905
        for p in itertools.permutations(range(max(n_a, n_b)), min(n_a, n_b))
    )
    of_a, of_b = match(cosines(a_FD, b_FD), n_a, n_b, assign=True)
    np.testing.assert_allclose(np.nansum(of_a.match_similarity), best, atol=1e-5)
    np.testing.assert_allclose(np.nansum(of_b.match_similarity), best, atol=1e-5)
    assert of_a.match is not None
    assert of_b.match is not None
    pairs = {(i, int(j)) for i, j in enumerate(of_a.match) if j >= 0}
    assert pairs == {(int(i), j) for j, i in enumerate(of_b.match) if i >= 0}
    assert len(pairs) == min(n_a, n_b)
    np.testing.assert_array_equal(of_a.nearest, s.argmax(1))
    np.testing.assert_array_equal(of_b.nearest, s.argmax(0))
    np.testing.assert_allclose(of_a.nearest_similarity, s.max(1), atol=1e-6)
    np.testing.assert_allclose(of_b.nearest_similarity, s.max(0), atol=1e-6)
    assert of_a.mutual.tolist() == [s[:, s[i].argmax()].argmax() == i for i in range(n_a)]
    assert of_b.mutual.tolist() == [s[s[:, j].argmax()].argmax() == j for j in range(n_b)]
    rows = match(lambda: torch.split(a_FD @ b_FD.T, 1), n_a, n_b, assign=False)
    np.testing.assert_array_equal(rows[0].nearest, of_a.nearest)
    np.testing.assert_array_equal(rows[1].nearest, of_b.nearest)
    assert rows[0].match is None


def test_a_permuted_copy_is_matched_exactly(tmp_path: Path) -> None:
    """Oracle: the permutation; scaled rows, other biases and more than one block change nothing."""
    w_FD = random_rows(700, 24, 0)
    order = torch.randperm(700, generator=torch.Generator().manual_seed(1))
    a, b = save(tmp_path / "a", w_FD), save(tmp_path / "b", 3 * w_FD[order], random_rows(700, 24, 2))
    comparison = compared(a, b, out=tmp_path / "out")
    (entry,) = comparison["pairs"]
    assert entry["mean_max"] == pytest.approx([1, 1], abs=1e-6)
    assert entry["mutual_nearest"]["share"] == entry["mutual_nearest"]["share_above"] == 1
    assert entry["assignment"]["mean"] == pytest.approx(1, abs=1e-6)
    assert entry["assignment"]["shares"]["0.95"] == 1
    assert entry["mean_max_adjusted"][0]["isotropic"] == pytest.approx(1, abs=1e-5)
    table = pq.read_table(tmp_path / "out" / "matches.parquet").to_pandas()
    of_a, of_b = table[table["dictionary"] == "a"], table[table["dictionary"] == "b"]
    inverse = order.argsort().numpy()
    for column in ("match", "nearest"):
        np.testing.assert_array_equal(of_a[column], inverse)
        np.testing.assert_array_equal(of_b[column], order.numpy())
    assert of_a["mutual"].all()
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == comparison
    by_encoder = compared(a, b, by="encoder", matching="nearest")["pairs"][0]
    assert by_encoder["mutual_nearest"]["share_above"] < 0.2
    assert by_encoder["assignment"] is None


def test_a_smaller_dictionary_keeps_its_latents(tmp_path: Path) -> None:
    """Oracle: the rows that were taken away and turned around."""
    w_FD = random_rows(60, 30, 0)
    few_FD = torch.cat([w_FD[:20], -w_FD[20:25]])
    comparison = compared(save(tmp_path / "few", few_FD), save(tmp_path / "many", w_FD), out=tmp_path / "out")
    (entry,) = comparison["pairs"]
    assert entry["n_latents"] == [25, 60]
    assert entry["assignment"]["shares"]["0.9"] == 20 / 25
    assert entry["mutual_nearest"]["share_above"] == 20 / 25
    assert entry["mean_max"][1] < entry["mean_max"][0]
    table = pq.read_table(tmp_path / "out" / "matches.parquet").to_pandas()
    of_many = table[table["dictionary"] == "many"].set_index("latent")
    assert of_many.loc[:19, "match"].tolist() == list(range(20))
    assert of_many["match"].isna().sum() == 35


def test_random_dictionaries_match_like_chance(tmp_path: Path) -> None:
    """Oracle: numpy's mean of the largest of F cosines; the second moments asked for."""
    a, b = save(tmp_path / "a", random_rows(400, 32, 1)), save(tmp_path / "b", random_rows(400, 32, 2))
    (entry,) = compared(a, b)["pairs"]
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((2, 400, 32))
    rows /= np.linalg.norm(rows, axis=2, keepdims=True)
    expected = (rows[0] @ rows[1].T).max(1).mean()
    for kind in ("isotropic", "same_covariance"):
        assert entry["chance"][kind]["mean_max"] == pytest.approx([expected] * 2, abs=0.01)
        assert entry["mean_max_adjusted"][0][kind] == pytest.approx(0, abs=0.02)
        assert entry["chance"][kind]["assignment"]["share_above"] <= 0.01
    flat_FD = unit(random_rows(2000, 16, 3) * torch.tensor([5.0, 3.0, *[0.2] * 14]))
    drawn_FD = same_covariance(flat_FD, 0)
    moments_DD = (flat_FD.T @ flat_FD) / 2000
    assert torch.dist(drawn_FD.T @ drawn_FD / 2000, moments_DD) < 0.2 * moments_DD.norm()
    even_FD = isotropic(flat_FD, 0)
    assert torch.dist(even_FD.T @ even_FD / 2000, torch.eye(16) / 16) < 0.2 / 4
    assert not torch.equal(isotropic(flat_FD, 1), even_FD)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    """Oracle: the message names what to do."""
    a, b = save(tmp_path / "a", random_rows(20, 8, 0)), save(tmp_path / "b", random_rows(20, 9, 0))
    c = save(tmp_path / "c", random_rows(30, 8, 1))
    for saes, changes, message in (
        ((a,), {}, "two SAEs or more"),
        ((a, a), {}, "named twice"),
        ((a, b), {}, r"different lengths .*a has 8, b has 9.*--by activations"),
        ((a, c), {"assignment_limit": 25}, "c has 30 latents.*--matching nearest.*--assignment-limit 30"),
        ((a, c), {"out": a}, "something else"),
    ):
        with pytest.raises(ConfigError, match=message):
            compared(*saes, **changes)
    for changes, message in (
        ({"by": "activations"}, "name stores with --acts"),
        ({"max_tokens": 5}, "no effect without acts"),
        ({"assignment_limit": 5, "matching": "nearest"}, "no effect"),
        ({"threshold": 1.0}, "threshold must be in"),
    ):
        with pytest.raises(ConfigError, match=message):
            CompareConfig(saes=(a, c), **changes)
    with pytest.raises(StoreError, match="holds no SAE"):
        compared(a, tmp_path)
    sae = Sae.load(a)
    sae.W_dec.data[3, 2] = torch.nan
    sparsify.write(sae.parts, tmp_path / "nan")
    with pytest.raises(StoreError, match="1 value of W_dec is NaN or infinite"):
        compared(tmp_path / "nan", a)


def test_pairs_of_other_widths_are_left_out_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the pairs that are left."""
    saes = [save(tmp_path / n, random_rows(20, d, d)) for n, d in (("x/a", 8), ("y/a", 9), ("b", 8))]
    comparison = compared(*saes)
    names = [tmp_path.name + "/b" if name == "b" else name for name in ("x/a", "b")]
    assert [(pair["a"], pair["b"]) for pair in comparison["pairs"]] == [tuple(names)]
    assert "left out: 2 of 3 pairs, whose d_in differ" in capsys.readouterr().out


@pytest.fixture(scope="module")
def runs(
    tiny_models: dict[str, str], tokenizer_folder: str, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Pipeline:
    """A run of two SAEs, and beside it one of two seeds."""
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline = Pipeline(folder, tiny_models["neox"], tokenizer_folder, corpus, "layers.1")
    train(
        TrainConfig(
            acts=pipeline.acts, out=folder / "seeds", site=("layers.1",), k=(4,), num_latents=(64,),
            seeds=(0, 1), batch_size=256, lr=(3e-3,), epochs=2, device="cpu",
        )
    )  # fmt: skip
    return pipeline


def dense(sae: Sae, x_TD: torch.Tensor) -> np.ndarray[Any, Any]:
    acts_TK, indices_TK = sae.encode(x_TD)
    codes_TF = torch.zeros(len(x_TD), sae.config.num_latents).scatter_add(1, indices_TK, acts_TK)
    return codes_TF.detach().double().numpy()


@pytest.mark.parametrize("threshold", [None, 1.0])
def test_runs_are_compared_by_what_their_latents_do(
    runs: Pipeline, tmp_path: Path, threshold: float | None
) -> None:
    """Oracle: numpy's corrcoef of dense codes on the held-out tokens, by a k or by thresholds."""
    seeds = runs.out.parent / "seeds"
    if threshold is not None:
        names = [folder.name for folder in seeds.iterdir() if folder.is_dir()]
        run_of_other_saes(seeds, tmp_path / "seeds", {name: {"threshold": threshold} for name in names})
        seeds = tmp_path / "seeds"
    arguments = ["compare", seeds, "--by", "activations", "--acts", runs.acts, "-o", tmp_path / "out"]
    result = CliRunner().invoke(cli.app, list(map(str, arguments)), catch_exceptions=False)
    assert "correlation of codes" in result.output
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    (entry,) = comparison["pairs"]
    store = ActivationStore(runs.acts)
    keep_T = np.concatenate(
        [store.keep_addresses(shard, store.mask, held_out=True) for shard in range(store.n_shards)]
    )
    x_TD = store.read("layers.1", 0, store.n_tokens).float()[torch.from_numpy(keep_T)]
    assert comparison["n_tokens"] == len(x_TD)
    codes = [dense(Sae.load(seeds / entry[side]), x_TD) for side in ("a", "b")]
    live = [np.flatnonzero((part > 0).sum(0) >= 10) for part in codes]
    assert entry["n_latents"] == list(map(len, live))
    assert min(entry["n_latents"]) < 64
    n_a = len(live[0])
    correlation = np.corrcoef(codes[0][:, live[0]].T, codes[1][:, live[1]].T)[:n_a, n_a:]
    assert entry["mean_max"] == pytest.approx(
        [correlation.max(1).mean(), correlation.max(0).mean()], abs=1e-5
    )
    table = pq.read_table(tmp_path / "out" / "matches.parquet").to_pandas()
    of_a = table[table["dictionary"] == entry["a"]]
    np.testing.assert_array_equal(of_a["latent"], live[0])
    np.testing.assert_array_equal(of_a["nearest"], live[1][correlation.argmax(1)])
    chance = entry["chance"]["shifted_tokens"]["mean_max"]
    assert np.mean(chance) < np.mean(entry["mean_max"])


def test_models_of_other_widths_are_compared_on_the_same_tokens(tmp_path: Path) -> None:
    """Oracle: an SAE turned into the second model's space, its latents permuted; tokens that differ."""
    x_TD = torch.randn(64 * 16, 8, generator=torch.Generator().manual_seed(0))
    turn_DE = torch.linalg.qr(torch.randn(12, 8, generator=torch.Generator().manual_seed(1))).Q.T
    narrow = make_store(tmp_path / "narrow", 64, 16, 8, 256, x_TD)
    wide = make_store(tmp_path / "wide", 64, 16, 12, 512, x_TD @ turn_DE)
    w_FD, order = random_rows(20, 8, 2), torch.randperm(20, generator=torch.Generator().manual_seed(3))
    saes = [
        save(tmp_path / "a", w_FD, site="a"), save(tmp_path / "b", (w_FD @ turn_DE)[order], site="a")
    ]  # fmt: skip
    comparison = compared(*saes, by="activations", acts=(narrow.path, wide.path), out=tmp_path / "out")
    (entry,) = comparison["pairs"]
    assert entry["n_latents"][0] == entry["n_latents"][1] >= 10
    assert entry["assignment"]["mean"] == pytest.approx(1, abs=1e-4)
    table = pq.read_table(tmp_path / "out" / "matches.parquet").to_pandas()
    of_b = table[table["dictionary"] == "b"]
    np.testing.assert_array_equal(of_b["match"], order.numpy()[of_b["latent"]])
    fewer = compared(*saes, by="activations", acts=(narrow.path, wide.path), max_tokens=80)
    assert fewer["n_tokens"] == 80 < comparison["n_tokens"]
    other = make_store(tmp_path / "other", 56, 16, 12, 512)
    with pytest.raises(ConfigError, match="must hold the same tokens"):
        compared(*saes, by="activations", acts=(narrow.path, other.path))
    with pytest.raises(ConfigError, match=r"none of .* activations of b: site a, d_in 12"):
        compared(*saes, by="activations", acts=(narrow.path,))
    with pytest.raises(ConfigError, match="9 held-out tokens, too few"):
        compared(*saes, by="activations", acts=(narrow.path,), max_tokens=9)


def test_cosines_with_acts_leave_out_silent_latents_and_tell_how_matches_fire(runs: Pipeline) -> None:
    """Oracle: an SAE beside itself; numpy's corrcoef for the mutual nearest of two seeds."""
    seeds = runs.out.parent / "seeds"
    entry = compared(seeds, acts=(runs.acts,))["pairs"][0]
    told = entry["correlation_of_matched"]
    assert told["n"] == round(entry["mutual_nearest"]["share"] * min(entry["n_latents"]))
    assert -1 <= told["mean"] <= 1
    copy = runs.out.parent / "copy"
    first = seeds / entry["a"]
    Sae.load(first).save(copy)
    same = compared(first, copy, acts=(runs.acts,))["pairs"][0]
    assert same["n_latents"] == [entry["n_latents"][0]] * 2
    assert same["correlation_of_matched"]["mean"] == pytest.approx(1)


def test_the_report_shows_every_pair_and_fetches_nothing(runs: Pipeline, tmp_path: Path) -> None:
    """Oracle: the run's list of variants; the page's text."""
    seeds = runs.out.parent / "seeds"
    comparison = compared(runs.out, seeds, out=tmp_path, matching="nearest")
    assert len(comparison["dictionaries"]) == 4
    assert len(comparison["pairs"]) == 6
    names = ["layers.1-k2-f128-s0", "layers.1-k16-f128-s0", "layers.1-k4-f64-s0", "layers.1-k4-f64-s1"]
    differing = {
        (pair["a"].removesuffix("-lr0.003"), pair["b"].removesuffix("-lr0.003")): pair["differs_in"]
        for pair in comparison["pairs"]
    }
    assert differing[names[0], names[1]] == ["k"]
    assert differing[names[0], names[3]] == ["k", "num_latents", "seed"]
    assert differing[names[2], names[3]] == ["seed"]
    assert "SAEs of one seed" in comparison["notes"][0]
    assert compared(seeds)["notes"] == []
    page = (tmp_path / "report.html").read_text()
    for dictionary in comparison["dictionaries"]:
        assert page.count(dictionary["name"]) >= 4
    assert not any(mark in page for mark in ("://", "src=", "href=", "<script"))
    (seeds / "finished.json").rename(seeds / "later.json")
    try:
        with pytest.raises(StoreError, match="no finished run"):
            compared(seeds)
    finally:
        (seeds / "later.json").rename(seeds / "finished.json")


def test_latents_are_as_stable_as_they_are_planted(tmp_path: Path) -> None:
    """Oracle: rows planted in all three seeds, in two of them, and in one; a row of another k apart."""
    shared, of_two, own = random_rows(10, 64, 1), random_rows(6, 64, 2), random_rows(24, 64, 3)
    rows = [
        torch.cat([shared, of_two, own[:8]]), torch.cat([own[8:16], of_two, shared]),
        torch.cat([shared, own[10:24]]),
    ]  # fmt: skip
    saes = []
    for seed, rows_FD in enumerate(rows):
        sae = Sae.load(save(tmp_path / f"s{seed}", rows_FD))
        sae.config.provenance["variant"] = {"name": f"s{seed}", "seed": seed, "k": 3}
        sae.save(tmp_path / f"s{seed}")
        saes.append(tmp_path / f"s{seed}")
    other = Sae.load(save(tmp_path / "other", rows[0]))
    other.config.provenance["variant"] = {"name": "other", "seed": 3, "k": 4}
    other.save(tmp_path / "other")
    told = compared(*saes, tmp_path / "other", out=tmp_path / "out")["stability"]
    table = pq.read_table(tmp_path / "out" / "stability.parquet").to_pandas()
    found = {name: of["found_in"].tolist() for name, of in table.groupby("dictionary", observed=True)}
    # Six of the third's own rows are the second's as well.
    assert found["s0"] == [2] * 10 + [1] * 6 + [0] * 8
    assert found["s1"] == [0, 0] + [1] * 6 + [1] * 6 + [2] * 10
    assert found["s2"] == [2] * 10 + [1] * 6 + [0] * 8
    assert [entry["dictionary"] for entry in told] == ["s0", "s1", "s2"]
    assert [entry["found_in"] for entry in told] == [[8, 6, 10], [2, 12, 10], [8, 6, 10]]
    assert all(entry["by_chance"] == 0 and entry["n_others"] == 2 for entry in told)
    assert table["mean_similarity"][0] == pytest.approx(1, abs=1e-6)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "found again in SAEs of other seeds" in page
    assert compared(saes[0], tmp_path / "other")["stability"] == []


def test_transcoders_of_one_site_differ_in_what_they_predict(tmp_path: Path) -> None:
    """Oracle: their folders; lengths that differ at either end are told."""
    a, b = make_transcoder(), make_transcoder()
    b.config.provenance["target_site"] = "layers.2.mlp"
    a.save(tmp_path / "a")
    b.save(tmp_path / "b")
    told = compared(tmp_path / "a", tmp_path / "b")
    assert [d["target_site"] for d in told["dictionaries"]] == ["layers.1.mlp", "layers.2.mlp"]
    assert told["pairs"][0]["differs_in"] == ["target_site"]
    assert told["notes"] == [
        "some pairs differ in the target_site: a direction need not mean the same in both; --by activations "
        "compares what latents do"
    ]
    make_transcoder(e=7).save(tmp_path / "c")
    with pytest.raises(ConfigError, match="a has 12, c has 12 → 7"):
        compared(tmp_path / "a", tmp_path / "c")

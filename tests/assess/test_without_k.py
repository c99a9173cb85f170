"""Assessments of SAEs without a k, and of the SAEs within an SAE."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pipeline import Pipeline
from reconstructions import held_out, over, random_sae, reconstruct
from replaced import run_of_other_saes, with_thresholds

from saemill import Sae
from saemill.assess.config import AssessConfig
from saemill.assess.run import run
from saemill.common.errors import ConfigError
from saemill.common.stores import assessments, features
from saemill.common.stores.activations import ActivationStore
from saemill.explain.config import ExplainConfig
from saemill.explain.run import run as explain
from saemill.latents.config import ExportLatentsConfig
from saemill.latents.run import run as export_latents

K2, K16 = "layers.1-k2-f128-s0-lr0.003", "layers.1-k16-f128-s0-lr0.003"


def fvu_and_l0(x: torch.Tensor, sae: Sae) -> tuple[float, float]:
    """Oracle: float64 formulas over all activations at once."""
    with torch.no_grad():
        out = sae(x)
    xd, rd = x.double(), out.reconstruction.double()
    fvu = (xd - rd).square().sum() / (xd - xd.mean(0)).square().sum()
    return float(fvu), float((out.top_acts > 0).sum(1).double().mean())


def test_figures_equal_their_definitions(store: ActivationStore) -> None:
    """Oracle: float64 formulas over all held-out activations at once; how often latents fire, by a dense
    comparison with the thresholds."""
    x, _ = held_out(store)
    sae = with_thresholds(random_sae(0), 1.0)
    found = reconstruct(store, {"v": sae})
    metrics = found.metrics("v", over(found))
    fvu, l0 = fvu_and_l0(x, sae)
    assert metrics["fvu"]["value"] == pytest.approx(fvu, rel=1e-6)
    assert metrics["l0"]["value"] == pytest.approx(l0)
    assert 1 < l0 < 10
    with torch.no_grad():
        active = sae.pre_acts(x) > sae.threshold
    np.testing.assert_allclose(found.density("v"), active.double().mean(0).numpy(), rtol=1e-6)


@pytest.mark.parametrize("kind", ["prefixes of thresholds", "prefixes of a k", "several k"])
def test_the_figures_of_saes_within_one_are_theirs_alone(store: ActivationStore, kind: str) -> None:
    """Oracle: each cut, measured by itself as above; the whole has the figures that it has without them."""
    x, _ = held_out(store)
    plain = random_sae(0, k=8)
    matryoshka: dict[str, Any] = {"architecture": "matryoshka", "prefixes": (6, 12, 24)}
    sae, names = {
        "prefixes of thresholds": (with_thresholds(plain, 1.0, **matryoshka), ["first 6", "first 12"]),
        "prefixes of a k": (
            Sae.of(replace(plain.parts, config=replace(plain.config, **matryoshka))),
            ["first 6", "first 12"],
        ),
        "several k": (
            Sae.of(replace(plain.parts, config=replace(plain.config, ks=(1, 4, 8)))),
            ["k 1", "k 4"],
        ),
    }[kind]
    found = reconstruct(store, {"v": sae, "w": plain})
    bootstrap = over(found)
    assert list(found.cuts["v"]) == names
    assert found.cuts["w"] == {}
    for name, cut in sae.cuts.items():
        figures = found.cut_metrics("v", name, bootstrap)
        fvu, l0 = fvu_and_l0(x, cut)
        assert figures["fvu"]["value"] == pytest.approx(fvu, rel=1e-5)
        assert figures["l0"]["value"] == pytest.approx(l0, rel=1e-5)
        assert figures["fvu"]["lo"] < figures["fvu"]["value"] < figures["fvu"]["hi"]
    alone = reconstruct(store, {"v": replace_cuts(sae)})
    assert found.metrics("v", bootstrap) == alone.metrics("v", over(alone))


def replace_cuts(sae: Sae) -> Sae:
    """The same SAE, of which no others are known."""
    architecture = "topk" if sae.config.k else "batchtopk"
    config = replace(sae.config, architecture=architecture, prefixes=(), ks=())
    return Sae.of(replace(sae.parts, config=config))


def assessed(folder: Path) -> dict[str, Any]:
    return run(
        AssessConfig(run=folder, device="cpu", max_tokens=4000, model_tokens=500, n_latents=2, n_contexts=2)
    )


def test_a_run_is_assessed_beside_controls_of_its_mean_l0(
    causal: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the L0 that is told, rounded; what the files and the printed table hold."""
    prefixes = (32, 128)
    changes = {
        K2: {"threshold": 0.8, "architecture": "matryoshka", "prefixes": prefixes},
        K16: {"threshold": 0.2},
    }
    run_of_other_saes(causal.out, tmp_path / "run", changes)
    assessment = assessed(tmp_path / "run")
    entries = {entry["name"]: entry for entry in assessment["variants"]}
    ks = sorted(round(entry["metrics"]["l0"]["value"]) for entry in assessment["variants"])
    names = [name for k in ks for name in (f"random-k{k}-f128", f"pca-k{k}")]
    assert [entry["name"] for entry in assessment["controls"]] == names
    assert [entry["k"] for entry in assessment["controls"]] == [ks[0], ks[0], ks[1], ks[1]]
    assert [(entries[name]["k"], entries[name]["architecture"]) for name in (K2, K16)] == [
        (None, "matryoshka"),
        (None, "jumprelu"),
    ]
    (cut,) = entries[K2]["cuts"]
    assert (cut["name"], cut["num_latents"], cut["k"]) == ("first 32", 32, None)
    assert cut["metrics"]["fvu"]["value"] > entries[K2]["metrics"]["fvu"]["value"]
    assert "cuts" not in entries[K16]
    assert all(latent.contexts for latent in features.load(tmp_path / "run").latents)
    assert assessments.read(tmp_path / "run") == assessment
    assert assessments.problems(tmp_path / "run") == []
    columns = pq.read_table(tmp_path / "run" / "documents.parquet").column_names
    assert f"{K2}/first 32/sse" in columns
    printed = capsys.readouterr().out
    assert "random dictionaries, PCA with k directions" in printed
    for place, figures in (("first 32", cut["metrics"]), ("whole", entries[K2]["metrics"])):
        (line,) = [line for line in printed.splitlines() if place in line]
        assert f"{figures['fvu']['value']:.3f}" in line
    assert all(words in printed for words in ("┃ architecture", "│ jumprelu", "│ matryoshka"))
    page = (tmp_path / "run" / "report.html").read_text()
    for words in ("SAEs within it", "first 32", ">architecture</th>", ">jumprelu<"):
        assert words in page


def test_an_assessment_of_topk_saes_says_nothing_of_others(causal: Pipeline, tmp_path: Path) -> None:
    """Oracle: the fields that there were before there were other architectures."""
    assessment = assessed(run_of_topk(causal, tmp_path))
    wanted = {
        "name", "site", "k", "num_latents", "tokens_trained", "diverged_at_step", "not_measured", "metrics",
        "evidence", "verdict", "checks", "checks_passed", "versus_best",
    }  # fmt: skip
    beyond = {"seed", "groups", "worst"}
    found = [set(entry) - {"dense"} for entry in (*assessment["variants"], *assessment["controls"])]
    n = len(assessment["variants"])
    assert all(keys == wanted | beyond for keys in found[:n])
    assert all(keys == wanted | {"control"} for keys in found[n:])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "SAEs within" not in page
    assert "architecture" not in page


def run_of_topk(causal: Pipeline, tmp_path: Path) -> Path:
    run_of_other_saes(causal.out, tmp_path / "run", {})
    return tmp_path / "run"


def test_latents_of_either_sign_are_shown_at_both_ends(causal: Pipeline, tmp_path: Path) -> None:
    """Oracle: L0 and densities by codes that are not 0; places below 0 farther from it first, with the other
    sign; the words of the page; controls with twice the latents. Nothing explains such latents, or takes them
    for others."""
    saes = run_of_other_saes(
        causal.out, tmp_path / "run", {name: {"architecture": "abs-topk"} for name in (K2, K16)}
    )
    assessment = assessed(tmp_path / "run")
    entries = {entry["name"]: entry["metrics"] for entry in assessment["variants"]}
    assert [round(entries[name]["l0"]["value"]) for name in (K2, K16)] == [2, 16]
    assert "random-k2-f256" in {entry["name"] for entry in assessment["controls"]}
    table = pq.read_table(tmp_path / "run" / "latents.parquet").to_pandas().set_index("variant")
    assert (table["min"] < 0).any()
    assert table.loc[K2, "density"].sum() == pytest.approx(2, rel=1e-3)
    found = features.load(tmp_path / "run")
    assert saes[found.variant].config.is_signed
    signed = [latent for latent in found.latents if latent.below]
    for latent in signed:
        acts = [context.activation for context in latent.below]
        assert acts == sorted(acts)
        assert latent.smallest <= acts[0] < 0
        assert all(context.activation > 0 for context in latent.contexts)
        assert sum(latent.histogram) == latent.n_sampled
    assert signed
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Strongest below 0" in page
    assert "below it the other way round" in page
    with pytest.raises(ConfigError, match="fire above and below 0, which one explanation cannot tell of"):
        explain(ExplainConfig(run=tmp_path / "run", url="http://localhost:1/v1", model="m"))
    with pytest.raises(ConfigError, match="delphi ranks activations from 0 up"):
        export_latents(ExportLatentsConfig(run=tmp_path / "run", format="delphi", out=tmp_path / "d"))

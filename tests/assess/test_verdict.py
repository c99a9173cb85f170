"""The verdict: what a random dictionary, PCA, an untrained SAE and a trained one get."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from reconstructions import random_sae
from stores import make_store
from training import structured

from saemill.assess.baselines import _ks
from saemill.assess.config import AssessConfig, Thresholds
from saemill.assess.latent_figures import _dense_share
from saemill.assess.run import run as assess
from saemill.assess.verdict import conclude, error_check, latent_checks, order
from saemill.common.errors import ConfigError
from saemill.common.sae.sae import Sae
from saemill.common.stores.activations import ActivationStore
from saemill.compare.config import CompareConfig
from saemill.compare.run import run as compare
from saemill.train.arch.initial import unit_rows
from saemill.train.config import TrainConfig
from saemill.train.run import run as train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Sparse sums of 40 directions in 16 dimensions; a fifth of 512 documents is held out."""
    folder = tmp_path_factory.mktemp("verdict")
    return make_store(folder, n_rows=512, ctx_len=32, d=16, shard_tokens=4096, values_TD=structured(512 * 32))


def assessed(store: ActivationStore, out: Path, **changes: Any) -> dict[str, Any]:
    """A run of SAEs of 64 latents, assessed without a model."""
    settings: dict[str, Any] = {
        "acts": store.path, "out": out, "site": ("a",), "k": (3,), "num_latents": (64,), "lr": (3e-3,),
        "batch_size": 256, "device": "cpu",
    }  # fmt: skip
    train(TrainConfig(**settings | changes))
    return assess(AssessConfig(run=out, with_model=False, device="cpu", n_latents=0))


def test_a_trained_sae_passes_and_dictionaries_that_nobody_trained_fail(
    planted: ActivationStore, tmp_path: Path
) -> None:
    """Oracle: what each is; shares of the errors from the sums per document."""
    found = assessed(planted, tmp_path / "run", epochs=4)
    (entry,) = found["variants"]
    assert entry["verdict"] == "passed, ΔCE unknown"
    errors = {e["name"]: e["metrics"]["fvu"]["value"] for e in found["variants"] + found["controls"]}
    by_name = {check["name"]: check for check in entry["evidence"]}
    for kind in ("random", "pca"):
        check = by_name[f"fvu_beside_{kind}"]
        assert check["value"] == pytest.approx(errors[entry["name"]] / errors[check["against"]], rel=1e-9)
        assert check["lo"] <= check["value"] <= check["hi"]
    verdicts = {control["name"]: control["verdict"] for control in found["controls"]}
    assert verdicts["random-k3-f64"].startswith("failed: FVU")
    assert verdicts["pca-k3"].startswith("failed: FVU")


@pytest.mark.parametrize("architectures", [("topk",), ("topk", "relu")], ids=["one pass", "two passes"])
def test_a_frozen_decoder_is_the_control_of_its_twin(
    architectures: tuple[Any, ...], planted: ActivationStore, tmp_path: Path
) -> None:
    """Oracle: the shares of the two errors; the decoder rows that training started from, bit by bit."""
    kinds: tuple[Any, ...] = ("trained", "frozen")
    run = tmp_path / "run"
    found = assessed(planted, run, epochs=2, decoder=kinds, architecture=architectures)
    frozen = {entry["name"]: entry for entry in found["controls"] if entry["control"] == "frozen"}
    assert {entry["name"] for entry in found["controls"]} > frozen.keys()
    assert frozen.keys() == {f"{entry['name']}-frozen" for entry in found["variants"]}
    assert len(frozen) == len(architectures)
    start = unit_rows(64, 16, seed=0)
    for entry in found["variants"]:
        (check,) = (check for check in entry["evidence"] if check["name"] == "fvu_beside_frozen")
        control = frozen[check["against"]]
        errors = [e["metrics"]["fvu"]["value"] for e in (entry, control)]
        assert check["value"] == pytest.approx(errors[0] / errors[1], rel=1e-9)
        assert check["passed"] is (check["hi"] < 1)
        assert all("frozen" not in own["name"] for own in control["evidence"])
        rows_FD = Sae.load(run / control["name"]).W_dec.detach()
        lengths_F1 = rows_FD.norm(dim=1, keepdim=True)
        torch.testing.assert_close(rows_FD / lengths_F1, start, rtol=1e-6, atol=1e-7)
    with pytest.raises(ConfigError, match="is the control of another"):
        assess(AssessConfig(run=run, with_model=False, device="cpu", variant=next(iter(frozen))))


def test_a_frozen_decoder_alone_is_a_variant(planted: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the SAEs of the run; it is nobody's control."""
    found = assessed(planted, tmp_path / "run", decoder=("frozen",))
    assert [entry["name"] for entry in found["variants"]] == ["a-k3-f64-s0-lr0.003-frozen"]
    assert [entry["control"] for entry in found["controls"]] == ["random", "pca"]


def test_latents_are_counted_by_the_seeds_that_have_them(planted: ActivationStore, tmp_path: Path) -> None:
    """Oracle: `saemill compare` of the same SAEs, which matches them by code of its own."""
    run = tmp_path / "run"
    found = assessed(planted, run, epochs=2, seeds=(0, 1, 2))
    compare(CompareConfig(saes=(run,), matching="nearest", device="cpu", out=tmp_path / "out"))
    stable = pq.read_table(tmp_path / "out" / "stability.parquet").to_pandas().set_index("dictionary")
    latents = pq.read_table(run / "latents.parquet").to_pandas().set_index("variant")
    for entry in found["variants"]:
        counts = latents.loc[entry["name"]]["found_in_seeds"]
        assert counts.tolist() == stable.loc[entry["name"]]["found_in"].tolist()
        live = latents.loc[entry["name"]]["density"] >= 0.0005
        assert entry["found_in_seeds"] == np.bincount(counts[live], minlength=3).tolist()
    assert (stable["found_in"] == 2).any()
    assert "live latents by other seeds" in (run / "report.html").read_text()


def test_an_untrained_sae_fails(planted: ActivationStore, tmp_path: Path) -> None:
    """Oracle: an SAE as it starts, which is a random dictionary with a gain that was fitted."""
    found = assessed(planted, tmp_path / "run", max_tokens=256, lr=(1e-12,))
    assert found["variants"][0]["verdict"].startswith("failed: FVU")


def test_the_end_of_the_interval_decides() -> None:
    """Oracle: the limits by hand."""
    figure = {"value": 0.8, "lo": 0.7, "hi": 0.89}
    assert error_check("fvu", "random", "r", figure)["passed"] is True
    assert error_check("fvu", "random", "r", figure | {"hi": 0.91})["passed"] is False
    assert error_check("fvu", "pca", "p", figure | {"hi": 0.99})["passed"] is True
    assert error_check("fvu", "pca", "p", figure | {"hi": 1.0})["passed"] is False
    few = {"value": 0.1, "lo": None, "hi": None, "reason": "only 3 documents"}
    check = error_check("delta_ce", "pca", "p", few)
    assert (check["passed"], check["reason"], check["against"]) == (None, "only 3 documents", "p")


def test_conclusions() -> None:
    """Oracle: the rule, by hand: what failed decides, then whether FVU is known."""

    def check(metric: str, passed: bool | None, kind: str = "pca") -> dict[str, Any]:
        return {"name": f"{metric}_beside_{kind}", "metric": metric, "passed": passed}

    dead = {"name": "dead_fraction", "metric": "dead_fraction"}
    fine = [check("fvu", True), check("delta_ce", True), dead | {"passed": True}]
    assert conclude(fine) == "passed"
    assert conclude([*fine[:1], check("delta_ce", None), dead | {"passed": None}]) == (
        "passed, ΔCE, dead latents unknown"
    )
    assert conclude([check("fvu", None), check("delta_ce", True)]) == "unknown"
    assert conclude([check("fvu", None), check("delta_ce", False, "random"), dead | {"passed": False}]) == (
        "failed: ΔCE, dead latents"
    )
    assert conclude([]) == "unknown"


def test_variants_are_sorted_by_verdict_and_then_by_loss() -> None:
    """Oracle: sorted by hand; what was not measured comes last. Those that replace other sites are a group of
    their own, whose order their losses alone decide, and stand first where their best has the better
    verdict."""
    given = {
        "a": ("passed", 0.3), "b": ("passed, ΔCE unknown", 0.2), "c": ("failed: FVU, dead latents", 0.1),
        "d": ("unknown", 0.0), "e": ("passed", math.nan), "f": ("diverged at step 7", 0.0),
    }  # fmt: skip
    entries = [
        {"name": name, "site": "x", "verdict": verdict, "not_measured": verdict if name == "f" else None}
        for name, (verdict, _) in given.items()
    ]
    losses = {name: loss for name, (_, loss) in given.items() if name != "f"}
    assert [entry["name"] for entry in order(entries, losses)] == ["b", "a", "e", "d", "c", "f"]
    others = {"g": ("passed", 9.0), "h": ("passed", 8.0), "i": ("failed: FVU", 0.0)}
    entries += [
        {"name": name, "site": "x", "target_site": "y+z", "verdict": verdict, "not_measured": None}
        for name, (verdict, _) in others.items()
    ]
    losses |= {name: loss for name, (_, loss) in others.items()}
    assert "".join(entry["name"] for entry in order(entries, losses)) == "baedchgif"
    without = [entry for entry in entries if entry["name"] not in "abe"]
    assert "".join(entry["name"] for entry in order(without, losses)) == "hgidcf"


def test_the_k_of_an_sae_with_thresholds() -> None:
    """Oracle: the rule by hand: a k within 5% of the mean L0, else that rounded; 1 of an SAE that never
    fires, also where no other k is there."""
    with_k, without = random_sae(0, k=8), random_sae(0)
    without.config = replace(without.config, k=None, architecture="jumprelu")
    assert _ks({"a": with_k, "b": without, "c": without}, {"b": 8.3, "c": 5.6}) == {"a": 8, "b": 8, "c": 6}
    assert _ks({"b": without}, {"b": 0.0}) == {"b": 1}


def test_latents_that_are_dead_or_dense() -> None:
    """Oracle: the shares by hand."""
    density = np.array([0.5, 0.3, 0.05, 0.05, *[0.01] * 10, *[0.0] * 6])
    dense = _dense_share(density)
    assert dense["value"] == pytest.approx(0.8 / 1.0)
    figures = {"dead_fraction": {"value": 0.3}, "dense_share": dense}
    dead, dense_check = latent_checks(figures, Thresholds(), None)
    assert (dead["passed"], dense_check["passed"]) == (False, False)
    unsure, _ = latent_checks(figures, Thresholds(), "too few tokens")
    assert (unsure["passed"], unsure["reason"]) == (None, "too few tokens")
    assert "on average a latent is active 20.0% of the time" in _dense_share(np.full(5, 0.2))["reason"]
    assert _dense_share(np.zeros(3)) == {"value": None, "reason": "no latent fired"}

"""`saemill assess --probes --absorption`: a run on activations in which capitals are planted."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import finish, launch
from stores import make_store, make_tokens

import saemill
from saemill.assess.config import AssessConfig
from saemill.assess.probes.words import Vocabulary
from saemill.assess.run import run as assess
from saemill.common.errors import ConfigError
from saemill.common.stores import assessments
from saemill.train.config import TrainConfig
from saemill.train.run import run as train

D, CTX, ROWS = 16, 32, 2400


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two SAEs on activations 4 e_0 for a capital, a word's own noise for all else."""
    folder = tmp_path_factory.mktemp("probed")
    tokens = make_tokens(folder / "tokens", ROWS, CTX)
    ids = tokens.rows(0, ROWS).astype(np.int64)
    found = Vocabulary(tokens).find(ids, np.arange(ROWS * CTX).reshape(ROWS, CTX))
    x = torch.randn(8192, D, generator=torch.Generator().manual_seed(0))[torch.from_numpy(ids.reshape(-1))]
    capital = [word[:1].isupper() for word in found.texts_N.tolist()]
    x[found.addresses_N[capital], 0] += 4
    store = make_store(folder, ROWS, CTX, D, 8000, values_TD=x)
    train(
        TrainConfig(
            acts=store.path, out=folder / "run", site=("a",), k=(2, 6), num_latents=(32,), batch_size=512,
            lr=(3e-3,), epochs=2, device="cpu",
        )
    )  # fmt: skip
    return folder / "run"


def probed(run: Path, **values: Any) -> dict[str, Any]:
    settings = {"probes": True, "absorption": True} | values
    return assess(AssessConfig(run=run, with_model=False, n_latents=0, device="cpu", **settings))


@pytest.fixture(scope="module")
def assessment(run: Path) -> dict[str, Any]:
    return probed(run)


def test_a_planted_label_is_told_and_controls_are_as_they_must_be(assessment: dict[str, Any]) -> None:
    """Oracle: what was planted. Capitals are told, by one latent of the sparse SAE already, better than by a
    random dictionary; nothing else is; shuffled labels are at chance."""
    labels = {label["name"]: label for label in assessment["probes"]["labels"]}
    whole = labels["capitalised"]["activations"]["a"]
    assert whole["auc"]["value"] > 0.97
    assert whole["not_held"] is None
    assert labels["ends in -ed"]["activations"]["a"]["not_held"].startswith("the model does not hold it")
    assert abs(labels["7 letters or more"]["activations"]["a"]["auc"]["value"] - 0.5) < 0.08
    chances = [
        label["activations"]["a"]["auc_shuffled"]["value"]
        for label in labels.values()
        if not label["missing"]
    ]
    assert abs(np.mean(chances) - 0.5) < 0.05
    for variant in assessment["variants"]:
        probes = {(probe["label"], probe["k"]): probe for probe in variant["probes"]}
        probe = probes["capitalised", 1]
        assert probe["auc"]["value"] > 0.9
        assert probe["above_random"]["lo"] > 0
        assert len(probe["latents"]) == 1
        assert abs(probes["7 letters or more", 20]["auc"]["value"] - 0.5) < 0.08
        assert abs(variant["metrics"]["probe_auc_shuffled"]["value"] - 0.5) < 0.06
    for control in assessment["controls"]:
        assert {probe.get("above_random") is None for probe in control["probes"]} == {
            control["name"].startswith("random")
        }


def test_absorption_is_of_what_the_model_holds(assessment: dict[str, Any]) -> None:
    """Oracle: capitals alone are planted; their latent fires on most of the words."""
    best = assessment["variants"][0]
    assert best["metrics"]["absorption_first_letter"]["value"] is None
    assert (
        "first letters as directions; a mean needs 20" in best["metrics"]["absorption_first_letter"]["reason"]
    )
    concepts = {concept["concept"]: concept for concept in best["absorbed"]}
    measured = [name for name, concept in concepts.items() if not concept.get("missing")]
    assert measured == ["capitalised"]
    assert concepts["capitalised"]["recall"]["value"] > 0.8
    assert best["metrics"]["absorption_words"] == concepts["capitalised"]["fraction"]
    for control in assessment["controls"]:
        assert control["metrics"]["absorption_words_error"]["value"] is not None


def test_it_is_on_disk_and_checked(run: Path, assessment: dict[str, Any]) -> None:
    """Oracle: the record read back; the old names of figures are in the JSON, with the same values."""
    read = assessments.load(run)
    assert read.probes is not None
    assert read.probes.ks == (1, 2, 5, 20)
    assert read.variants[0].probes[0].auc.value == assessment["variants"][0]["probes"][0]["auc"]["value"]
    plain = json.loads((run / "final_assessment.json").read_text())
    for figures in (plain["variants"][0]["metrics"], plain["controls"][0]["metrics"]):
        assert figures["absorption"] == figures["max_decoder_cosine"]
        assert figures["absorption_random"] == figures["max_decoder_cosine_random"]
    page = (run / "report.html").read_text()
    assert "What latents tell" in page
    assert "Absorption" in page
    assert "The dictionary's health" in page


def test_without_probes_nothing_of_them_is_there(run: Path) -> None:
    """Oracle: the figures of probes are left out, the others are the same."""
    plain = probed(run, probes=False, absorption=False, out=run / "plain")
    assert plain["probes"] is None
    assert "probes" not in plain["variants"][0]
    assert not [
        name for name in plain["variants"][0]["metrics"] if name.startswith(("probe", "absorption_words"))
    ]
    assert "What latents tell" not in (run / "plain" / "report.html").read_text()
    only = probed(run, probes=False, out=run / "only")
    assert not [name for name in only["variants"][0]["metrics"] if name.startswith("probe")]
    assert only["variants"][0]["metrics"]["absorption_words"]["value"] is not None


def test_options_without_effect_are_refused(run: Path) -> None:
    """Oracle: the messages, which say how to repair it."""
    for values, message in (
        ({"probe_k": (1,), "absorption": True}, "probe_k has no effect without --probes"),
        ({"probe_examples": 1000}, "probe_examples has no effect without --probes or --absorption"),
        ({"probes": True, "probe_k": (5, 2)}, "probe_k must be ascending, got 5, 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            AssessConfig(run=run, **values)
    with pytest.raises(ConfigError, match=r"no label can be probed for: take more tokens \(--max-tokens"):
        probed(run, max_tokens=40, out=run / "few")
    assert not (run / "few").exists()


def test_two_processes_find_what_one_finds(run: Path, assessment: dict[str, Any]) -> None:
    """Oracle: the assessment by one process."""
    flags = ["--no-model", "--n-latents", "0", "--device", "cpu", "--probes", "--absorption"]
    command = ["-m", "saemill", "assess", str(run), "--out", str(run / "two"), *flags]
    finish(launch(2, *command, PYTHONPATH=str(Path(saemill.__file__).parents[1])))
    two = assessments.read(run / "two")
    assert two["n_processes"] == 2
    assert two["probes"]["examples"] == assessment["probes"]["examples"]
    for entries in ("variants", "controls"):
        for one, other in zip(assessment[entries], two[entries], strict=True):
            assert [probe["latents"] for probe in one["probes"]] == [p["latents"] for p in other["probes"]]
            for name, figure in one["metrics"].items():
                if name.startswith(("probe", "absorption_words")):
                    assert other["metrics"][name]["value"] == pytest.approx(figure["value"], abs=1e-4), name

"""`saemill demo`, whole."""

import json
from pathlib import Path

import pytest
import yaml
from command_line import call

from saemill import demo


def test_demo_trains_saes_and_shows_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: reconstruction and losses improve with k, all SAEs pass and what nobody trained fails; text
    snippets are shown; a second run is quick because every stage finds itself finished. Two of the demo's six
    SAEs, on half of its text, since the whole takes several times as long."""
    settings = yaml.safe_load(demo.SETTINGS.read_text())
    settings["train"] |= {
        "k": settings["train"]["k"][1:],
        "num_latents": settings["train"]["num_latents"][:1],
    }
    settings["cache"]["max_tokens"] = 500_000
    monkeypatch.setattr(demo, "SETTINGS", tmp_path / "demo.yaml")
    demo.SETTINGS.write_text(yaml.safe_dump(settings))
    first = call("demo", "-o", tmp_path / "demo")
    assessment = json.loads((tmp_path / "demo" / "run" / "final_assessment.json").read_text())
    by_k = sorted(assessment["variants"], key=lambda variant: variant["k"])
    assert [variant["k"] for variant in by_k] == settings["train"]["k"]
    for metric, sign in (("fvu", 1), ("delta_ce", 1), ("loss_recovered", -1)):
        values = [sign * v["metrics"][metric]["value"] for v in by_k]
        assert values == sorted(values, reverse=True)
    assert by_k[-1]["metrics"]["fvu"]["value"] < 0.1
    assert by_k[-1]["metrics"]["loss_recovered"]["value"] > 0.95
    verdicts = [[entry["verdict"] for entry in assessment[kind]] for kind in ("variants", "controls")]
    assert all(verdict.startswith("passed") for verdict in verdicts[0]), verdicts
    assert all(verdict.startswith("failed") for verdict in verdicts[1]), verdicts
    assert first.count("«") >= 10
    second = call("demo", "-o", tmp_path / "demo")
    assert second.count("finished already") == 2
    assert "nothing to do" in second

"""`saemill demo`, whole, as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

from command_line import call


def test_demo_trains_six_saes_and_shows_features(tmp_path: Path) -> None:
    """Oracle: reconstruction and losses improve with k, all SAEs pass and what nobody trained fails; text
    snippets are shown; a second run is quick because every stage finds itself finished."""
    command = [sys.executable, "-m", "saemill", "demo", "-o", str(tmp_path / "demo")]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    assessment = json.loads((tmp_path / "demo" / "run" / "final_assessment.json").read_text())
    assert len(assessment["variants"]) == 6
    for width in (1024, 2048):
        by_k = sorted((v for v in assessment["variants"] if v["num_latents"] == width), key=lambda v: v["k"])
        for metric, sign in (("fvu", 1), ("delta_ce", 1), ("loss_recovered", -1)):
            values = [sign * v["metrics"][metric]["value"] for v in by_k]
            assert values == sorted(values, reverse=True)
        assert by_k[-1]["metrics"]["fvu"]["value"] < 0.1
        assert by_k[-1]["metrics"]["loss_recovered"]["value"] > 0.95
    verdicts = [[entry["verdict"] for entry in assessment[kind]] for kind in ("variants", "controls")]
    assert all(verdict.startswith("passed") for verdict in verdicts[0]), verdicts
    assert all(verdict.startswith("failed") for verdict in verdicts[1]), verdicts
    assert first.stdout.count("«") >= 10
    second = call("demo", "-o", tmp_path / "demo")
    assert second.count("finished already") == 2
    assert "nothing to do" in second

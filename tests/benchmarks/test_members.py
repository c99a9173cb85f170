"""`benchmarks.train.members` and its contestants: every architecture of every package trains."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peers import PYTHON, ROOT, require_peers

from benchmarks.train import rows

GOALS = ("topk:8", "batchtopk:8", "matryoshka:8", "jumprelu:8", "relu:0.05", "gated:0.05")
SHAPE = ["--latents", "256", "--batch", "256"]


def run(folder: Path, python: str | Path, *command: object) -> None:
    """Run a module of `benchmarks.train`."""
    words = [str(python), "-m", *map(str, command)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    logs = "".join(log.read_text()[-3000:] for log in folder.glob("*/runs/*.log"))
    assert done.returncode == 0, done.stderr[-3000:] + logs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with planted rows in `rows`."""
    require_peers()
    folder: Path = tmp_path_factory.mktemp("members")
    parser = argparse.ArgumentParser()
    rows.add_arguments(parser)
    planted = ["--width", "32", "--rows", "4096", "--held-out", "512"]
    rows.make(folder / "rows", parser.parse_args(planted))
    return folder


@pytest.mark.parametrize("package", ["saemill", "saelens", "dictionary_learning"])
def test_contestants_have_every_member_at_one_l0(folder: Path, package: str) -> None:
    """Oracle: active latents on held-out rows after the last step, counted by the package's own encoder."""
    out = folder / f"{package}.json"
    goals = ",".join(f"{goal}:1e-5" for goal in GOALS)
    options = ["--goals", goals, "--start-l0", 8, "--steps", 4, "--eval-steps", 4, "--out", out]
    python = sys.executable if package == "saemill" else PYTHON
    module = f"benchmarks.train.contestants.{package}"
    run(folder, python, module, "--data", folder / "rows", *SHAPE, *options)
    (point,) = json.loads(out.read_text())["curve"]
    assert len(point["l0"]) == len(GOALS)
    assert point["l0"][0] == 8
    assert point["l0"][3:] == pytest.approx([8, 8, 8], rel=0.1)


def test_the_table_has_members_and_the_mixed_sweep(folder: Path) -> None:
    """Oracle: the runs' own files, whose median step and CPU seconds give the rates."""
    out = folder / "speed"
    entrants = ["--contestants", "saemill,dictionary_learning", "--members", "relu,topk", "--threads", "1"]
    planted = ["--width", 32, "--rows", 4096, "--held-out", 512, "--l0", 8]
    options = [*entrants, *planted, "--rounds", 1, "--steps", 4, "--warmup", 1, "--peers-python", PYTHON]
    run(folder, sys.executable, "benchmarks.train.members", *SHAPE, *options, "-o", out)
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    assert list(results) == ["relu", "topk", "mixed"]
    for subject, by_threads in results.items():
        for name, (found,) in by_threads["1"].items():
            own = json.loads((out / "runs" / f"{subject}-{name}-t1-r0-p0.json").read_text())
            n_saes = 2 if subject == "mixed" else 1
            assert found["tokens_per_s"] == pytest.approx(n_saes * 256 / own["median_step_seconds"])
            assert len(found["l0"]) == n_saes
    text = (out / "results.md").read_text()
    assert text.count("| dictionary_learning |") == 3

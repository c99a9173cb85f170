"""`benchmarks.train.quality`: SAEs of several packages by one yardstick, at equal L0."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peers import PYTHON, ROOT, require_peers
from pipeline import Pipeline

from benchmarks.train.equal_l0 import Point, at
from saemill.assess.config import AssessConfig
from saemill.assess.run import run as assess
from saemill.demo import MODEL


def points(*l0s: float) -> list[Point]:
    """Make SAEs whose figure is exactly linear in log L0."""
    return [Point(l0, {"fvu": {"value": 3 - math.log(l0), "lo": 2.5 - math.log(l0)}}) for l0 in l0s]


def test_figures_between_two_saes() -> None:
    """Oracle: a figure that is linear in log L0."""
    found = at(points(40, 10, 20), 30)
    assert found is not None
    assert found.metrics["fvu"]["value"] == pytest.approx(3 - math.log(30))
    assert found.metrics["fvu"]["lo"] == pytest.approx(2.5 - math.log(30))
    assert "hi" not in found.metrics["fvu"]
    assert found.how == "between 20.0 and 40.0"


def test_an_sae_that_another_beats_is_left_out() -> None:
    """Oracle: the figures without it."""
    worse = Point(25, {"fvu": {"value": 9.0}})
    assert at([*points(40, 20), worse], 30) == at(points(40, 20), 30)


def test_an_sae_near_an_l0_is_taken_as_it_is() -> None:
    """Oracle: that SAE's own figures."""
    near = points(31, 60)
    found = at(near, 32)
    assert found is not None
    assert found.metrics is near[0].metrics


@pytest.mark.parametrize("l0s", [(), (4, 8), (40, 80), (10, 41)], ids=str)
def test_no_figure_beyond_the_saes_or_across_a_gap(l0s: tuple[float, ...]) -> None:
    """Oracle: the definition."""
    assert at(points(*l0s), 20) is None


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The benchmark's folder and results, of two runs of it: the second adds a level."""
    require_peers()
    folder = tmp_path_factory.mktemp("quality")
    pipeline = Pipeline(folder, str(MODEL), str(MODEL), corpus, "layers.2")
    sizes = ["--latents", "128", "--tokens", "4096", "--batch", "128", "--l0", "4", "--threads", "1"]
    sizes += ["--assess-tokens", "2048", "--model-tokens", "512", "--members", "topk,relu"]
    levels = ["--levels", "saelens.relu=1", "--levels", "dictionary_learning.relu=0.03"]
    command = [
        sys.executable,
        "-m",
        "benchmarks.train.quality",
        "--acts",
        pipeline.acts,
        "--site",
        "layers.2",
    ]
    command += [*sizes, *levels, "--peers-python", PYTHON, "-o", folder / "out"]
    for further in ([], ["--levels", "saemill.relu=0.1,0.2"]):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, *further], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        logs = "".join(log.read_text()[-2000:] for log in folder.glob("out/runs/*.log"))
        assert done.returncode == 0, done.stderr[-3000:] + logs
    assert "saelens" not in done.stdout.partition("##")[0], "what was done was done again"
    return folder / "out", json.loads((folder / "out" / "results.json").read_text())


def test_every_package_is_measured(made: tuple[Path, list[dict[str, Any]]]) -> None:
    """Oracle: the names of the SAEs that were asked for, and the k of those that have one."""
    _, results = made
    assert [sae["name"] for sae in results] == [
        *("saemill-topk-4", "sparsify-topk-4", "saelens-topk-4", "dictionary_learning-topk-4"),
        *("saemill-relu-0.1", "saemill-relu-0.2", "saelens-relu-1", "dictionary_learning-relu-0.03"),
    ]
    for sae in results:
        assert sae["figures"]["fvu"]["value"] > 0
        if sae["member"] == "topk":
            assert 3.5 < sae["figures"]["l0"]["value"] <= 4


def test_the_yardstick_is_assess(made: tuple[Path, list[dict[str, Any]]]) -> None:
    """Oracle: `saemill assess` of saemill's own run on the same tokens."""
    out, results = made
    own = {Path(sae["folder"]).name: sae for sae in results if sae["contestant"] == "saemill"}
    run = Path(results[4]["folder"]).parent
    assert run.parent == out
    found = assess(
        AssessConfig(run=run, max_tokens=2048, model_tokens=512, n_latents=0, out=out / "assessed-again")
    )
    entries = {entry["name"]: entry["metrics"] for entry in found["variants"]}
    assert entries.keys() == own.keys()
    for name, sae in own.items():
        for figure, found_here in sae["figures"].items():
            for part in ("value", "lo", "hi"):
                expected = entries[name][figure][part]
                if expected is not None:  # as an interval of so few tokens may be
                    expected = pytest.approx(expected, rel=1e-6)
                assert found_here.get(part) == expected, (name, figure, part)

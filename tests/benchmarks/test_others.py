"""`benchmarks.evaluate.others`: by other people's definitions, saemill's figures are theirs."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from peers import PYTHON, ROOT, require_peers
from pipeline import Pipeline
from texts import random_texts

from saemill.demo import MODEL
from saemill.tokenize.config import TokenizeConfig
from saemill.tokenize.run import run as tokenize

CTX_LEN = 32


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[str, Any]:
    """What the benchmark writes for two SAEs of the demo model, on 64 rows of text that they never saw."""
    require_peers()
    folder = tmp_path_factory.mktemp("others")
    made = Pipeline(folder, str(MODEL), str(MODEL), corpus, "layers.2")
    text = folder / "other.jsonl"
    text.write_text("".join(json.dumps({"text": words}) + "\n" for words in random_texts(100, seed=1)))
    tokenize(
        TokenizeConfig(
            dataset=str(text),
            tokenizer=str(MODEL),
            out=folder / "other",
            ctx_len=CTX_LEN,
            held_out_fraction=0,
        )
    )
    options = ["--rows", "64", "--peers-python", PYTHON, "-o", folder / "out"]
    command = [sys.executable, "-m", "benchmarks.evaluate.others", made.out, folder / "other", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    log = folder / "out" / "evaluators.log"
    assert done.returncode == 0, done.stderr[-3000:] + (log.read_text()[-3000:] if log.exists() else "")
    result: dict[str, Any] = json.loads((folder / "out" / "results.json").read_text())
    assert result["data"]["n_documents_left_out_as_seen"] == 0
    assert len(result["variants"]) == 2
    return result


def test_hook_and_site_are_one_place(found: dict[str, Any]) -> None:
    """Oracle: TransformerLens' activations at the hook that `export` writes."""
    assert 0 < found["hook_error"]["blocks.2.hook_resid_post"] < 1e-4


def test_by_their_definitions_the_figures_are_theirs(found: dict[str, Any]) -> None:
    """Oracle: `run_evals` of SAELens and of SAEBench's core, the FVU of sparsify's forward pass and
    dictionary_learning's `evaluate`, each on the SAE that its own loader read."""
    for variant in found["variants"].values():
        theirs, steps = variant["theirs"], list(variant["steps"].values())
        assert len(steps[-1]) == 12
        for name, value in steps[-1].items():
            assert theirs["saelens"][name] == pytest.approx(value, rel=1e-4), name
            if name not in ("explained_variance", "mse"):  # SAEBench forms them otherwise, see below
                assert theirs["saebench"][name] == pytest.approx(value, rel=1e-4), name
        assert set(variant["others"]) == set(theirs)
        for tool, figures in variant["others"].items():
            for name, value in figures.items():
                assert theirs[tool][name] == pytest.approx(value, rel=1e-4), (tool, name)


def test_the_steps_begin_with_what_assess_says(found: dict[str, Any]) -> None:
    """Oracle: `saemill assess` on the same rows, and the counts of positions and latents."""
    for variant in found["variants"].values():
        first = variant["steps"]["saemill"]
        assert first.keys() == variant["ours"].keys()
        for name, value in first.items():
            assert variant["ours"][name]["value"] == pytest.approx(value, rel=1e-6), name


def test_every_step_changes_what_it_is_about(found: dict[str, Any]) -> None:
    """Oracle: the figures that each choice concerns, and no others; without it a step could be idle."""
    concerned = {
        "+ first positions": {"explained_variance", "ce_loss_without_sae", "ce_loss_with_ablation"},
        "+ not rounded": {"explained_variance", "mse"},
        "+ zeros everywhere": {"ce_loss_with_ablation", "ce_loss_score"},
        "+ KL at row ends": {"kl_div_with_sae"},
    }
    for variant in found["variants"].values():
        steps = list(variant["steps"].items())
        for (_, before), (step, after) in pairwise(steps):
            changed = {name for name, value in after.items() if value != before[name]}
            assert concerned[step] <= changed
            if step in ("+ zeros everywhere", "+ KL at row ends"):
                assert changed == concerned[step]

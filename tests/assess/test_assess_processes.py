"""An assessment by several processes, against the same one by a single process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pipeline import Pipeline
from typer.testing import CliRunner
from waiting import LIMIT_SECONDS

import saemill
from saemill.cli import app
from saemill.common.stores import features
from saemill.tokenize.config import TokenizeConfig
from saemill.tokenize.run import run as tokenize

PACKAGE = str(Path(saemill.__file__).parents[1])
ROUNDING = 1e-9
"""Relative; float64 sums differ by their order alone."""

FAILS = """
import os
from saemill.assess.splicing import Splicing
from saemill.cli import main
from saemill.common.errors import DataError

def fail(*_):
    raise DataError("this one is ill")

if os.environ["RANK"] == "1":
    Splicing._rows = fail
main()
"""

LEAVES = """
import os
from pathlib import Path
import torch
from saemill.common.world import World

with World.here().connected(torch.device("cpu")):
    import torch.distributed.nn.functional
names = [Path(f"/proc/self/task/{task}/comm").read_text() for task in os.listdir("/proc/self/task")]
assert not [name for name in names if "gloo" in name], names
"""


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, str], tokenizer_folder: str, corpus: Path
) -> Pipeline:
    """A run whose evaluation tokens lie in many shards, so that there are batches to deal."""
    folder = tmp_path_factory.mktemp("processes")
    return Pipeline(folder, tiny_models["neox"], tokenizer_folder, corpus, "layers.1", shard_tokens=1024)


def launch(n_processes: int, *command: str | Path) -> "subprocess.CompletedProcess[str]":
    """Start torchrun; one thread per process, as the number of threads changes sums as well."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(n_processes), "--rdzv-backend", "c10d"]
    return subprocess.run(
        [sys.executable, *torchrun, "--rdzv-endpoint", "localhost:0", *command],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PACKAGE},
        capture_output=True, text=True, timeout=LIMIT_SECONDS,
    )  # fmt: skip


def assess(n_processes: int, trained: Pipeline, out: Path, *flags: str) -> tuple[str, str]:
    """What the assessment prints, on stdout and stderr; alone it is this process."""
    arguments = ["assess", str(trained.out), "--out", str(out), "--device", "cpu", *flags]
    if n_processes == 1:
        alone = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert alone.exit_code == 0
        return alone.stdout, alone.stderr
    done = launch(n_processes, "-m", "saemill", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def result(out: Path) -> dict[str, Any]:
    """The assessment without what differs from run to run."""
    found: dict[str, Any] = json.loads((out / "final_assessment.json").read_text())
    for key in ("seconds", "n_processes", "files", "checksum"):
        del found[key]
    return found


def same(found: Any, expected: Any, where: str = "") -> None:
    """Equal: floats up to rounding, all else exactly."""
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key in expected:
            same(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, pair in enumerate(zip(found, expected, strict=True)):
            same(*pair, f"{where}/{i}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=ROUNDING, abs=1e-12), where
    else:
        assert found == expected, where


def same_sums(found: Path, expected: Path, n_processes: int) -> None:
    """Documents' sums are equal bit by bit, but for those that lie on two processes."""
    tables = [pq.read_table(path).to_pydict() for path in (found, expected)]
    assert list(tables[0]) == list(tables[1])
    unequal = np.zeros(len(tables[0]["text_hash"]), bool)
    for name, column in tables[0].items():
        np.testing.assert_allclose(column, tables[1][name], rtol=ROUNDING, atol=1e-9)
        if "/squares" not in name:  # their centre is the mean of all processes' tokens
            unequal |= np.array(column) != np.array(tables[1][name])
    assert unequal.sum() < n_processes


@pytest.mark.usefixtures("one_thread")
def test_two_processes_find_what_one_finds(trained: Pipeline, tmp_path: Path) -> None:
    """Oracle: one process. Counts, contexts and maxima exactly; sums up to their order."""
    flags = [
        "--model-tokens",
        "3000",
        "--max-tokens",
        "3000",
        "--context-tokens",
        "7000",
        "--batch-size",
        "4",
    ]
    for n_processes in (1, 2):
        stdout, stderr = assess(n_processes, trained, tmp_path / str(n_processes), *flags)
        assert stdout.count("best:") == 1
        assert "reconstruct: 3,000 of 3,000 tokens" in stderr
    one, two = (tmp_path / "1", tmp_path / "2")
    same(result(two), result(one))
    assert result(one)["data"]["n_tokens"] == 3000
    for name in ("documents", "documents_model"):
        same_sums(two / f"{name}.parquet", one / f"{name}.parquet", 2)
    shown = [features.load(out).model_dump() for out in (one, two)]
    means = [[latent.pop("mean_when_active") for latent in some["latents"]] for some in shown]
    assert shown[0] == shown[1]
    np.testing.assert_allclose(*means, rtol=ROUNDING)
    latents = [pq.read_table(out / "latents.parquet").to_pydict() for out in (one, two)]
    for name in ("variant", "latent", "density", "max"):
        assert latents[0][name] == latents[1][name]
    np.testing.assert_allclose(*(table["mean_when_active"] for table in latents), rtol=ROUNDING)


@pytest.mark.usefixtures("one_thread")
def test_other_tokens_and_fewer_rows_than_processes(
    trained: Pipeline, tmp_path: Path, tokenizer_folder: str, corpus: Path
) -> None:
    """Oracle: one process; of three one has no batch to splice, and two have none to search."""
    other = tokenize(
        TokenizeConfig(dataset=str(corpus), tokenizer=tokenizer_folder, out=tmp_path / "o", ctx_len=24)
    )
    flags = ["--tokens", str(other.path), "--model-tokens", "48", "--context-tokens", "20"]
    for n_processes in (1, 3):
        assess(n_processes, trained, tmp_path / str(n_processes), *flags, "--batch-size", "1")
    same(result(tmp_path / "3"), result(tmp_path / "1"))
    assert result(tmp_path / "1")["data"]["n_tokens_with_losses"] > 0
    for name in ("documents", "documents_model"):
        same_sums(tmp_path / "3" / f"{name}.parquet", tmp_path / "1" / f"{name}.parquet", 3)


def test_a_process_that_fails_ends_all(trained: Pipeline, tmp_path: Path) -> None:
    """Oracle: its own message with its rank, an exit code that says so, and nothing written."""
    (tmp_path / "fails.py").write_text(FAILS)
    done = launch(
        2, tmp_path / "fails.py", "assess", trained.out, "--out", tmp_path / "out", "--device", "cpu"
    )
    assert done.returncode != 0
    assert "error (rank 1 of 2 on " in done.stderr
    assert "this one is ill" in done.stderr
    assert not (tmp_path / "out" / "final_assessment.json").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_connections_end_with_the_block(tmp_path: Path) -> None:
    """Oracle: the process's threads; one of gloo's left at exit aborts the process now and then."""
    (tmp_path / "leaves.py").write_text(LEAVES)
    done = launch(2, tmp_path / "leaves.py")
    assert done.returncode == 0, done.stderr

"""The list of benchmarks, and the mixing of batches that `benchmarks.cache.loader` measures."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cache import store as stores
from benchmarks.cache.loader import Task, mixed

ROOT = Path(__file__).parents[2]
RUN_BY_OTHERS = {"benchmarks.cache.saelens_runner", "benchmarks.evaluate.evaluators"}
"""Modules with a command line that only another benchmark uses."""


def test_the_list_names_every_benchmark() -> None:
    """Oracle: the modules that can be run, by their source."""
    command = [sys.executable, "-m", "benchmarks"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [file for file in (ROOT / "benchmarks").glob("*/*.py") if '"__main__"' in file.read_text()]
    modules = {f"benchmarks.{file.parent.name}.{file.stem}" for file in files}
    listed = [line.split()[2] for line in text.splitlines() if line.strip().startswith("python -m")]
    assert sorted(listed) == sorted(modules - RUN_BY_OTHERS)


def test_mixing_of_batches(tmp_path: Path) -> None:
    """Oracle: arithmetic where rows are in the order of the text; and what a shuffle of all rows gives in
    the mean, which a loader comes close to whose window is the whole store."""
    path = stores.make(tmp_path, 2**17, 8)
    found = mixed(Task(path, batch_tokens=1024, buffer_tokens=2**17))
    assert found["order of the text"] == {"same": 511, "next": 0, "documents": 2, "positions": 0}
    expected = found["a full shuffle, expected"]
    for figures in (found["the loader"], found["stored order"]):
        assert figures["positions"] == pytest.approx(expected["positions"], rel=0.03)
    for name, value in found["the loader"].items():
        assert value == pytest.approx(expected[name], rel=0.03), name
    # One shard after another: half of the documents are there at a time.
    assert found["stored order"]["same"] == pytest.approx(1023 * 511 / (2**16 - 1), rel=0.03)

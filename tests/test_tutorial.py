"""The tutorial runs, and shows what it printed. `make tutorial` runs it anew and keeps its outputs."""

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import saemill

ROOT = Path(saemill.__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


def execute(folder: Path) -> Any:
    """The notebook with the outputs of a run in `folder`, less the progress on stderr."""
    notebook: Any = nbformat.read(NOTEBOOK, as_version=4)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ["PYTHONPATH"] = str(ROOT)
    client = NotebookClient(
        notebook,
        timeout=1200,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": folder}},
    )
    client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook: Any) -> str:
    return "\n".join(output["text"] for cell in code(notebook) for output in cell.outputs)


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the notebook's own assertions; the counts that it printed when it was committed."""
    for name in ("PATH", "PYTHONPATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # put back at the end
    text = printed(execute(tmp_path))
    counts = r"^tutorial-run/tokens: .*$|rows of 256, .* padded"
    assert (
        re.findall(counts, text, re.M) == re.findall(counts, printed(nbformat.read(NOTEBOOK, 4)), re.M) != []
    )
    assert (tmp_path / "tutorial-run" / "for-saelens" / "sae_weights.safetensors").is_file()


def test_the_committed_outputs_are_of_one_run() -> None:
    """Oracle: cells numbered in order; only text, of no particular machine, without errors or warnings."""
    notebook: Any = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert len(outputs) >= 9
    assert {(output.output_type, output.get("name")) for output in outputs} == {("stream", "stdout")}
    assert not re.search(r"(?:^|[\s'\"(])/\w|Warning|Traceback", printed(notebook))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(execute(Path(folder)), NOTEBOOK)

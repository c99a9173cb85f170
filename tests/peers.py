"""The peers' own environment (`make .venv-peers/ready`), and programs run in it.

`SAEMILL_PEERS` names it where it is not the `.venv-peers` beside this repository's files.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = Path(os.environ.get("SAEMILL_PEERS", ROOT / ".venv-peers")) / "bin" / "python"


def require_peers() -> None:
    """Skip the test without the peers' environment; in CI fail."""
    if not PYTHON.exists():
        reason = f"no peers at {PYTHON}: make .venv-peers/ready"
        if os.environ.get("SAEMILL_CI"):
            pytest.fail(reason)
        pytest.skip(reason)


def run_in_peers(folder: Path, *jobs: dict[str, Any], environment: dict[str, str] | None = None) -> None:
    """Run jobs of `in_peers.py`, one after another in one process, without a network or with a hub's
    environment."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs, default=str))
    done = subprocess.run(
        [PYTHON, ROOT / "tests" / "in_peers.py", file],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""} | (environment or {}),
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]

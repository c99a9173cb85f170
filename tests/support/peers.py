"""The peers' own environment (`make .venv-peers/ready`), and programs run in it.

`SAEMILL_PEERS` names it where it is not the `.venv-peers` beside this repository's files.
"""

import json
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("SAEMILL_PEERS", ROOT / ".venv-peers")) / "bin" / "python"


def require_peers() -> None:
    """Skip the test without the peers' environment; in CI fail."""
    if not PYTHON.exists():
        reason = f"no peers at {PYTHON}: make .venv-peers/ready"
        if os.environ.get("SAEMILL_CI"):
            pytest.fail(reason)
        pytest.skip(reason)


def run_in_peers(folder: Path, *jobs: dict[str, Any], environment: dict[str, str] | None = None) -> None:
    """Run jobs of `in_peers.py`, one after another.

    Without a network they run in a process that stays for the next ones, since its imports take long; with
    a hub's environment they have their own.
    """
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs, default=str))
    process = _started(environment) if environment else _staying()
    assert process.stdin
    assert process.stdout
    print(file, file=process.stdin, flush=True)
    answer = process.stdout.readline()
    if environment:
        process.communicate()
    assert answer, "the peers' process ended"
    assert not (traceback := json.loads(answer)), traceback


def _started(environment: dict[str, str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [PYTHON, Path(__file__).with_name("in_peers.py")],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""} | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@cache
def _staying() -> "subprocess.Popen[str]":
    return _started({})


def end_peers() -> None:
    """End the process that stayed, if there is one."""
    if _staying.cache_info().currsize:
        _staying().communicate()
        _staying.cache_clear()

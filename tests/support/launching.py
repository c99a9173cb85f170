"""Processes of saemill, one or several, as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path

from waiting import LIMIT_SECONDS

SUPPORT = Path(__file__).parent
"""Where the programs lie that tests start."""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def launch(n: int, *command: str, **environment: str) -> subprocess.Popen[str]:
    """n processes under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return subprocess.Popen(
        [sys.executable, *torchrun, "--nproc-per-node", str(n), *command],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT | environment,
    )


def launch_held(n: int, command: list[str], held_at: str, *options: str) -> subprocess.Popen[str]:
    """n processes under torchrun that wait in the training, as `held.py` says."""
    return launch(n, *options, str(SUPPORT / "held.py"), *command, HELD_AT=held_at)


def finish(process: subprocess.Popen[str]) -> str:
    """What processes print that end well."""
    stdout, stderr = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, stderr
    assert "terminate called" not in stderr
    return stdout

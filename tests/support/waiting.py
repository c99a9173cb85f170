"""Waiting for what happens, however long a busy machine takes over it."""

import subprocess
import time
from collections.abc import Callable
from typing import Any

LIMIT_SECONDS = 600
"""What has not happened by then never will; no test's outcome depends on how much sooner it does."""


def wait_until(happened: Callable[[], object], process: "subprocess.Popen[Any] | None" = None) -> None:
    """Return once something has happened; fail at once if the process that was to do it has ended."""
    end = time.monotonic() + LIMIT_SECONDS
    while not happened():
        assert process is None or process.poll() is None or happened(), process.communicate()
        assert time.monotonic() < end, f"did not happen within {LIMIT_SECONDS} s"
        time.sleep(0.01)

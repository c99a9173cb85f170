"""Crashes at every step that a stage makes on the disk."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zarr

from saemill.common import durable


def file_hashes(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


class Crash(BaseException):
    """Stands for the end of the process; no handler of errors catches it."""


def crash_at(moment: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """End the process, as it were, before the so-manieth step on the disk; a count of the steps."""
    steps = 0

    def wrap(holder: Any, name: str) -> None:
        original = getattr(holder, name)

        def step(*arguments: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps > moment:
                raise Crash
            return original(*arguments, **options)

        monkeypatch.setattr(holder, name, step)

    wrap(Path, "replace")
    wrap(Path, "unlink")
    wrap(os, "link")
    wrap(zarr, "create_group")
    wrap(zarr, "create_array")
    return lambda: steps


def bury(out: Path) -> None:
    """Let claims that a crash left in this process be those of a process that is gone."""
    for file in (out / "claims").glob("[!.]*"):
        if file.is_file() and "partial" not in file.name:
            file.write_text(json.dumps(durable.read_json(file) | {"started": "before"}))


def check_crashes(make: Callable[[Path], object], folder: Path, start: int = 0, stride: int = 1) -> None:
    """Make something whole, then with a crash before each step on the disk and once more: it must come out
    the same.

    Args:
        make: makes it in a folder.
        folder: where to.
        start: the first step that is not done.
        stride: every so-manieth is tried.
    """
    with pytest.MonkeyPatch.context() as patch:
        n_steps = crash_at(10**9, patch)
        make(folder / "whole")
    expected = file_hashes(folder / "whole")
    assert n_steps() > 20
    for moment in range(start, n_steps(), stride):
        out = folder / str(moment)
        with pytest.MonkeyPatch.context() as patch:
            crash_at(moment, patch)
            with pytest.raises(Crash):
                make(out)
        bury(out)
        make(out)
        assert file_hashes(out) == expected, f"after a crash at step {moment}"

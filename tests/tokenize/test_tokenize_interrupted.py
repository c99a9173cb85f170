"""`saemill tokenize` stopped at any moment, killed, or started twice."""

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from packing import TEXTS, jsonl, tokenize
from waiting import wait_until

import saemill.tokenize.run as stage
from saemill.common import durable
from saemill.common.errors import StoreError
from saemill.common.stores.tokens import TokenStore
from saemill.tokenize import row_files, writer
from saemill.tokenize.config import TokenizeConfig
from saemill.tokenize.memory import Given


def stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def stop_second_flush(patch: pytest.MonkeyPatch) -> None:
    flush, calls = row_files.RowFiles._flush, []

    def second(self: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        flush(self)

    patch.setattr(row_files.RowFiles, "_flush", second)


def stop_rename(patch: pytest.MonkeyPatch) -> None:
    replace = Path.replace

    def interrupted(path: Path, target: Path) -> Path:
        if target.name == "out":
            raise KeyboardInterrupt
        return replace(path, target)

    patch.setattr(Path, "replace", interrupted)


MOMENTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "second shard": stop_second_flush,
    "before the tables": lambda patch: patch.setattr(writer, "write_token_store", stop),
    "before the manifest": lambda patch: patch.setattr(durable, "write_json", stop),
    "before the rename": stop_rename,
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_folder: str, moment: str
) -> None:
    """Oracle: nothing at the output; the same command then makes the store of an undisturbed run."""
    monkeypatch.setattr(row_files, "SHARD_TOKENS", 320)
    file = jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.MonkeyPatch.context() as patch:
        MOMENTS[moment](patch)
        with pytest.raises(KeyboardInterrupt):
            tokenize(file, tmp_path / "out", tokenizer_folder)
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "out.partial" / "tokens").rglob("0")), "it had begun to write"
    if moment != "before the rename":
        with pytest.raises(StoreError, match="not a finished token store"):
            TokenStore(tmp_path / "out.partial")
    again = tokenize(file, tmp_path / "out", tokenizer_folder)
    whole = tokenize(file, tmp_path / "whole", tokenizer_folder)
    assert again.fingerprint == whole.fingerprint
    assert again.problems(hashes=True) == []
    assert not (tmp_path / "out.partial").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
import saemill.tokenize.run as stage
from saemill.tokenize import row_files as module
module.SHARD_TOKENS = 320
flush = module.RowFiles._flush
def flush_and_die(files):
    flush(files)
    if files.n_rows == 20:
        os.kill(os.getpid(), signal.SIGKILL)
module.RowFiles._flush = flush_and_die
file, tokenizer, out = sys.argv[1:]
settings = {"dataset": file, "tokenizer": tokenizer, "out": Path(out), "ctx_len": 32, "shuffle_seed": None}
stage.run(stage.TokenizeConfig(**settings))
"""


def test_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_folder: str) -> None:
    """Oracle: after SIGKILL nothing is at the output; the same command makes the undisturbed store."""
    file = jsonl(tmp_path / "a.jsonl", TEXTS)
    arguments = [sys.executable, "-c", KILLED, str(file), tokenizer_folder, str(tmp_path / "out")]
    killed = subprocess.run(
        arguments, env=os.environ | {"HF_HOME": str(tmp_path / "hf")}, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert len(list((tmp_path / "out.partial" / "tokens").rglob("0"))) >= 2
    assert not (tmp_path / "out").exists()
    with pytest.raises(StoreError, match="not a finished token store"):
        TokenStore(tmp_path / "out.partial")
    monkeypatch.setattr(row_files, "SHARD_TOKENS", 320)
    again = tokenize(file, tmp_path / "out", tokenizer_folder)
    assert again.fingerprint == tokenize(file, tmp_path / "whole", tokenizer_folder).fingerprint


FIRST_OF_TWO = """
import sys, time
from pathlib import Path
import saemill.tokenize.run as stage
from saemill.tokenize import row_files as module
module.SHARD_TOKENS = 320
flush = module.RowFiles._flush
def flush_and_wait(files):
    flush(files)
    while files.n_rows == 20 and not Path(go).exists():
        time.sleep(0.05)
module.RowFiles._flush = flush_and_wait
file, tokenizer, out, go = sys.argv[1:]
settings = {"dataset": file, "tokenizer": tokenizer, "out": Path(out), "ctx_len": 32, "shuffle_seed": None}
stage.run(stage.TokenizeConfig(**settings))
"""


@pytest.mark.parametrize("first", ["ends", "is killed"])
def test_a_second_process_waits_for_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_folder: str, first: str
) -> None:
    """Oracle: the undisturbed store, made by the first process if it lives, else by the second."""
    monkeypatch.setattr(row_files, "SHARD_TOKENS", 320)
    file, out, go = jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out", tmp_path / "go"
    whole = tokenize(file, tmp_path / "whole", tokenizer_folder)
    said: list[str] = []
    monkeypatch.setattr(durable, "say", said.append)
    arguments = [sys.executable, "-c", FIRST_OF_TWO, str(file), tokenizer_folder, str(out), str(go)]
    with subprocess.Popen(arguments, env=os.environ | {"HF_HOME": str(tmp_path / "hf")}) as process:
        written = tmp_path / "out.partial" / "tokens" / "c" / "1" / "0"
        wait_until(written.exists)
        with ThreadPoolExecutor(1) as pool:
            if first == "ends":
                monkeypatch.setattr(stage, "_write", lambda *_: pytest.fail("wrote as well"))
            second = pool.submit(tokenize, file, out, tokenizer_folder)
            try:
                wait_until(lambda: said or second.done())
                assert written.exists()
                assert not second.done()
                go.touch() if first == "ends" else process.kill()
                store = second.result()
            finally:
                process.kill()
    assert said == [f"another process is writing to {out}.partial; waiting for it"]
    assert store.fingerprint == whole.fingerprint
    assert store.problems(hashes=True) == []
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]


def test_two_processes_where_folders_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_folder: str
) -> None:
    """Oracle: the store of the process that ended first, untouched by the one that wrote meanwhile."""

    flock = fcntl.flock

    def files_alone(descriptor: int, operation: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, "as NFS says of a folder")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", files_alone)
    file, out = jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out"
    publish, made = stage.publish, []

    def another_first(config: TokenizeConfig, given: Given | None, partial: Path) -> None:
        monkeypatch.setattr(stage, "publish", publish)
        tokenize(file, out, tokenizer_folder)
        made.append((out / "manifest.json").stat().st_ino)
        assert partial.exists()
        publish(config, given, partial)

    monkeypatch.setattr(stage, "publish", another_first)
    store = tokenize(file, out, tokenizer_folder)
    assert made == [(out / "manifest.json").stat().st_ino]
    assert store.problems(hashes=True) == []
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]

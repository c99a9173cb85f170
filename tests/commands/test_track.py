"""`saemill track`: by hand what training starts by itself, on a finished run and on one that is trained."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from stores import make_store
from training import D, config, structured
from waiting import LIMIT_SECONDS, wait_until
from wandb_files import written

from saemill.common.errors import ConfigError, Interrupted, StoreError
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.runs import FINISHED, WANDB, WANDB_LOGGED
from saemill.common.tracking import process
from saemill.common.tracking.follow import records
from saemill.common.tracking.track import Watch, track
from saemill.train.run import run
from saemill.train.trainer import Trainer

ONE: dict[str, Any] = {"k": (4,), "num_latents": (48,), "log_to_wandb": True}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    folder = tmp_path_factory.mktemp("track")
    return make_store(folder, n_rows=256, ctx_len=32, d=D, shard_tokens=2048, values_TD=structured(256 * 32))


class Deaf:
    """In place of the process that training starts: one that could not log anything."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> "Deaf":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def unlogged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training that meant to log to wandb, and whose process for it did nothing."""
    monkeypatch.setattr("saemill.train.tracking.Wandb", Deaf)


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "saemill", "track", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def steps(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("unlogged")
def test_a_finished_run_is_sent_by_hand_once(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: metrics.jsonl beside wandb's own file; a second call opens no run."""
    out = tmp_path / "r"
    run(config(store, out, **ONE))
    assert not written(out)
    for _ in range(2):
        process_ = start(str(out))
        said = process_.communicate(timeout=LIMIT_SECONDS)[0]
        assert process_.returncode == 0, said
        assert said == f"{out}: 1 variant logged to wandb, project saemill, group r\n"
        ((_, (part,)),) = written(out).items()
        assert [row["step"] for row in part.history] == steps(out)
        assert (part.summary["state"], part.exit_code) == ("trained", 0)


@pytest.mark.usefixtures("unlogged")
def test_a_run_is_followed_by_hand_while_it_trains(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: metrics.jsonl; training waits until the first lines have arrived, before there are more."""
    out = tmp_path / "r"
    one_step = Trainer._one_step
    followers = []

    def waiting(self: Trainer) -> None:
        one_step(self)
        if self.step == 11:
            followers.append(start(str(out), "--follow"))
            wait_until(lambda: (out / WANDB_LOGGED).exists() and len(steps(out)) == 2)
            assert followers[0].poll() is None

    monkeypatch.setattr(Trainer, "_one_step", waiting)
    run(config(store, out, **ONE))
    said = followers[0].communicate(timeout=LIMIT_SECONDS)[0]
    assert followers[0].returncode == 0, said
    ((_, (part,)),) = written(out).items()
    assert [row["step"] for row in part.history] == steps(out) == [5, 10, 15, 20, 24]
    assert (part.summary["state"], part.exit_code) == ("trained", 0)


@pytest.mark.usefixtures("unlogged")
def test_an_unfinished_run_is_sent_as_far_as_it_is(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the lines that are there, once; a signal's exit code; then, training resumed, the lines that
    follow, in the same wandb run."""
    out = tmp_path / "r"
    one_step = Trainer._one_step

    def stopping(self: Trainer) -> None:
        one_step(self)
        if self.step == 12:
            self.stop.set()

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_one_step", stopping)
        with pytest.raises(Interrupted):
            run(config(store, out, **ONE))
    first = start(str(out))
    said = first.communicate(timeout=LIMIT_SECONDS)[0]
    assert (first.returncode, said.endswith("--follow goes on until it has\n")) == (0, True), said
    following = start(str(out), "--follow")
    wait_until(lambda: len(list(out.glob("wandb/offline-run-*"))) == 2 or following.poll() is not None)
    following.send_signal(signal.SIGTERM)
    said = following.communicate(timeout=LIMIT_SECONDS)[0]
    assert (following.returncode, "the same command continues" in said) == (75, True), said
    run(config(store, out, **ONE))
    second = start(str(out))
    assert second.wait(LIMIT_SECONDS) == 0, second.communicate()[0]
    ((_, parts),) = written(out).items()
    assert [[row["step"] for row in part.history] for part in parts] == [[5, 10], [], [15, 20, 24]]
    assert len({part.run.run_id for part in parts}) == 1
    assert [part.summary["state"] for part in parts] == ["interrupted", "interrupted", "trained"]


@pytest.mark.usefixtures("unlogged")
def test_two_that_track_one_run_come_one_after_the_other(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the lock of the log's file, held here; the sentence of the one that waits, then its end."""
    import fcntl

    out = tmp_path / "r"
    run(config(store, out, **ONE))
    (out / "wandb").mkdir(exist_ok=True)
    with (out / "wandb" / process.LOG).open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        waiting = start(str(out))
        assert waiting.stdout
        assert waiting.stdout.readline() == f"another process logs {out} to wandb; waiting for it\n"
        assert not written(out)
    assert waiting.wait(LIMIT_SECONDS) == 0, waiting.stdout.read()
    assert len(written(out)) == 1


@pytest.mark.usefixtures("unlogged")
def test_a_watch_ends_with_the_run_a_signal_or_another_training(
    store: ActivationStore, tmp_path: Path
) -> None:
    """Oracle: the files of a run, taken away and put back."""
    out, stop = tmp_path / "r", threading.Event()
    run(config(store, out, **ONE))
    watch = Watch(out, stop, waits=True)
    assert watch.word == "finished"
    (out / FINISHED).rename(tmp_path / FINISHED)
    assert watch.word is None
    assert Watch(out, stop, waits=False).word == "interrupted"
    stop.set()
    assert watch.word == "interrupted"
    (out / WANDB).unlink()
    with pytest.raises(StoreError, match="is trained anew meanwhile"):
        _ = watch.word


class Ended:
    """An end that comes when all of some lines were asked for."""

    word: str | None = None


def test_lines_are_read_whole_and_from_the_start_of_another_file(tmp_path: Path) -> None:
    """Oracle: the numbers that were written; half a line, and a file in the place of the first."""
    path, end = tmp_path / "metrics.jsonl", Ended()
    path.write_text('{"n": 1}\n{"n":')
    found = records(path, end)
    assert next(found) == {"n": 1}
    with path.open("a") as file:
        file.write(" 2}\n")
    assert next(found) == {"n": 2}
    other = tmp_path / "other"
    other.write_text('{"n": 1}\n{"n": 3}\n')
    other.replace(path)
    assert next(found) == {"n": 1}
    end.word = "finished"
    assert list(found) == [{"n": 3}]


def test_what_cannot_be_tracked_is_refused(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: a folder that is no run, and a run that was trained without wandb."""
    with pytest.raises(StoreError, match="is no run of `saemill train`"):
        track(tmp_path, False, None)
    out = tmp_path / "r"
    run(config(store, out, **ONE | {"log_to_wandb": False}))
    with pytest.raises(ConfigError, match=r"was not logged to wandb \(wandb.json is missing\)"):
        track(out, False, None)

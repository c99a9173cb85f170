"""Many processes that fill one store: they join, leave, die and wake up, and it is whole in the end."""

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from crashes import file_hashes
from launching import ENVIRONMENT
from stores import make_tokens
from waiting import LIMIT_SECONDS, wait_until

from saemill.cache.claims.owner import Seen
from saemill.cache.claims.worker import Worker
from saemill.cache.placing import OnDisk


@pytest.fixture(scope="module")
def whole(tiny_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokens and the store that one process makes of them."""
    folder = tmp_path_factory.mktemp("many")
    make_tokens(folder / "tokens", 120, 32)
    (folder / "model").symlink_to(tiny_models["neox"])
    subprocess.run(command(folder, folder / "whole"), check=True, capture_output=True, env=ENVIRONMENT)
    return folder


def command(folder: Path, out: Path, layers: str = "0,2") -> list[str]:
    """60 shards of two rows at each site, as int8: whoever calibrates first does so for all."""
    return [
        sys.executable, "-m", "saemill", "cache", str(folder / "tokens"), "--model", str(folder / "model"),
        "--layers", layers, "--shard-tokens", "64", "--batch-size", "1", "--dtype", "int8",
        "-o", str(out),
    ]  # fmt: skip


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT
    )


def assert_all_complete(processes: list[subprocess.Popen[str]], whole: Path, out: Path) -> list[str]:
    """Every process ends well, and the store is that of one process, file by file; what they said."""
    said = [process.communicate(timeout=LIMIT_SECONDS)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)
    assert file_hashes(out) == file_hashes(whole / "whole")
    assert not (out / "claims").exists()
    return said


def n_commits(out: Path) -> int:
    return len(list(out.glob("*/commits/*.json")))


@contextmanager
def kept_back(out: Path) -> Iterator[None]:
    """While the block runs this process has a shard's claim, so that nobody can finish the store."""
    with Worker(OnDisk(out), threading.Event()) as here:
        claim = here.claim("shard-30")
        assert claim
        yield
        claim.release()


def claimed_by(out: Path, process: subprocess.Popen[str]) -> bool:
    """Whether a process is among the workers: from then on it heeds signals."""
    there = (Seen.at(path) for path in (out / "claims").glob("worker-*"))
    return any(seen and seen.owner and seen.owner.pid == process.pid for seen in there)


def test_workers_join_and_leave(whole: Path, tmp_path: Path) -> None:
    """Oracle: the store of one process; two start at once, for other sites and the same; one leaves at a
    SIGUSR1 with code 75 and another joins."""
    out = tmp_path / "acts"
    with kept_back(out):
        first, leaving = start(command(whole, out)), start(command(whole, out, "2"))
        wait_until(lambda: n_commits(out) >= 4 and claimed_by(out, leaving))
        leaving.send_signal(signal.SIGUSR1)
        joining = start(command(whole, out, "0"))
        text = leaving.communicate(timeout=LIMIT_SECONDS)[0]
        assert (leaving.returncode, "the same command continues" in text) == (75, True), text
    assert_all_complete([first, joining], whole, out)


def test_ranks_share_the_shards(whole: Path, tmp_path: Path) -> None:
    """Oracle: the store of one process; of torchrun's two processes one talks."""
    out = tmp_path / "acts"
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    (said,) = assert_all_complete([start([*run, *command(whole, out)[1:]])], whole, out)
    assert said.count("layers.0, layers.2 complete; ") == 1


def test_workers_killed_at_random(whole: Path, tmp_path: Path) -> None:
    """Oracle: the store of one process; two workers, each death replaced by a new worker."""
    generator, out = random.Random(0), tmp_path / "acts"
    with kept_back(out):
        running = [start(command(whole, out)) for _ in range(2)]
        for goal, layers in ((0, "2"), (5, "0"), (60, "0,2")):
            wait_until(lambda goal=goal: n_commits(out) >= goal)  # type: ignore[misc]
            killed = running.pop(generator.randrange(len(running)))
            killed.kill()
            running.append(start(command(whole, out, layers)))
    assert_all_complete(running, whole, out)


def silenced(out: Path, process: subprocess.Popen[str]) -> None:
    """Stop a worker, and let the last it was heard of be long ago."""
    process.send_signal(signal.SIGSTOP)
    tasks = Path(f"/proc/{process.pid}/task")
    wait_until(lambda: all(") T" in (task / "stat").read_text() for task in tasks.iterdir()))
    for path in (out / "claims").glob("worker-*"):
        if (seen := Seen.at(path)) and seen.owner and seen.owner.pid == process.pid:
            os.utime(path, (seen.time - 1000, seen.time - 1000))


def test_a_stopped_worker_is_replaced_and_wakes_up_to_a_whole_store(whole: Path, tmp_path: Path) -> None:
    """Oracle: the store of one process; a worker is stopped for longer than its claims last."""
    out = tmp_path / "acts"
    with kept_back(out):
        stopped = start(command(whole, out))
        wait_until(lambda: n_commits(out) >= 10)
        silenced(out, stopped)
    try:
        second = start(command(whole, out))
        said = second.communicate(timeout=LIMIT_SECONDS)[0]
        assert second.returncode == 0, said
        assert n_commits(out) == 120
    finally:
        stopped.send_signal(signal.SIGCONT)
    assert_all_complete([stopped], whole, out)

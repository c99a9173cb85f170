"""Claims: who may write a shard, who counts as dead, and who clears up after whom."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from launching import ENVIRONMENT
from stores import make_store
from waiting import wait_until

from saemill.cache.claims import owner
from saemill.cache.claims import worker as claims
from saemill.cache.claims.worker import Claim, Lost, Worker
from saemill.cache.placing import OnDisk
from saemill.cache.spare import Spare
from saemill.cache.writer import SiteWriter
from saemill.common import durable
from saemill.common.errors import Interrupted
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.site_records import Site
from saemill.show import problems


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Callable[[], Worker]]:
    """Makes workers in one folder."""
    made = []

    def make() -> Worker:
        made.append(Worker(OnDisk(tmp_path), threading.Event()))
        return made[-1].__enter__()

    yield make
    for worker in made:
        worker.__exit__(None, None, None)


def file_of(worker: Worker) -> Path:
    return worker.folder / f"worker-{worker.owner.token}"


def fall_silent(worker: Worker, seconds: float) -> None:
    """Let a worker be one of another machine that was last heard of so long ago."""
    worker._left.set()
    worker._heart.join()
    now = worker._now()
    file_of(worker).write_text(json.dumps(durable.read_json(file_of(worker)) | {"machine": "another"}))
    os.utime(file_of(worker), (now - seconds, now - seconds))


COUNTER = """
import sys, threading
from pathlib import Path
from saemill.cache.claims.worker import Worker
from saemill.cache.placing import OnDisk
folder = Path(sys.argv[1])
def count():
    with Worker(OnDisk(folder), threading.Event()) as worker:
        for _ in range(int(sys.argv[2])):
            with worker.hold("store"):
                (folder / "count").write_text(str(int((folder / "count").read_text()) + 1))
threads = [threading.Thread(target=count) for _ in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


def test_a_claim_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    """Oracle: a counter in a file, read and written without any other lock by six workers of three
    processes; and no folder is left."""
    (tmp_path / "count").write_text("0")
    command = [sys.executable, "-c", COUNTER, str(tmp_path), "10"]
    processes = [subprocess.Popen(command, env=ENVIRONMENT) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "60"
    assert [path.name for path in tmp_path.iterdir()] == ["count"]


STEPS = st.lists(
    st.tuples(st.sampled_from(["take", "release", "die", "join"]), st.integers(0, 2)), max_size=25
)


@given(STEPS)
@hypothesis_settings(max_examples=40)
def test_any_order_of_taking_releasing_and_dying(steps: list[tuple[str, int]]) -> None:
    """Oracle: a variable that says who holds the claim; a dead one holds nothing."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        workers = [Worker(OnDisk(path), threading.Event()).__enter__() for _ in range(3)]
        held: dict[int, Claim] = {}
        for step, i in steps:
            worker = workers[i]
            if step == "take":
                claim = worker.claim("shard-7")
                assert (claim is None) == bool(held)
                if claim:
                    held[i] = claim
            elif step == "release" and i in held:
                held.pop(i).release()
            elif step == "die":
                file_of(worker).write_text(
                    json.dumps(durable.read_json(file_of(worker)) | {"started": "before"})
                )
                worker._left.set()
                held.pop(i, None)
                workers[i] = Worker(OnDisk(path), threading.Event()).__enter__()
            elif step == "join":
                with Worker(OnDisk(path), threading.Event()) as other:
                    assert other.claim("shard-8")
            for claim in held.values():
                claim.check()
        for worker in workers:
            worker.__exit__(None, None, None)
        assert not (path / "claims").exists()


def test_a_silent_worker_expires_by_the_file_systems_clock(
    workers: Callable[[], Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: 120 s since its file was touched; this machine's clock, which is a day off, has no say."""
    there, here = workers(), workers()
    lost = there.claim("shard-1")
    assert lost
    monkeypatch.setattr(time, "time", lambda: 0.0)
    fall_silent(there, 115)
    assert here.claim("shard-1") is None
    assert here.holders(["shard-1"]) == f"process {os.getpid()} on {lost.worker.owner.host}"
    fall_silent(there, 121)
    claim = here.claim("shard-1")
    assert claim
    claim.check()
    with pytest.raises(Lost, match="shard-1 was taken over by another worker"):
        lost.check()
    lost.release()
    claim.check()


class Ticks(threading.Event):
    """Told to wait, it returns at once; it knows how long it was to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[float | None] = set()

    def wait(self, timeout: float | None = None) -> bool:
        self.asked.add(timeout)
        return super().wait(0.01)


def test_the_heartbeat_keeps_a_worker_alive(workers: Callable[[], Worker], tmp_path: Path) -> None:
    """Oracle: a file that was touched 2,000 s ago is touched again while its worker lives, 24 times within
    the 120 s after which it counts as dead; and no more when its heart has stopped."""
    here, there = workers(), Worker(OnDisk(tmp_path), threading.Event())
    there._left = ticks = Ticks()
    with there:
        file_of(there).write_text(json.dumps(durable.read_json(file_of(there)) | {"machine": "another"}))
        assert there.claim("shard-1")
        now = here._now()
        os.utime(file_of(there), (now - 2000, now - 2000))
        wait_until(lambda: file_of(there).stat().st_mtime > now - 1)
        assert here.claim("shard-1") is None
        assert ticks.asked == {120 / 24}
        fall_silent(there, 121)
        assert here.claim("shard-1")


def test_a_process_of_another_machine_is_not_judged_by_its_number(workers: Callable[[], Worker]) -> None:
    """Oracle: a process number that is not in use here; on this machine it is dead at once."""
    there, here = workers(), workers()
    assert there.claim("shard-1")
    content = durable.read_json(file_of(there)) | {"pid": 2**22 + 1}
    file_of(there).write_text(json.dumps(content | {"machine": "another"}))
    assert here.claim("shard-1") is None
    file_of(there).write_text(json.dumps(content))
    assert here.claim("shard-1")


def test_a_killed_process_is_dead_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    """Oracle: a process killed while it holds a claim and has a partial file; nobody waited for it yet."""
    code = """
import sys, threading
from pathlib import Path
from saemill.cache.claims.worker import Worker
from saemill.cache.placing import OnDisk
worker = Worker(OnDisk(Path(sys.argv[1])), threading.Event()).__enter__()
worker.partial().write_text("half")
print(bool(worker.claim("shard-1")), flush=True)
sys.stdin.read()
"""
    folder = tmp_path / "claims"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "True\n"
        with Worker(OnDisk(tmp_path), threading.Event()) as worker:
            assert worker.claim("shard-1") is None
        assert len(list(folder.iterdir())) == 3
        process.kill()
        wait_until(lambda: owner._started(process.pid) in ("ended", None))
        with Worker(OnDisk(tmp_path), threading.Event()) as worker:
            assert worker.claim("shard-1")
        assert not folder.exists()


def test_a_worker_that_dies_as_it_arrives_leaves_nothing(tmp_path: Path) -> None:
    """Oracle: an empty folder's absence; a crash before its first, second, third step on the disk."""
    folder = tmp_path / "claims"
    for name in ("mkdir", "write_text", "replace"):
        code = f"""
import os, sys, threading
from pathlib import Path
from saemill.cache.claims.worker import Worker
from saemill.cache.placing import OnDisk
Path.{name} = lambda *_, **__: os._exit(9)
Worker(OnDisk(Path(sys.argv[1])), threading.Event()).__enter__()
"""
        assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=ENVIRONMENT).returncode == 9
        with Worker(OnDisk(tmp_path), threading.Event()) as worker:
            assert worker.claim("store")
        assert not folder.exists()


def test_a_worker_that_was_taken_for_dead_goes_on_as_a_new_one(workers: Callable[[], Worker]) -> None:
    """Oracle: its file was removed; its old claim is lost, and it can make new ones."""
    there, here = workers(), workers()
    old = there.claim("shard-1")
    assert old
    fall_silent(there, 1000)
    workers()
    assert not file_of(there).exists()
    with pytest.raises(Lost):
        old.check()
    claim = there.claim("shard-1")
    assert claim
    claim.check()
    assert here.claim("shard-1") is None


def test_a_worker_that_revives_as_it_is_removed_keeps_its_work(
    workers: Callable[[], Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the claim, when the sign of life comes after another saw that the worker was silent."""
    there, here = workers(), workers()
    claim = there.claim("shard-1")
    assert claim
    fall_silent(there, 1000)
    bury = here.board.bury

    def revived(*arguments: Any) -> bool:
        there.board.touch(there.owner)
        return bury(*arguments)

    monkeypatch.setattr(here.board, "bury", revived)
    assert here.claim("shard-1") is None
    claim.check()


def test_waiting_is_told_and_ends_with_a_signal(
    workers: Callable[[], Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: this process's number; the event that a signal sets, here when the wait is told, on which
    whoever waits raises."""
    there, here = workers(), workers()
    assert there.claim("store")
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        here.stop.set()

    monkeypatch.setattr(claims, "say", say)
    with pytest.raises(Interrupted, match="the same command continues"), here.hold("store"):
        pass
    assert said == [f"waiting for process {os.getpid()} on {there.owner.host}"]


def one_shard(store: ActivationStore, worker: Worker, values_TD: torch.Tensor) -> SiteWriter:
    """Write shard 1 of site `a` under a claim, as if computed by 2 rows per forward pass."""
    writer = SiteWriter(store, Site("a", 8), worker)
    claim = worker.claim("shard-1")
    assert claim
    writer.write(1, values_TD, claim, Spare(), batch_rows=2)
    claim.release()
    return writer


@pytest.mark.parametrize("before", [False, True], ids=["by a new one", "by one that was there"])
@pytest.mark.parametrize("orphan", [False, True], ids=["", "over a file without record"])
@pytest.mark.parametrize("same", [False, True], ids=["other bytes", "same bytes"])
def test_a_worker_that_wakes_up_late_spoils_nothing(
    same: bool, orphan: bool, before: bool, tmp_path: Path
) -> None:
    """Oracle: a shard's record holds the hash of its file, or there is no record and no manifest, when a
    worker is stopped before any step on the disk and another, with other batches, takes over and finishes
    meanwhile; and there is a record where the file is as that one alone writes it."""
    made = make_store(tmp_path / "made", 48, 16, 8, 256)
    values = torch.randn(256, 8)
    others = values if same else values + 1
    alone = ActivationStore(Path(shutil.copytree(made.path, tmp_path / "alone" / "acts")))
    (alone.path / "a" / "commits" / "1.json").unlink()
    with Worker(OnDisk(alone.path), threading.Event()) as worker:
        one_shard(alone, worker, others)
    for moment in range(100):
        path = Path(shutil.copytree(made.path, tmp_path / f"{moment}" / "acts"))
        (path / "a" / "manifest.json").unlink()
        (path / "a" / "commits" / "1.json").unlink()
        if not orphan:
            (path / "a" / "c" / "1" / "0").unlink()
        store = ActivationStore(path)
        reached = stopped_at(moment, store, values, others, before)
        data, commit = path / "a" / "c" / "1" / "0", path / "a" / "commits" / "1.json"
        if commit.exists():
            assert durable.hash_file(data) == durable.read_json(commit)["xxh3"]
        if data.read_bytes() == (alone.path / "a" / "c" / "1" / "0").read_bytes():
            assert commit.exists()
        if (path / "a" / "manifest.json").exists():
            assert problems(path) == []
        assert commit.exists() or not (path / "a" / "manifest.json").exists()
        if not reached:
            assert moment > 8
            return
    raise AssertionError("the writing never ended")


def stopped_at(
    moment: int, store: ActivationStore, values: torch.Tensor, others: torch.Tensor, before: bool
) -> bool:
    """Write a shard; before the so-manieth step another worker takes over, that was there before or comes
    then, and clears away what is unfinished. Whether it came to that."""
    late, steps = Worker(OnDisk(store.path), threading.Event()), 0
    there = Worker(OnDisk(store.path), threading.Event()) if before else None

    def take_over() -> None:
        file_of(late).write_text(json.dumps(durable.read_json(file_of(late)) | {"started": "before"}))
        with nullcontext(there) if there else Worker(OnDisk(store.path), threading.Event()) as other:
            one_shard(store, other, others).finish()

    with late, there or nullcontext(), pytest.MonkeyPatch.context() as patch:

        def wrap(holder: Any, name: str) -> None:
            original = getattr(holder, name)

            def step(*arguments: Any, **options: Any) -> Any:
                nonlocal steps
                steps += 1
                if steps == moment + 1:
                    take_over()
                return original(*arguments, **options)

            patch.setattr(holder, name, step)

        writer = SiteWriter(store, Site("a", 8), late)
        claim = late.claim("shard-1")
        assert claim
        for holder, name in ((os, "link"), (os, "fsync"), (Path, "replace"), (Path, "unlink"),
                             (Path, "exists"), (Path, "stat"), (Path, "samefile")):  # fmt: skip
            wrap(holder, name)
        with suppress(Lost):
            writer.write(1, values, claim, Spare())
        patch.undo()
    return steps > moment


def test_a_worker_knows_whether_others_live(tmp_path: Path) -> None:
    """Oracle: one worker, two, one again; only the last may clear a store that holds no shard."""
    with Worker(OnDisk(tmp_path), threading.Event()) as first:
        assert first.is_alone()
        with Worker(OnDisk(tmp_path), threading.Event()) as second:
            assert not first.is_alone()
            assert not second.is_alone()
        assert first.is_alone()

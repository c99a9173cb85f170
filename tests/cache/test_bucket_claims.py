"""Claims in a bucket: the clock that counts, and what a worker finds that was taken for dead."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from object_store import S3
from waiting import wait_until

from saemill.cache.claims.objects import Objects
from saemill.cache.claims.owner import Owner
from saemill.cache.claims.worker import Lost, Worker
from saemill.cache.placing import InBucket
from saemill.common.stores import mirror

ADDRESS = "s3://bucket/shared"


@pytest.fixture
def workers(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Worker]]:
    """Makes workers at one address, each on a machine of its own, whose hearts do not beat."""
    made: list[Worker] = []

    def make() -> Worker:
        owner = Owner.here().model_copy(update={"machine": f"machine {len(made)}"})
        with monkeypatch.context() as patch:
            patch.setattr(Owner, "here", lambda: owner)
            patch.setattr(Worker, "_beat", lambda self: None)
            made.append(Worker(InBucket(ADDRESS), threading.Event()).__enter__())
        return made[-1]

    yield make
    for worker in made:
        worker.__exit__(None, None, None)


def keys(worker: Worker) -> list[str]:
    """Names of the objects by which workers know of one another."""
    assert isinstance(worker.board, Objects)
    return sorted(worker.board.remote.list())


def test_a_claim_lasts_while_its_worker_gives_signs_of_life(
    workers: Callable[[], Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the bucket's clock, by which a worker of another machine is silent for longer than its 2 s;
    this machine's, which is years off, has no say. The one that was taken for dead finds that out, and what
    it releases late harms none."""
    monkeypatch.setenv("SAEMILL_CLAIM_SECONDS", "2")
    there, here = workers(), workers()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    lost = there.claim("shard-1")
    assert lost
    assert here.claim("shard-1") is None
    assert here.holders(["shard-1"]) == str(there.owner)
    assert not here.is_alone()
    began = here.board.touch(here.owner)
    wait_until(lambda: here.claim("shard-1") is not None)
    assert here.board.touch(here.owner) - began >= 2
    with pytest.raises(Lost, match="shard-1 was taken over by another worker"):
        lost.check()
    lost.release()
    (claim,) = here.claims
    claim.check()
    assert there.claim("shard-1") is None
    claim.release()
    assert there.claim("shard-1")


@pytest.mark.parametrize("moment", ["before it is looked at again", "before it is replaced"])
def test_a_worker_that_revives_as_it_is_removed_keeps_its_work(
    moment: str, s3: S3, workers: Callable[[], Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the claim, and the worker's object, when its sign of life comes after others saw that it was
    silent for too long, and right before they look at it again, or replace it."""
    monkeypatch.setenv("SAEMILL_CLAIM_SECONDS", "2")
    there, here = workers(), workers()
    claim = there.claim("shard-1")
    assert claim
    token = there.owner.token
    wait_until(lambda: here.board.workers()[token].is_dead(here._now()))
    method, revived = ("HEAD" if moment.endswith("again") else "PUT"), []

    def revive(asked: str, path: str, headers: dict[str, str]) -> None:
        if not revived and asked == method and path.endswith(f"/worker-{token}"):
            revived.append(path)
            there.board.touch(there.owner)

    s3.watch = revive
    assert here.claim("shard-1") is None
    assert revived
    s3.calm()
    claim.check()
    assert there.owner.token == token
    assert there.board.touch(there.owner)


def test_a_worker_that_was_removed_notices_by_its_heart(
    s3: S3, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the message, told once; the object under a new name, and none under the old one; the claim that
    nobody took over, which holds."""
    monkeypatch.setenv("SAEMILL_CLAIM_SECONDS", "1.2")
    with Worker(InBucket(ADDRESS), threading.Event()) as worker:
        claim = worker.claim("shard-1")
        assert claim
        old = worker.owner.token
        seen = worker.board.workers()[old]
        while not worker.board.bury(old, seen):  # whenever its heart was quicker
            seen = worker.board.workers()[old]
        wait_until(lambda: worker.owner.token != old and worker.owner.token in worker.board.workers())
        assert old not in worker.board.workers()
        claim.check()
        claim.release()
    assert capsys.readouterr().out.count("was taken for dead by another one that works in s3://bucket") == 1


def test_a_sign_of_life_of_which_the_answer_is_lost_counts(s3: S3, workers: Callable[[], Worker]) -> None:
    """Oracle: the number of beats in the object: the second attempt finds that the first one came through."""
    worker = workers()
    lost: list[str] = []

    def lose(path: str, answer: tuple[int, bytes]) -> tuple[int, bytes] | None:
        if lost:
            return answer
        lost.append(path)
        return None

    before = worker.board.workers()[worker.owner.token].owner
    s3.fault = lose
    worker.board.touch(worker.owner)
    after = worker.board.workers()[worker.owner.token].owner
    assert lost
    assert before
    assert after
    assert after.beat == before.beat + 1


def test_of_many_that_reach_for_a_claim_one_gets_it(workers: Callable[[], Worker]) -> None:
    """Oracle: at most one of four threads has a claim at a time, and each has it some time; nothing is left
    of a worker that leaves, and nothing of claims is in a mirror."""
    holding = most = 0
    lock = threading.Lock()

    def work(worker: Worker) -> None:
        nonlocal holding, most
        with worker.hold("store"):
            with lock:
                holding += 1
                most = max(most, holding)
            time.sleep(0.05)
            with lock:
                holding -= 1

    four = [workers() for _ in range(4)]
    threads = [threading.Thread(target=work, args=(worker,)) for worker in four]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert keys(four[0]) == sorted(f"claims/worker-{worker.owner.token}" for worker in four)
    assert list(mirror.folder_of(ADDRESS).glob("claims*")) == []
    four[3].__exit__(None, None, None)
    assert f"claims/worker-{four[3].owner.token}" not in keys(four[0])


def test_the_heart_beats_at_a_bucket_too(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: writes of the worker's object while it does nothing, though some of them fail for good, or are
    refused."""
    monkeypatch.setenv("SAEMILL_CLAIM_SECONDS", "1.2")
    beats: list[str] = []
    with Worker(InBucket(ADDRESS), threading.Event()):
        s3.lose = lambda method, path, body: None
        s3.watch = lambda method, path, headers: beats.append(path)
        wait_until(lambda: len(beats) > 6)
        s3.calm()
        refused: list[str] = []
        s3.fault = lambda path, answer: (
            refused.append(path) or (403, b"<Error><Code>AccessDenied</Code></Error>")
        )
        wait_until(lambda: len(refused) > 2)
        s3.calm()
        beats = []
        s3.watch = lambda method, path, headers: beats.append(path)
        wait_until(lambda: len(beats) > 2)

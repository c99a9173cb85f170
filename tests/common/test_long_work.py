"""Work of the first process that takes longer than one process waits for another."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from saemill.common.errors import DataError
from saemill.common.world import Group

LIMIT_SECONDS = 60


class Meeting:
    """What two threads, in place of processes, have in common: torch's store, and one collective."""

    def __init__(self) -> None:
        self.values: list[Any] = [None, None]
        self.words: set[str] = set()
        self.barrier = threading.Barrier(2, timeout=LIMIT_SECONDS)
        self.looked, self.shared = threading.Event(), threading.Event()

    def set(self, key: str, _: str) -> None:
        self.words.add(key)

    def check(self, keys: list[str]) -> bool:
        self.looked.set()
        return self.words >= set(keys)


class Threads(Group):
    """A group of such threads."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        super().__init__([0, 1], rank)
        self.board = meeting

    def all_gather_objects(self, value: Any) -> list[Any]:
        """As the group's own."""
        self.board.values[self.rank] = value
        self.board.shared.set()
        self.board.barrier.wait()
        return list(self.board.values)


@pytest.mark.parametrize("fails", [False, True])
def test_others_wait_outside_of_collectives(fails: bool) -> None:
    """Oracle: while the first process works, the other has looked and is in no collective, whose time limit
    would end it; then both have the result, or the error."""
    meeting = Meeting()

    def work() -> str:
        assert meeting.looked.wait(LIMIT_SECONDS)
        assert not meeting.shared.is_set()
        if fails:
            raise DataError("no text")
        return "done"

    def at(rank: int) -> str:
        try:
            return Threads(rank, meeting).first_at_length(work)
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(at, [0, 1])) == ["no text" if fails else "done"] * 2

"""Independent pieces of a step, shared out among the threads that torch was given.

Each thread works its pieces alone, with torch's own operations in one thread, so that none waits for
another inside an operation, and what a piece gives does not depend on the number of threads.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from typing import TypeVar

import torch

Piece = TypeVar("Piece")


def each(pieces: Sequence[Piece], work: Callable[[Piece, int], None], most: int | None = None) -> None:
    """Call work(piece, thread) for every piece; the thread's number, from 0, for memory of its own.

    Args:
        pieces: independent of each other.
        work: what to do with one.
        most: threads, by default all that torch has.
    """
    n_threads = min(torch.get_num_threads(), len(pieces), most or len(pieces))
    if n_threads < 2:
        for piece in pieces:
            work(piece, 0)
        return

    def share(thread: int) -> None:
        for piece in pieces[thread::n_threads]:
            work(piece, thread)

    pool = _pool(torch.get_num_threads() - 1)
    with _OneThreadEach():
        others = [pool.submit(share, thread) for thread in range(1, n_threads)]
        try:
            share(0)
        finally:
            wait(others)
    for other in others:
        other.result()


class _OneThreadEach:
    """Torch's operations take one thread, here and in threads that are new."""

    def __enter__(self) -> None:
        self.n_threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.n_threads)


@lru_cache(maxsize=1)
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, "step", initializer=torch.set_num_threads, initargs=(1,))


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)

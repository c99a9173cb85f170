"""Independent pieces of a step, shared out among torch's threads.

Each thread works its pieces alone, with torch's own operations in one thread, so that none waits for
another inside an operation, and what a piece gives does not depend on the number of threads.

Around the pieces torch's operations take one thread too: after one that took several, OpenMP's threads look
for more work for a while, on the cores that the pieces want.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
_outer_threads: int | None = None
"""Torch's number of threads before `one_in_torch` set it to one."""


def each(pieces: Sequence[Piece], work: Callable[[Piece, int], None], most: int | None = None) -> None:
    """Call work(piece, thread) for every piece; the thread's number, from 0, for memory of its own.

    Args:
        pieces: independent of each other.
        work: what to do with one.
        most: threads, by default all that torch has.
    """
    n_all = number()
    n_threads = min(n_all, len(pieces), most or len(pieces))
    if n_threads < 2:
        for piece in pieces:
            work(piece, 0)
        return

    def share(thread: int) -> None:
        for piece in pieces[thread::n_threads]:
            work(piece, thread)

    pool = _pool(n_all - 1)
    with one_in_torch():
        others = [pool.submit(share, thread) for thread in range(1, n_threads)]
        try:
            share(0)
        finally:
            wait(others)
    for other in others:
        other.result()


def number() -> int:
    """Return the number of threads that pieces are shared out among."""
    return _outer_threads or torch.get_num_threads()


@contextmanager
def one_in_torch() -> Iterator[None]:
    """Let torch's operations take one thread, here and in threads that are new; pieces take all."""
    global _outer_threads
    outer, n_torch = _outer_threads, torch.get_num_threads()
    _outer_threads = number()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_torch)
        _outer_threads = outer


@lru_cache(maxsize=1)
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, "step", initializer=torch.set_num_threads, initargs=(1,))


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)

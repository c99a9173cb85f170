"""Asking a run to stop: the signals of a user, a scheduler and a time limit become one event."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stop_on_signal(stop: threading.Event | None = None) -> Iterator[threading.Event]:
    """Yield an event that SIGTERM, SIGINT and SIGUSR1 set while the block runs; a second SIGINT interrupts.

    SLURM sends SIGUSR1 before a time limit where `--signal=USR1@60` asks for it.

    Args:
        stop: the event, where something else may set it too; a new one by default.
    """
    stop = threading.Event() if stop is None else stop
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, _frame: object) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

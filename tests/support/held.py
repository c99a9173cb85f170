"""`saemill …` that trains up to a step and waits there, so that a test can send its signal in time.

`HELD_AT=step:file python held.py train …`: before that step it waits until the file is there or a
signal has asked it to stop.
"""

import os
import time
from pathlib import Path

from saemill.cli import main
from saemill.train.trainer import Trainer

step, _, file = os.environ["HELD_AT"].partition(":")
one_step = Trainer._one_step


def held_step(self: Trainer) -> None:
    while self.step == int(step) and not Path(file).exists() and not self.stop.is_set():
        time.sleep(0.01)
    one_step(self)


Trainer._one_step = held_step  # type: ignore[method-assign]

if __name__ == "__main__":
    main()

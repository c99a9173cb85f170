"""`saemill …` on two processes, of which the second stops for ever before step 12.

`HUNG=file python hung.py train …`: the first waits for that file, which the second makes; then it
finds that each group has the time limit that the user set, and cuts that limit to a second.
"""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from saemill.cli import main
from saemill.train.trainer import Trainer

one_step = Trainer._one_step
hung = Path(os.environ["HUNG"])
limit = timedelta(seconds=float(os.environ["SAEMILL_PEER_TIMEOUT_SECONDS"]))


def hang(self: Trainer) -> None:
    if self.step == 12 and self.everyone.rank == 1:
        hung.touch()
        os.kill(os.getpid(), signal.SIGSTOP)
    if self.step == 12:
        while not hung.exists():
            time.sleep(0.01)
        groups: Any = dist.distributed_c10d._world.pg_map
        for group in groups:
            backend = group._get_backend(torch.device("cpu"))
            assert backend.options._timeout == limit
            backend._set_default_timeout(timedelta(seconds=1))
    one_step(self)


Trainer._one_step = hang  # type: ignore[method-assign]

if __name__ == "__main__":
    main()

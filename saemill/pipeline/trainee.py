"""`python -m saemill.pipeline.trainee`: the training process of `together`, which ends with its parent.

On standard input come the settings, as JSON in one line; where it ends, the parent has ended, and so does
this process: with a checkpoint, as after a signal.
"""

import json
import os
import signal
import sys
import threading

from saemill.common import durable, log
from saemill.common.config import build
from saemill.common.errors import Interrupted, SaemillError
from saemill.train.config import TrainConfig
from saemill.train.run import run

FAILED = 2


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Train; errors that a user can repair are printed without a traceback."""
    log.tame_other_packages()
    with open(0, "rb", buffering=0, closefd=False) as parent:
        config = build(TrainConfig, json.loads(parent.readline()), "train")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        if config.out.exists():  # the process that was killed with its parent may be saving
            with durable.exclusive(config.out, wait=True):
                pass
        run(config)
    except Interrupted as stopped:
        print(log.printable(str(stopped)), file=sys.stderr)
        sys.exit(Interrupted.exit_code)
    except SaemillError as error:
        print(log.printable(f"error: {error}"), file=sys.stderr)
        sys.exit(FAILED)


if __name__ == "__main__":
    main()

"""The process that talks to wandb: `python -m saemill.common.tracking check | follow RUN | assess RUN OUT`.

It ends when its standard input does, a bounded time later, so nothing is left where a stage was killed.
"""

import fcntl
import os
import signal
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path

from saemill.common.log import say
from saemill.common.stores.runs import ASSESSMENT, METRICS, WANDB_FOLDER
from saemill.common.tracking.process import END_SECONDS, LOG, OFFLINE

NO_KEY = (
    "wandb knows no API key: run `wandb login` or set WANDB_API_KEY; without a network set "
    "WANDB_MODE=offline; or leave out --log-to-wandb (for assess: --no-log-to-wandb)"
)


class End:
    """How the stage that started this process ended; none while it runs."""

    def __init__(self) -> None:
        self.word: str | None = None
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        word = sys.stdin.readline().strip()
        if not word:  # it was killed, and nobody else would end this process
            timer = threading.Timer(END_SECONDS, lambda: os.killpg(0, signal.SIGKILL))
            timer.daemon = True
            timer.start()
        self.word = word or "lost"


def main() -> None:
    """Do one task; a failure is told once, and is nobody else's."""
    task, *arguments = sys.argv[1:]
    if task == "check":
        _check()
        return
    # Ctrl-C and a scheduler's signals reach every process of a job; the stage tells when to end.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    folders = [Path(argument) for argument in arguments]
    try:
        held = (folders[0] / WANDB_FOLDER / LOG).open()
        with suppress(OSError):  # where the file system knows no locks
            fcntl.flock(held, fcntl.LOCK_EX)  # the process of a stage that was killed may not be through
        if task == "follow":
            from saemill.common.tracking.follow import follow

            follow(folders[0], End())
        else:
            from saemill.common.tracking.assessment import log_assessment

            End()
            log_assessment(folders[0], folders[1])
    except BaseException as error:
        traceback.print_exc()
        what = METRICS if task == "follow" else ASSESSMENT
        why = str(error).partition("\n")[0] or type(error).__name__
        say(f"wandb failed ({why}); nothing else is disturbed, {folders[-1] / what} is complete")
        sys.stdout.flush()
        os._exit(1)  # past wandb's own hooks, which would wait for a server


def _check() -> None:
    import wandb

    if wandb.setup().settings.mode in OFFLINE:
        return
    try:
        known = wandb.login(verify=False)
    except Exception:
        known = False
    if not known:
        print(NO_KEY)
        sys.exit(1)


if __name__ == "__main__":
    main()

"""The command line: each command parses its flags, makes one call, and returns an exit code.

Heavy imports are inside the commands, so that `--help` is quick. Help lists the commands in the order in
which their modules are imported.
"""

import os
import sys
from typing import Any, NoReturn

import typer

from saemill.cli.app import UsageError, app
from saemill.common import log
from saemill.common.errors import Interrupted, SaemillError

# isort: off
from saemill.cli import run, pipeline, embeddings, stores, exchange, hub, studies, cluster  # noqa: F401


def main() -> None:
    """Run the command line; errors that a user can repair are told without a traceback."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        sys.exit(app(standalone_mode=False))
    except UsageError as error:
        _refuse(error)
    except typer.Abort as ended:
        _fail(f"a file ends too early: {ended.__cause__}; fetch it or make it again")
    except Interrupted as stopped:
        if log.speaks:
            print(f"\n{log.printable(str(stopped))}", file=sys.stderr)
        sys.exit(Interrupted.exit_code)
    except SaemillError as error:
        _fail(str(error))
    except OSError as error:
        from saemill.common import durable

        if not (told := durable.explained(error)):
            raise
        _fail(told)
    except Exception:
        if where := _of_rank():
            print(f"failed{where}:", file=sys.stderr)
        raise


def _refuse(error: Any) -> NoReturn:
    """Tell of words that are no command of ours; without any, the help was shown already."""
    if told := error.format_message():
        usage = error.ctx.get_usage() if error.ctx else ""
        print(log.printable(f"{usage}\nerror: {told}".strip()), file=sys.stderr)
    sys.exit(2)


def _fail(problem: str) -> NoReturn:
    print(log.printable(f"error{_of_rank()}: {problem}"), file=sys.stderr)
    sys.exit(2)


def _of_rank() -> str:
    """Which of several processes this is."""
    from saemill.common.world import World

    try:
        world = World.here()
    except SaemillError:
        return ""
    return f" ({world.name})" if world.size > 1 else ""

"""The command line: each command parses its flags, makes one call, and returns an exit code.

Heavy imports are inside the commands, so that `--help` is quick. Help lists the commands in the order in
which their modules are imported.
"""

import os
import sys

from saemill.cli.app import app
from saemill.common.errors import Interrupted, SaemillError

# isort: off
from saemill.cli import run, pipeline, embeddings, stores, exchange, hub, studies, cluster  # noqa: F401


def main() -> None:
    """Run the command line; errors that a user can repair are told without a traceback."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except Interrupted as stopped:
        from saemill.common import log

        if log.speaks:
            print(f"\n{stopped}", file=sys.stderr)
        sys.exit(Interrupted.exit_code)
    except SaemillError as error:
        print(f"error{_of_rank()}: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        from saemill.common import durable

        if not (told := durable.explained(error)):
            raise
        print(f"error{_of_rank()}: {told}", file=sys.stderr)
        sys.exit(2)
    except Exception:
        if where := _of_rank():
            print(f"failed{where}:", file=sys.stderr)
        raise


def _of_rank() -> str:
    """Which of several processes this is."""
    from saemill.common.world import World

    try:
        world = World.here()
    except SaemillError:
        return ""
    return f" ({world.name})" if world.size > 1 else ""

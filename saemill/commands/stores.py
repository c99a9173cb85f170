"""Looking at what is on disk: show, verify."""

from pathlib import Path
from typing import Annotated

import typer


def show(
    path: Annotated[
        Path, typer.Argument(help="A token store, an activation store, a run, an SAE or a diff.")
    ],
) -> None:
    """Tell what is in a folder that saemill made."""
    from saemill.common.log import say
    from saemill.show import describe

    say(describe(path))


def verify(
    path: Annotated[
        Path, typer.Argument(help="A token store, an activation store, a run, an SAE or a diff.")
    ],
) -> None:
    """Check every file against its hash and name each bad one; exit code 1 if there are any."""
    from saemill.common.log import say
    from saemill.show import problems

    damaged = problems(path)
    say("\n".join(damaged) if damaged else f"{path}: every file has its size and hash")
    if damaged:
        raise typer.Exit(1)

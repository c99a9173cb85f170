"""Stores on disk: show, verify, convert-store."""

from pathlib import Path
from typing import Annotated

import typer

from saemill.commands.flags import argument, command
from saemill.convert_store.config import ConvertConfig


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


@command(
    ConvertConfig,
    "convert-store",
    argument("source"),
    argument("out"),
    *("dtype", "compression", "shard_tokens"),
)
def convert_store(config: ConvertConfig) -> None:
    """Write a store's activations again in another form: type, compression, size of shards.

    Another compression or other shards change no activation; another type rounds. Killed at any moment, the
    same command continues; the source stays as it is.

    Example: `saemill convert-store acts archive --compression zstd`

    Example: `saemill convert-store acts half --dtype int8`
    """
    from saemill.convert_store.run import run

    run(config)

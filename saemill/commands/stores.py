"""Stores on disk: show, verify, convert-store."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from saemill.commands.flags import Config, DryRun, Sets, argument, option, with_flags
from saemill.common.addresses import named
from saemill.common.config import resolve
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
    repair: Annotated[
        bool, typer.Option("--repair", help="Compute bad shards of activations again, to the same bytes.")
    ] = False,
    model: Annotated[
        str | None, option("Hub id or folder of the model that was cached [as the store says].", "NAME")
    ] = None,
    device: Annotated[str | None, option("Device that it was cached on [auto].", "NAME")] = None,
    batch_size: Annotated[
        int | None, option("Rows per forward pass of an older store, whose records do not tell.", "ROWS")
    ] = None,
) -> None:
    """Check every file against its hash and name each bad one; exit code 1 if there are any.

    With --repair the bad shards of a store that `saemill cache` made are computed again, and nothing else.

    Example: `saemill verify acts --repair`
    """
    from saemill.common.errors import ConfigError
    from saemill.common.log import say
    from saemill.show import kind_of, problems

    given = {"model": model, "device": device, "batch_size": batch_size}
    if not repair and (idle := [name for name, value in given.items() if value is not None]):
        raise ConfigError(f"{idle[0]} has no effect without --repair; leave it out")
    if repair:
        from saemill.cache.recompute import repair as mend

        if (kind := kind_of(path)) not in ("activation store", None):
            raise ConfigError(
                f"repair: {path} is a {kind}, and activations alone are computed again; without --repair, "
                "what mends it is said"
            )
        if kind:
            mend(path, model, device or "auto", batch_size)
    damaged = problems(path)
    say("\n".join(damaged) if damaged else f"{named(path)}: every file has its size and hash")
    if damaged:
        raise typer.Exit(1)


@with_flags(ConvertConfig, argument("source"), argument("out"), "dtype", "compression", "shard_tokens")
def convert_store(
    *, flags: Mapping[str, Any], config: Config = None, set_: Sets = None, dry_run: DryRun = False
) -> None:
    """Write a store's activations again in another form: type, compression, size of shards.

    Another compression or other shards change no activation; another type rounds. Killed at any moment, the
    same command continues; the source stays as it is.

    Example: `saemill convert-store acts archive --compression zstd`

    Example: `saemill convert-store acts half --dtype int8`
    """
    settings = resolve(ConvertConfig, "convert-store", flags, config, set_ or ())
    if dry_run:
        from saemill.common.outlook import tell
        from saemill.convert_store.plan import make_plan, outlook_of

        tell(outlook_of(make_plan(settings), settings.out))
        return
    from saemill.convert_store.run import run

    run(settings)

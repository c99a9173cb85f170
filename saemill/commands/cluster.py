"""Jobs of a cluster: submit, status."""

from pathlib import Path
from typing import Annotated

import typer


def submit(
    config: Annotated[Path, typer.Argument(help="YAML file with a section per stage, and slurm.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the scripts, submit nothing.")] = False,
) -> None:
    """Run the stages of a config as SLURM jobs, each after the one before it.

    Scripts and logs are in `<run>.jobs`. Submit again after a failure: what is finished stays.

    Example: `saemill submit configs/cluster.yaml`
    """
    from saemill.slurm.submit import run

    run(config, dry_run)


def status(run: Annotated[Path, typer.Argument(help="The run's folder: train.out of the config.")]) -> None:
    """Tell how far each stage of a run is, and what became of its SLURM jobs."""
    from saemill.common.log import say
    from saemill.slurm.status import status as state_of

    say(state_of(run))

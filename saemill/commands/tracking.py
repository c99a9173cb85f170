"""Runs to wandb: track."""

from pathlib import Path
from typing import Annotated

import typer


def track(
    run: Annotated[Path, typer.Argument(help="A run that is trained with --log-to-wandb.")],
    follow: Annotated[bool, typer.Option("--follow", help="Go on until training has finished.")] = False,
    assessment: Annotated[
        Path | None,
        typer.Option("--assessment", help="Send what `saemill assess` wrote there.", metavar="FOLDER"),
    ] = None,
    for_stage: Annotated[
        bool, typer.Option("--for-stage", hidden=True, help="A stage says by stdin when it has ended.")
    ] = False,
) -> None:
    """Send to wandb what it lacks of a run.

    Training with --log-to-wandb starts this by itself, and so does assess. By hand it sends what they could
    not send, and follows a run that is still trained.

    Example: `WANDB_MODE=offline saemill track runs/first`
    """
    from saemill.common.tracking import track as tracking

    if for_stage:
        tracking.track_for_stage(run, assessment)
    else:
        tracking.track(run, follow, assessment)

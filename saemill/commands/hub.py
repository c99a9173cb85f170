"""To and from the Hugging Face hub: push, pull."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from saemill.commands.flags import option


def push(
    path: Annotated[Path, typer.Argument(help="A finished run, a token store or an activation store.")],
    repo: Annotated[str, typer.Argument(metavar="USER/REPO", help="Where to; created if it is not there.")],
    variant: Annotated[
        list[str] | None, typer.Option(help="Of a run, only this SAE; repeat for more.", metavar="NAME")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, option("Branch; created if it is not there [main].", "BRANCH")] = None,
    message: Annotated[str | None, option("Of the commit.", "TEXT")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show files and card; nothing is uploaded.")
    ] = False,
) -> None:
    """Upload a run as a model, or a store as a dataset, with a card that tells of it.

    Absolute paths in settings are uploaded as names. Interrupted, the same command continues.
    Log in before with `hf auth login`.

    Example: `saemill push runs/first user/pythia-160m-saes`
    """
    from saemill.hub.push import push as upload

    _no_bars_in_logs()
    upload(
        path,
        repo,
        variants=variant or (),
        private=private,
        revision=revision,
        message=message,
        dry_run=dry_run,
    )


def pull(
    repo: Annotated[
        str, typer.Argument(metavar="USER/REPO", help="As `saemill push` made it; user/repo@branch.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write, new or empty.")],
) -> None:
    """Download a run or a store and check every file; interrupted, the same command continues.

    Example: `saemill pull user/pythia-160m-acts -o acts`
    """
    from saemill.hub.pull import pull as download

    _no_bars_in_logs()
    download(repo, out)


def _no_bars_in_logs() -> None:
    """huggingface_hub draws its bars wherever stderr goes."""
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()

"""SAEs to and from other tools: export, import."""

from pathlib import Path
from typing import Annotated

import typer

from saemill.commands.flags import option


def export(
    path: Annotated[str, typer.Argument(help="An SAE's folder: RUN/VARIANT, or hf://user/repo/VARIANT.")],
    format_: Annotated[
        str, typer.Option("--format", metavar="NAME", help="sparsify, saelens or dictionary_learning.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write, new or empty.")],
    model: Annotated[str | None, option("The model, if not where it was cached from.", "NAME")] = None,
) -> None:
    """Write an SAE in the format of another tool.

    Example: `saemill export runs/first/layers.8-k32-f6144-s0 --format saelens -o for-saelens`
    """
    from saemill.convert import export as write

    write(path, format_, out, model)


def import_(
    path: Annotated[
        str,
        typer.Argument(
            help="An SAE of sparsify, SAELens or dictionary_learning: a folder, or hf://user/repo/…"
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write, new or empty.")],
    model: Annotated[
        str | None, option("The model it was trained on; its config tells the SAE's site.", "NAME")
    ] = None,
) -> None:
    """Take over an SAE of another tool.

    Example: `saemill import downloaded/blocks.8.hook_resid_post --model EleutherAI/pythia-160m -o sae`,
    `saemill import hf://user/repo/layers.8 -o sae`
    """
    from saemill.convert import import_ as take

    take(path, out, model)

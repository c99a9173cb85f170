"""Looking into models: sites."""

from typing import Annotated

import typer

from saemill.commands.flags import option


def sites(
    model: Annotated[str, typer.Argument(help="Hub id or folder of the model.")],
    globs: Annotated[
        list[str] | None, typer.Option("--sites", metavar="GLOBS", help="Those to list [all].")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="List each by its name, with its width.")] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="Run a few tokens through the weights, and say what is at each site."),
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that the model brings.")
    ] = False,
    revision: Annotated[str | None, option("The hub model's revision.", "REV")] = None,
) -> None:
    """List the sites of a model, where activations can be cached, with their widths.

    Works from the model's config alone; the weights are loaded for `--check`.

    Example: `saemill sites EleutherAI/pythia-160m`, `saemill sites google/gemma-2-2b --sites 'layers.*.mlp'
    --check`
    """
    from saemill.common.log import say
    from saemill.sites import describe

    chosen = tuple(glob for text in globs or () for glob in text.split(","))
    say(
        describe(model, revision, globs=chosen, every=every, check=check, trust_remote_code=trust_remote_code)
    )

"""The command line: its app, its commands in the order of the help, and its exit codes."""

import os
import sys
from typing import Any, NoReturn

import typer

from saemill.commands import (
    cluster,
    embeddings,
    exchange,
    hub,
    latents,
    models,
    pipeline,
    run,
    stores,
    studies,
    tracking,
)
from saemill.commands.words import Command, Group, UsageError
from saemill.common import log
from saemill.common.errors import Interrupted, SaemillError

app = typer.Typer(
    cls=Group,
    name="saemill",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
    help="""Cache a transformer's activations once, train many sparse autoencoders over them.

**tokenize** a text dataset → **cache** activations → **train** a grid of SAEs → **assess** them.

Try it: `saemill demo`. Flags may be written with dashes or underscores; counts as `2M`, `512k`, `1e6`;
lists as `--k 16,32`, `--k 16 32` or `--k 16 --k 32`.""",
)

for function in (
    *(run.run, run.plan, run.matrix),
    *(pipeline.tokenize, pipeline.cache, pipeline.train, pipeline.assess, pipeline.demo),
    *(embeddings.import_activations, embeddings.embed),
    models.sites,
    *(stores.show, stores.verify, stores.convert_store),
    tracking.track,
    *(exchange.export, exchange.import_, exchange.export_tokens),
    *(latents.latent, latents.view, latents.explain, latents.export_latents),
    *(hub.push, hub.pull),
    *(studies.generate, studies.compare, studies.diff),
    *(cluster.submit, cluster.status),
):
    app.command(function.__name__.strip("_").replace("_", "-"), cls=Command)(function)


def main() -> None:
    """Run the command line; errors that a user can repair are printed without a traceback."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    log.tame_other_packages()
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

        if not (explanation := durable.explained(error)):
            raise
        _fail(explanation)
    except Exception:
        if where := _of_rank():
            print(f"failed{where}:", file=sys.stderr)
        raise


def _refuse(error: Any) -> NoReturn:
    """Print why words are no command of ours; without any, the help was shown already."""
    if message := error.format_message():
        usage = error.ctx.get_usage() if error.ctx else ""
        print(log.printable(f"{usage}\nerror: {message}".strip()), file=sys.stderr)
    sys.exit(2)


def _fail(problem: str) -> NoReturn:
    print(log.printable(f"error{_of_rank()}: {problem}"), file=sys.stderr)
    sys.exit(2)


def _of_rank() -> str:
    """Name this process, if there are several."""
    from saemill.common.world import World

    try:
        world = World.here()
    except SaemillError:
        return ""
    return f" ({world.name})" if world.size > 1 else ""

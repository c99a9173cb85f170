"""The command line's app, and what its commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="saemill",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
    help="""Cache a transformer's activations once, train many sparse autoencoders over them.

**tokenize** a text dataset → **cache** activations → **train** a grid of TopK SAEs → **assess** them.

Try it: `saemill demo`. Flags may be written with dashes or underscores; counts as `2M`, `512k`, `1e6`.""",
)

Config = Annotated[Path | None, typer.Option("--config", help="YAML file with a section per command.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting, dots reach inside.")
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, …")]


def option(text: str, metavar: str = "N", *names: str) -> Any:
    """A flag whose value the config parses."""
    return typer.Option(*names, help=text, metavar=metavar)


def resolved(cls: Any, section: str, values: dict[str, Any]) -> Any:
    """A stage's config from a command's arguments."""
    import dataclasses

    from saemill.common.config import resolve

    fields = {field.name for field in dataclasses.fields(cls)}
    flags = {name: value for name, value in values.items() if name.split(".")[0] in fields}
    return resolve(cls, section, flags, values["config"], values["set_"] or ())

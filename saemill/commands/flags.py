"""What flags of several commands share: their types, and how a stage's config is made of them."""

from pathlib import Path
from typing import Annotated, Any

import typer

Config = Annotated[Path | None, typer.Option("--config", help="YAML file with a section per command.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting, dots reach inside.")
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, …")]


def option(text: str, metavar: str = "N", *names: str) -> Any:
    """A flag whose value the config parses; one of a list is annotated `list[str] | None`."""
    return typer.Option(*names, help=text, metavar=metavar)


def collected(values: dict[str, Any]) -> dict[str, Any]:
    """A command's arguments, lists with all that their flags named, as the config parses them."""
    return {name: _joined(value) if isinstance(value, list) else value for name, value in values.items()}


def _joined(values: list[Any]) -> str | None:
    return ",".join(map(str, values)) or None


def resolved(cls: Any, section: str, values: dict[str, Any]) -> Any:
    """A stage's config from a command's arguments."""
    import dataclasses

    from saemill.common.config import resolve

    fields = {field.name for field in dataclasses.fields(cls)}
    given = {name: value for name, value in values.items() if name.split(".")[0] in fields}
    return resolve(cls, section, collected(given), values["config"], values["set_"] or ())

"""Flags from settings: a command names which it has, in its order; what they are the config says.

    @command(TrainConfig, "train", argument("acts"), "site", OUT, "k", …)
    def train(config: TrainConfig) -> None: …

`--config` and `--set`, which reach every setting, come last.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

from saemill.common import setting
from saemill.common.config import resolve
from saemill.common.errors import ConfigError

Config = Annotated[Path | None, typer.Option("--config", help="YAML file with a section per command.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting, dots reach inside.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, tell the plan and write nothing.")]
NoProbe = Annotated[
    bool, typer.Option("--no-probe", help="With --dry-run: do not run a little of it to estimate its time.")
]
METAVARS = {int: "N", float: "X", str: "NAME"}
"""What stands for a value in help, by type; a list of them has `,…` behind it."""


def option(text: str, metavar: str) -> Any:
    """Make a flag of a command that has no config."""
    return typer.Option(help=text, metavar=metavar)


@dataclass(frozen=True, slots=True)
class Flag:
    """A setting as a word of the command line."""

    setting: str
    """Its name; dots reach into groups."""
    names: tuple[str, ...] = ()
    """Names of the flag; by default the setting's, with dashes. A switch with names of its own has no
    off-switch beside those."""
    help: str | None = None
    """In place of the setting's own."""
    by_default: str | None = None
    """In place of the setting's own."""
    is_argument: bool = False


def flag(setting: str, *names: str, help: str | None = None, by_default: str | None = None) -> Flag:
    """Make a flag that is not called as its setting is, or means less than it."""
    return Flag(setting, names, help, by_default)


def argument(setting: str) -> Flag:
    """Make a setting that is given without the name of a flag."""
    return Flag(setting, is_argument=True)


OUT = flag("out", "-o", "--out")


def command(
    cls: Any, section: str, *flags: str | Flag
) -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """Give a command flags; it is called with the config that they make.

    Args:
        cls: the config's dataclass.
        section: of a YAML file.
        flags: the settings that have one, in the order of the help.
    """

    def decorate(function: Callable[[Any], None]) -> Callable[..., None]:
        @with_flags(cls, *flags)
        def called(*, flags: Mapping[str, Any], config: Config = None, set_: Sets = None) -> None:
            function(resolve(cls, section, flags, config, set_ or ()))

        called.__name__, called.__doc__ = function.__name__, function.__doc__
        return called

    return decorate


def stage_command(
    cls: Any, section: str, *flags: str | Flag
) -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """Give a command flags as `command` does, and --dry-run, which plans it and calls it not."""

    def decorate(function: Callable[[Any], None]) -> Callable[..., None]:
        @with_flags(cls, *flags)
        def called(
            *,
            flags: Mapping[str, Any],
            config: Config = None,
            set_: Sets = None,
            dry_run: DryRun = False,
            no_probe: NoProbe = False,
        ) -> None:
            settings = resolve(cls, section, flags, config, set_ or ())
            if is_planned(dry_run, no_probe):
                from saemill.plan.run import plan

                plan({section: settings}, not no_probe)
            else:
                function(settings)

        called.__name__, called.__doc__ = function.__name__, function.__doc__
        return called

    return decorate


def is_planned(dry_run: bool, no_probe: bool) -> bool:
    """Tell whether a command is to be planned only.

    Raises:
        ConfigError: there is no probe to leave out.
    """
    if no_probe and not dry_run:
        raise ConfigError("no-probe has no effect without --dry-run; leave it out")
    return dry_run


def with_flags(configs: Any, *flags: str | Flag) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Put flags into a function's signature, in the place of its parameter `flags`, which gets their values.

    Args:
        configs: a config, or some by name; the settings' names begin with it.
        flags: see `command`. None of their values means not given.
    """
    settings = [item if isinstance(item, Flag) else Flag(item) for item in flags]
    by_parameter = {item.setting.rpartition(".")[2]: item for item in settings}

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def called(**values: Any) -> None:
            given = {item.setting: _joined(values.pop(name)) for name, item in by_parameter.items()}
            function(flags=given, **values)

        called.__name__, called.__doc__ = function.__name__, function.__doc__
        parameters: dict[str, inspect.Parameter] = {}
        for own in inspect.signature(function).parameters.values():
            if own.name == "flags":
                parameters |= {name: _parameter(name, configs, item) for name, item in by_parameter.items()}
            else:
                parameters[own.name] = own
        called.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
        return called

    return decorate


def _joined(value: Any) -> Any:
    """Join the values of a list as the config parses them; paths not, for a comma may be in one."""
    if not isinstance(value, list):
        return value
    if any(isinstance(item, Path) for item in value):
        return tuple(value)
    return ",".join(value) or None


def _parameter(name: str, configs: Any, item: Flag) -> inspect.Parameter:
    """Make the parameter that typer makes a flag or an argument of."""
    config, (*groups, last) = configs, item.setting.split(".")
    for group in groups:
        config = config[group] if isinstance(config, Mapping) else setting.types(config)[group]
    hint, (text, by_default) = setting.type_of(config, last), setting.describe(config, last)
    text = text if item.help is None else item.help
    by_default = by_default if item.by_default is None else item.by_default
    text = f"{text} [{by_default}]." if by_default else f"{text}."
    text = text.replace("*", r"\*")  # a setting's text is no markdown, and help is
    if item.is_argument:
        info = typer.Argument(help=text)
    else:
        metavar = setting.marks_of(config, last).metavar or _metavar(hint)
        info = typer.Option(*item.names, help=text, metavar=metavar)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[_parsed(hint) | None, info]
    )


def _parsed(hint: Any) -> Any:
    """Return the type that typer parses: that of switches and paths; all other text the config parses."""
    if get_origin(hint) is tuple:
        return list[Path] if get_args(hint)[0] is Path else list[str]
    return hint if hint in (bool, Path) else str


def _metavar(hint: Any) -> str | None:
    """Choose what stands for the value in help; None for what typer says itself."""
    if get_origin(hint) is tuple:
        first, last = _metavar(get_args(hint)[0]), get_args(hint)[-1]
        return f"{first},{'…' if last is Ellipsis else first}"
    return None if hint in (bool, Path) else METAVARS.get(hint, "NAME")

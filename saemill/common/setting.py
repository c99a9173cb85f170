"""A setting: a field of a config, with what is known of it beside its type and its default.

    k: tuple[int, ...] = setting((32,), "Active latents per token", metavar="K,…", axis="k", least=1)

It is said once, here. From it come the flag and its help (`commands.flags`), what is refused (`check`), what
decides a result (`identity`), and which lists form a grid (`axes`). Any frozen dataclass may hold settings.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from functools import cache
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from saemill.common.config import LARGEST, SUFFIXES, plain, shown
from saemill.common.errors import ConfigError

T = TypeVar("T")
KEY = "setting"
"""Of a field's metadata."""
DEVICE = "Device: cpu, cuda, cuda:1, …"
"""The help of the setting `device`, which all stages that compute have."""
SHORTENED = 100_000
"""From this whole number on, round thousands are written with a suffix: 500k, 1M."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is known of a setting."""

    help: str
    """What it is, with its unit; a phrase without its full stop."""
    by_default: str | None = None
    """What holds by default, in words, where the default itself does not tell; empty to say nothing."""
    metavar: str = ""
    """What stands for its value in help; by default from its type."""
    decides: bool = True
    """Whether it decides the result, and so belongs to the identity of what is made with it."""
    axis: str | None = None
    """Of a list whose values form a grid: what stands before a value in a variant's name. None for others."""
    least: float | None = None
    """The smallest number, of a list the smallest in it."""
    most: float | None = None
    """The largest number, beside `least`."""
    within: str = ""
    """The interval of its number, as in `[0, 1)`."""
    only: tuple[str, ...] = ()
    """The architectures that it has an effect on; empty for all."""
    later: bool = False
    """Whether it came after identities that are on disk: at its default it stands in none."""

    def problem(self, number: float) -> str:
        """Say what the number must be and is not; empty if it may be so."""
        if self.within:
            low, high = (float(end) for end in self.within[1:-1].split(","))
            excluded = {"(": low}.get(self.within[0]), {")": high}.get(self.within[-1])
            return "" if low <= number <= high and number not in excluded else f"in {self.within}"
        if self.least is None or self.least <= number <= (math.inf if self.most is None else self.most):
            return ""
        most = "2^63 - 1" if self.most == LARGEST else self.most
        return f"{self.least} or more" + (f", and at most {most}" if self.most is not None else "")


PLAIN = Setting("")
"""What is known of a field that says nothing."""


def about(help: str, **marks: Any) -> dict[str, Setting]:
    """Make the metadata of a field without a default: `out: Path = field(metadata=about("Folder to write"))`.

    Args:
        help: what it is, with its unit.
        marks: the other fields of `Setting`.
    """
    return {KEY: Setting(help, **marks)}


def setting(default: T, help: str, **marks: Any) -> T:
    """Make a field with a default, and what is known of it; see `about`."""
    made: T = field(default=default, metadata=about(help, **marks))
    return made


def like(cls: Any, name: str, **changes: Any) -> Any:
    """Make a field for one value of another config's setting, with its default, help and bounds.

    Args:
        cls: the other config.
        name: of its setting. Of one that forms a grid, the default is the first value.
        changes: marks that differ, and `default`; `dataclasses.MISSING` for one that must be given.
    """
    default, marks = default_of(cls, name), marks_of(cls, name)
    if "default" in changes:
        default = changes.pop("default")
    elif marks.axis is not None:
        default = default[0]
    return field(default=default, metadata={KEY: dataclasses.replace(marks, axis=None, **changes)})


def default_of(cls: Any, name: str) -> Any:
    """Find the default of a setting; `dataclasses.MISSING` for one that must be given."""
    return cls.__dataclass_fields__[name].default


def of(cls: Any) -> dict[str, Setting]:
    """List what is known of the settings of a config or its class; of a plain field, that it decides."""
    return {item.name: marks_of(cls, item.name) for item in dataclasses.fields(cls)}


def marks_of(cls: Any, name: str) -> Setting:
    """Find what is known of one setting."""
    marks: Setting = cls.__dataclass_fields__[name].metadata.get(KEY, PLAIN)
    return marks


def axes(cls: Any) -> dict[str, str]:
    """List the settings whose values form a grid, with what stands before each value in a variant's name."""
    return {name: marks.axis for name, marks in of(cls).items() if marks.axis is not None}


def identity(config: Any) -> dict[str, Any]:
    """Collect the settings that decide the result, as plain values; of groups within it too."""
    values = plain(config)
    for name, marks in of(config).items():
        value = getattr(config, name)
        if not marks.decides or (marks.later and value == default_of(config, name)):
            del values[name]
        elif dataclasses.is_dataclass(value):
            values[name] = identity(value)
    return values


def check(config: Any) -> None:
    """Refuse numbers out of their bounds, NaN among them; of a list each. Those left open pass.

    Raises:
        ConfigError: naming the setting.
    """
    for name, marks in of(config).items():
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float) and (problem := marks.problem(number)):
                raise ConfigError(f"{name} must be {problem}, got {shown(number)}")


types = cache(get_type_hints)
"""The types of a config's settings, by name."""


def type_of(cls: Any, name: str) -> Any:
    """Find the type of a setting that is not left open."""
    hint = types(cls)[name]
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    return kinds[0] if get_origin(hint) in (Union, UnionType) and len(kinds) == 1 else hint


def describe(cls: Any, name: str) -> tuple[str, str]:
    """Say what a setting is, its choices included, and what holds by default, as help and docs say it."""
    marks, hint = marks_of(cls, name), type_of(cls, name)
    by_default = written(default_of(cls, name)) if marks.by_default is None else marks.by_default
    is_list = get_origin(hint) is tuple
    kind = get_args(hint)[0] if is_list else hint
    if get_origin(kind) is not Literal:
        return marks.help, by_default
    *others, last = get_args(kind)
    choices = f"one or more of {', '.join((*others, last))}" if is_list else f"{', '.join(others)} or {last}"
    return f"{marks.help}: {choices}", by_default


def written(value: Any) -> str:
    """Write a default as help shows it: 32, 0.8,0.95, 500k, on; empty for one that says nothing."""
    if isinstance(value, bool):
        return "on" if value else ""
    if isinstance(value, tuple):
        return ",".join(map(written, value))
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int) and value >= SHORTENED:
        scale, suffix = max((scale, s) for s, scale in SUFFIXES.items() if scale <= value)
        return str(value) if value % scale else f"{value // scale}{suffix}"
    return str(value) if isinstance(value, str | int) else ""

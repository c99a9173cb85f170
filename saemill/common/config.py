"""Strict configuration: defaults < YAML section < `--set a.b=c` < flags, into frozen dataclasses.

Every stage's settings are one dataclass beside the stage. A YAML file has one section per stage
SECTIONS = (*STAGES, "run", "slurm", "matrix", "generate", "compare")
"""

import dataclasses
import difflib
import os
import types
from collections.abc import Iterable, Mapping
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from saemill.common import durable
from saemill.common.errors import ConfigError

T = TypeVar("T")
STAGES = ("tokenize", "cache", "train", "assess")
SECTIONS = (
    *STAGES,
    "import-activations",
    "embed",
    "run",
    "slurm",
    "matrix",
    "generate",
    "compare",
)
SUFFIXES = {"k": 10**3, "M": 10**6, "B": 10**9}
KINDS = {
    int: "a whole number (4096, 512k, 2M, 1e6)",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
}


def nearest(name: str, known: Iterable[str]) -> str:
    """The phrase that helps after a misspelt name: the near ones, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(known)}"


def resolve(
    cls: type[T],
    section: str,
    flags: Mapping[str, Any],
    file: Path | None = None,
    sets: Iterable[str] = (),
) -> T:
    """Merge file, `--set` and flags into one config.

    Args:
        cls: the stage's dataclass.
        section: the stage's section in the YAML file.
        flags: settings given on the command line, by dotted name; None means not given.
        file: a YAML file with one section per stage.
        sets: `key=value` strings, the value read as YAML; dots reach into nested settings.

    Raises:
        ConfigError: unknown section or key, malformed value.
    """
    merged: dict[str, Any] = read_section(file, section) if file else {}
    override(merged, flags, sets)
    return build(cls, merged, section)


def override(target: dict[str, Any], flags: Mapping[str, Any], sets: Iterable[str]) -> None:
    """Put `--set` and then flags over settings, in place; see `resolve`."""
    for item in sets:
        key, separator, value = item.partition("=")
        if not separator:
            raise ConfigError(f"--set takes key=value, got {item!r}")
        _put(target, key, _parse(value, f"--set {item}"))
    for key, value in flags.items():
        if value is not None:
            _put(target, key, value)


def _put(target: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `a.b.c` in nested mappings."""
    *parents, last = dotted.replace("-", "_").split(".")
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise ConfigError(f"{dotted}: {parent} is not a group of settings")
    target[last] = value


def _parse(text: str, where: str) -> Any:
    """Text as YAML; a mistake in it is told with its place."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from error


def read_sections(file: Path) -> dict[str, dict[str, Any]]:
    """The sections of a YAML file."""
    if not file.is_file():
        raise ConfigError(f"no config file {file}")
    content = _parse(file.read_text(), str(file)) or {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold sections ({', '.join(SECTIONS)}), got {content!r:.80}")
    for name, values in content.items():
        if name not in SECTIONS:
            raise ConfigError(f"{file}: unknown section {name!r}; {nearest(name, SECTIONS)}")
        if not isinstance(values or {}, dict):
            raise ConfigError(f"{file}: section {name!r} must be a group of settings, got {values!r:.80}")
    return {name: values or {} for name, values in content.items()}


def read_section(file: Path, section: str) -> dict[str, Any]:
    """One section of a YAML file."""
    content = read_sections(file)
    if section not in content:
        raise ConfigError(f"{file} has no section {section!r}; it has {', '.join(content) or 'none'}")
    return content[section]


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """A dataclass from a mapping, strictly: unknown and missing keys are errors.

    Args:
        values: field name to value; dashes in names are read as underscores.
        where: the dotted path shown in messages.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    arguments = {}
    for raw, value in values.items():
        name = str(raw).replace("-", "_")
        if name not in fields:
            raise ConfigError(f"unknown setting {where}.{raw}; {nearest(name, fields)}")
        arguments[name] = coerce(value, hints[name], f"{where}.{name}".lstrip("."))
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING
        if required and field.default_factory is dataclasses.MISSING and name not in arguments:
            raise ConfigError(f"{where}.{name} must be given, as an argument or in a --config file")
    return cls(**arguments)


def coerce(value: Any, hint: Any, name: str) -> Any:
    """`value` as the annotated type; text is parsed, nothing is guessed.

    Integers may be written `1e6`, `2_000_000`, `512k`, `2M`, `1B`; a tuple as `16,32,64`.

    Raises:
        ConfigError: the value does not fit.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _coerce_union(value, arguments, name)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{name} must be one of {', '.join(map(str, arguments))}, got {value!r}")
        return value
    if origin is tuple:
        items = [item.strip() for item in value.split(",")] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            items = [items]
        return tuple(coerce(item, arguments[0], f"{name}[{i}]") for i, item in enumerate(items))
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} must be a group of settings, got {value!r}")
        return dict(value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} must be a group of settings, got {value!r}")
        return build(hint, value, name)
    return _coerce_scalar(value, hint, name)


def _coerce_union(value: Any, arguments: tuple[Any, ...], name: str) -> Any:
    if type(None) in arguments and value in (None, "none", "null"):
        return None
    options = [argument for argument in arguments if argument is not type(None)]
    if len(options) == 1:
        return coerce(value, options[0], name)
    for option in options:
        try:
            return coerce(value, option, name)
        except ConfigError:
            continue
    raise ConfigError(f"{name} must be {' or '.join(map(_kind, options))}, got {value!r}")


def _coerce_scalar(value: Any, hint: Any, name: str) -> Any:
    try:
        if hint is bool:
            if isinstance(value, bool):
                return value
            return {"true": True, "false": False}[str(value).lower()]
        if hint is int and not isinstance(value, bool):
            return count(value)
        if hint is float and not isinstance(value, bool):
            return float(value)
        if hint is str and isinstance(value, str | int | float) and not isinstance(value, bool):
            return str(value)
        if hint is Path:
            return Path(value)
    except (ValueError, KeyError, TypeError):
        pass
    raise ConfigError(f"{name} must be {_kind(hint)}, got {value!r}")


def _kind(hint: Any) -> str:
    """What a setting must be, in words."""
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    return KINDS[hint]


def count(value: Any) -> int:
    """A whole number from 2000000, '2_000_000', '2e6' or '2M'; ValueError otherwise."""
    if not isinstance(value, str | int | float):
        raise ValueError(value)
    text = str(value).strip()
    scale = SUFFIXES.get(text[-1:], 1)
    try:
        number = Fraction(Decimal(text[:-1] if scale > 1 else text)) * scale
    except ArithmeticError:
        raise ValueError(value) from None
    if number.denominator != 1:
        raise ValueError(value)
    return number.numerator


def plain(config: Any) -> dict[str, Any]:
    """A config as plain YAML and JSON values."""

    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: convert(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [convert(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    converted = convert(dataclasses.asdict(config))
    assert isinstance(converted, dict)
    return converted


def check_folder(path: Path) -> None:
    """Refuse an output that cannot become a folder, before any work is done for it.

    Raises:
        ConfigError: a file is in the way, or nothing may be written there.
    """
    there = path.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise ConfigError(f"out must be a folder, but {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"out is {path}, but you may not write in {there}; choose another folder")


def write_yaml(path: Path, section: str, values: Mapping[str, Any]) -> None:
    """Write one section so that `--config` reads it back."""
    durable.write_bytes(path, [as_yaml(section, values)])


def as_yaml(section: str, values: Mapping[str, Any]) -> bytes:
    """The content of a YAML file with one section."""
    return yaml.safe_dump({section: dict(values)}, sort_keys=False).encode()


def check_same(found: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on in a place that was made with other settings, naming the keys that differ.

    Raises:
        ConfigError: some key of `wanted` has another value in `found`.
    """
    differing = [key for key in wanted if found.get(key) != wanted[key]]
    if differing:
        lines = "\n".join(f"  {key}: there {found.get(key)!r}, now {wanted[key]!r}" for key in differing)
        raise ConfigError(
            f"{path} was made with other settings:\n{lines}\n"
            "Use the same settings, another output folder, or remove that one."
        )

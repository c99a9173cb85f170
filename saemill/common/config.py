"""Strict configuration: defaults < YAML section < `--set a.b=c` and flags, into frozen dataclasses.

Every stage's settings are one dataclass beside the stage. A YAML file has one section per stage. What is
said twice on the command line is refused.
"""

import dataclasses
import math
import os
import types
from collections.abc import Iterable, Mapping
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from saemill.common import elsewhere, yaml_text
from saemill.common.addresses import check_disk_path
from saemill.common.errors import ConfigError

T = TypeVar("T")
STAGES = ("tokenize", "cache", "train", "assess")
SECTIONS = (
    *STAGES,
    "import-activations",
    "embed",
    "convert-store",
    "run",
    "slurm",
    "matrix",
    "generate",
    "compare",
    "diff",
    "latent",
    "view",
    "explain",
    "export-latents",
)
SUFFIXES = {"k": 10**3, "M": 10**6, "B": 10**9}
LARGEST = 2**63 - 1
"""The largest whole number of a setting, and of a seed: what 64 bits hold beside a sign."""
MOST_DIGITS = 40
"""Of a number in text; one such as 1e999999999 is never written out."""
MOST_SHOWN = 60
"""Names that are listed where none is near."""
LONGEST_NAME_BYTES = 255
"""Of a file, on any file system."""
KINDS = {
    int: "a whole number (4096, 512k, 2M, 1e6)",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
}


def nearest(name: str, known: Iterable[str]) -> str:
    """Phrase what helps after a misspelt name: the near ones, or all of them."""
    known = sorted(known)
    if near := elsewhere.near(name, known):
        return f"did you mean {', '.join(near)}?"
    rest = f", … ({len(known) - MOST_SHOWN:,} more)" if len(known) > MOST_SHOWN else ""
    return f"known: {', '.join(known[:MOST_SHOWN])}{rest}"


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
    names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    override(merged, flags, [_of_section(item, section, names) for item in sets])
    return build(cls, merged, section)


def _of_section(item: str, section: str, names: set[str]) -> str:
    """`train.k=6`, said to `train`, is `k=6`."""
    stage, dot, rest = item.partition("=")[0].partition(".")
    if not dot or stage.replace("-", "_") in names or stage not in SECTIONS:
        return item
    if stage != section:
        raise ConfigError(f"--set {item}: {stage}.{rest} is no setting of `saemill {section}`; leave it out")
    return item.partition(".")[2]


def override(target: dict[str, Any], flags: Mapping[str, Any], sets: Iterable[str]) -> None:
    """Put `--set` and flags over settings, in place; see `resolve`.

    Raises:
        ConfigError: one setting is given twice, by them or within `--set`.
    """
    given: dict[str, str] = {}
    for item in sets:
        key, separator, value = item.partition("=")
        if not separator:
            raise ConfigError(f"--set takes key=value, got {item!r}")
        _note(given, key, f"--set {item}")
        _put(target, key, yaml_text.parse(value, f"--set {item}"))
    for key, value in flags.items():
        if value is not None:
            _note(given, key, f"the flag for {key}, {shown(value)}")
            _put(target, key, value)


def _note(given: dict[str, str], key: str, how: str) -> None:
    """Note down how a setting is given; refuse a second time, or one for a group and one inside it."""
    key = key.replace("-", "_")
    for other, before in given.items():
        if f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}."):
            raise ConfigError(f"{key} is given twice, by {before} and by {how}; leave one out")
    given[key] = how


def _put(target: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `a.b.c` in nested mappings."""
    *parents, last = dotted.replace("-", "_").split(".")
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise ConfigError(f"{dotted}: {parent} is not a group of settings")
    for spelt in [key for key in target if str(key).replace("-", "_") == last]:
        del target[spelt]
    target[last] = value


def read_sections(file: Path) -> dict[str, dict[str, Any]]:
    """Read the sections of a YAML file; the names of their settings with underscores.

    Raises:
        ConfigError: the file cannot be read, or holds other things than sections of settings.
    """
    if not file.is_file():
        raise ConfigError(f"no config file {file}")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    content = yaml_text.parse(text, str(file))
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold sections ({', '.join(SECTIONS)}), got {shown(content)}")
    for name, values in content.items():
        if name not in SECTIONS:
            raise ConfigError(f"{file}: unknown section {name!r}; {_known(name, SECTIONS)}")
        if values is not None and not isinstance(values, dict):
            raise ConfigError(f"{file}: section {name!r} must be a group of settings, got {shown(values)}")
    return {name: _spelt_alike(values or {}, f"{file}: {name}") for name, values in content.items()}


def _spelt_alike(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Spell the names of settings with underscores; refuse two spellings of one."""
    respelt: dict[str, Any] = {}
    for raw, value in values.items():
        name = str(raw).replace("-", "_")
        if name in respelt:
            raise ConfigError(f"{where}.{name} is given twice, with dashes and underscores; leave one out")
        respelt[name] = value
    return respelt


def read_section(file: Path, section: str) -> dict[str, Any]:
    """Read one section of a YAML file."""
    content = read_sections(file)
    if section not in content:
        raise ConfigError(f"{file} has no section {section!r}; it has {', '.join(content) or 'none'}")
    return content[section]


def _known(name: str, known: Iterable[str]) -> str:
    """Phrase what helps after an unknown name: what another tool's word means here, or the near ones."""
    known = list(known)
    return elsewhere.answer(name) or nearest(name, known)


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build a dataclass from a mapping, strictly: unknown and missing keys are errors.

    Args:
        values: field name to value; dashes in names are read as underscores.
        where: the dotted path shown in messages.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    arguments = {}
    for name, value in _spelt_alike(values, where).items():
        if name not in fields:
            raise ConfigError(f"unknown setting {where}.{name}; {_known(name, fields)}")
        arguments[name] = coerce(value, hints[name], f"{where}.{name}".lstrip("."))
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING
        if required and field.default_factory is dataclasses.MISSING and name not in arguments:
            raise ConfigError(f"{where}.{name} must be given, as an argument or in a --config file")
    return cls(**arguments)


def coerce(value: Any, hint: Any, name: str) -> Any:
    """`value` as the annotated type; text is parsed, nothing is guessed.

    Whole numbers may be written `1e6`, `2_000_000`, `512k`, `2M`, `1B`, and are at most 2^63 − 1 in size;
    numbers are finite; a tuple may be written `16,32,64`.

    Raises:
        ConfigError: the value does not fit.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _coerce_union(value, arguments, name)
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            raise ConfigError(f"{name} must be one of {', '.join(map(str, arguments))}, got {shown(value)}")
        return value
    if origin is tuple:
        items = [item.strip() for item in value.split(",")] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            items = [items]
        made = tuple(coerce(item, arguments[0], f"{name}[{i}]") for i, item in enumerate(items))
        if arguments[-1] is not Ellipsis and len(made) != len(arguments):
            raise ConfigError(f"{name} must be {len(arguments)} values, got {shown(value)}")
        return made
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} must be a group of settings, got {shown(value)}")
        return {str(key): item for key, item in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} must be a group of settings, got {shown(value)}")
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
    raise ConfigError(f"{name} must be {' or '.join(map(_kind, options))}, got {shown(value)}")


def _coerce_scalar(value: Any, hint: Any, name: str) -> Any:
    try:
        if hint is bool:
            if isinstance(value, bool):
                return value
            return {"true": True, "false": False}[str(value).lower()]
        if isinstance(value, bool):
            raise ValueError(value)
        if hint is int:
            return _bounded(count(value), name)
        if hint is float and isinstance(value, str | int | float) and math.isfinite(number := float(value)):
            return number
        if hint is str and isinstance(value, str | int | float):
            return _nameable(str(value), name)
        if hint is Path and isinstance(value, str | Path) and str(value) != "":
            path = Path(_nameable(str(value), name))
            for part in path.parts:
                if (n_bytes := len(os.fsencode(part))) > LONGEST_NAME_BYTES:
                    raise ConfigError(
                        f"{name}: a name in a path has at most {LONGEST_NAME_BYTES} bytes, and {shown(part)} "
                        f"has {n_bytes:,}; choose a shorter one"
                    )
            return path
    except ConfigError:
        raise
    except (ValueError, KeyError, OverflowError):
        pass
    raise ConfigError(f"{name} must be {_kind(hint)}, got {shown(value)}")


def _bounded(number: int, name: str) -> int:
    if abs(number) > LARGEST:
        raise ConfigError(f"{name} must be at most 2^63 - 1 = {LARGEST:,}, got {shown(number)}")
    return number


def _nameable(text: str, name: str) -> str:
    """Return the text, if the system could take it as a name; ValueError otherwise.

    Raises:
        ConfigError: it has bytes that no UTF-8 has, which could not be written down.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{name} must be UTF-8, got {shown(text)}; rename it") from None
    if "\0" in text:
        raise ValueError(text)
    return text


def shown(value: Any) -> str:
    """Write a value as messages show it, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text):,} characters)"


def _kind(hint: Any) -> str:
    """Say what a setting must be."""
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    return KINDS[hint]


def count(value: Any) -> int:
    """Parse a whole number from 2000000, '2_000_000', '2e6' or '2M'; ValueError otherwise."""
    if not isinstance(value, str | int | float):
        raise ValueError(value)
    text = str(value).strip()
    if len(text) > MOST_DIGITS:
        raise ValueError(value)
    scale = SUFFIXES.get(text[-1:], 1)
    try:
        decimal = Decimal(text[:-1] if scale > 1 else text)
        if decimal.is_finite() and abs(decimal.adjusted()) > MOST_DIGITS:
            raise ValueError(value)
        number = Fraction(decimal) * scale
    except ArithmeticError:
        raise ValueError(value) from None
    if number.denominator != 1:
        raise ValueError(value)
    return number.numerator


def plain(config: Any) -> dict[str, Any]:
    """Turn a config into plain YAML and JSON values."""

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
    check_disk_path(path)
    there = path.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise ConfigError(f"out must be a folder, but {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"out is {path}, but you may not write in {there}; choose another folder")


def as_yaml(section: str, values: Mapping[str, Any]) -> bytes:
    """Write the content of a YAML file with one section, which `--config` reads back."""
    return yaml.safe_dump({section: dict(values)}, sort_keys=False).encode()


def check_same(existing: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on in a place that was made with other settings, naming the keys that differ.

    Raises:
        ConfigError: some key of `wanted` has another value in `existing`.
    """
    differing = [key for key in wanted if existing.get(key) != wanted[key]]
    if differing:
        lines = "\n".join(f"  {key}: there {existing.get(key)!r}, now {wanted[key]!r}" for key in differing)
        raise ConfigError(
            f"{path} was made with other settings:\n{lines}\n"
            "Use the same settings, another output folder, or remove that one."
        )

"""What every format's reader asks of the files before it takes them for a TopK SAE."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saemill.common.errors import ConfigError, StoreError


def read_config(file: Path) -> dict[str, Any]:
    """An SAE's config. NaN and infinity, which other tools write, become text: they are no JSON.

    Raises:
        StoreError: the file is missing or holds no JSON object.
    """
    try:
        config = json.loads(file.read_text(), parse_constant=str)
    except FileNotFoundError:
        raise StoreError(f"{file.parent} holds no SAE: {file.name} is missing") from None
    except ValueError as error:
        raise StoreError(f"{file} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise StoreError(f"{file} must hold a JSON object, got {config!r:.80}")
    return config


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        StoreError: it is damaged.
    """
    try:
        return load_file(file)
    except SafetensorError as error:
        raise StoreError(f"{file} is damaged: {error}") from error


def expect(config: Mapping[str, Any], field: str, wanted: Any, default: Any, why: str, file: Path) -> None:
    """Refuse an SAE of another kind.

    Args:
        field: of the config, `default` where it is absent.
        wanted: the only value that can be represented.
        why: what another value means.

    Raises:
        ConfigError: the field has another value.
    """
    got = config.get(field, default)
    if got != wanted:
        raise ConfigError(f"{file}: {field} must be {wanted!r}, got {got!r}: {why}")


def count(config: Mapping[str, Any], field: str, file: Path) -> int:
    """A whole number of 1 or more.

    Raises:
        StoreError: the field is missing or something else.
    """
    got = config.get(field)
    if not isinstance(got, int) or isinstance(got, bool) or got < 1:
        raise StoreError(f"{file}: {field} must be a whole number of 1 or more, got {got!r}")
    return got


def check_weights(
    file: Path,
    weights: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    optional: Sequence[str] = (),
) -> None:
    """Refuse weights that the config does not tell of.

    Args:
        shapes: what must be there, by name.
        optional: names of what may be there beside it.

    Raises:
        StoreError: a tensor is missing or has another shape.
        ConfigError: there is one more, so that the SAE computes something else.
    """
    for name, shape in shapes.items():
        got = tuple(weights[name].shape) if name in weights else "nothing"
        if got != shape:
            raise StoreError(f"{file}: {name} must be {shape} by the config beside it, got {got}")
        if not weights[name].is_floating_point():
            raise StoreError(f"{file}: {name} must hold floating-point numbers, got {weights[name].dtype}")
    if more := sorted(set(weights) - set(shapes) - set(optional)):
        raise ConfigError(
            f"{file}: {', '.join(more)} must be absent from a TopK SAE; it cannot be represented"
        )


def provenance(name: str, config: Mapping[str, Any], own: Any, **known: Any) -> dict[str, Any]:
    """Where an SAE came from.

    Args:
        name: of the format.
        config: as it was read; kept whole.
        own: what saemill wrote there, if saemill made the file; it is all that is kept then.
        known: site, model and so on; None is left out.
    """
    if isinstance(own, dict):
        return own
    told = {key: value for key, value in known.items() if value is not None}
    return told | {"imported": {"format": name, "config": dict(config)}}

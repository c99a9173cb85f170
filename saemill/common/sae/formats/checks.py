"""Checks that every format's reader makes before it accepts files as an SAE."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, JsonValue, TypeAdapter, ValidationError
from torch import Tensor

from saemill.common.errors import ConfigError, DiskError, StoreError
from saemill.common.records import Count, Positive, first_finding
from saemill.common.sae.parts import Joined, SaeConfig

MOST_SIZE = 1 << 31
"""Limit on d_in, num_latents and k."""


class Provenance(BaseModel):
    """Types of the fields of an SAE's provenance that saemill itself reads; there may be more fields."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    site: str | None = None
    target_site: str | None = None
    model: str | None = None
    revision: str | None = None
    dataset: str | None = None
    ctx_len: Positive | None = None
    prepend_bos: bool | None = None
    hook_name: str | None = None
    k: Positive | None = None
    acts_fingerprint: str | None = None
    tokens_trained: Count | None = None
    diverged_at_step: Count | None = None
    variant: dict[str, JsonValue] | None = None
    versions: dict[str, str] | None = None


def read_config(file: Path) -> dict[str, Any]:
    """Read an SAE's config. NaN and infinity, which other tools write, become text: they are no JSON.

    Raises:
        StoreError: the file is missing, cannot be read, or holds no JSON object.
    """
    try:
        text = file.read_text(encoding="utf-8")
        config = json.loads(text, parse_constant=str, parse_float=_float)
        json.dumps(config)  # what is nested too deeply for it could not be written again
    except FileNotFoundError:
        raise StoreError(f"{file.parent} holds no SAE: {file.name} is missing") from None
    except RecursionError:
        raise StoreError(f"{file} is damaged: it is nested too deeply") from None
    except ValueError as error:
        raise StoreError(f"{file} is damaged: {error}") from error
    except OSError as error:
        raise DiskError(f"{file} cannot be read: {error.strerror}") from error
    if not isinstance(config, dict):
        raise StoreError(f"{file} must hold a JSON object, got {config!r:.80}")
    return config


def _float(text: str) -> float | str:
    """Read a number of JSON; one beyond what a float holds stays text."""
    return number if math.isfinite(number := float(text)) else text


def expect(config: Mapping[str, Any], field: str, wanted: Any, default: Any, why: str, file: Path) -> None:
    """Refuse an SAE of another kind.

    Args:
        config: of the SAE.
        field: of the config, `default` where it is absent.
        wanted: the only value that can be represented.
        default: what its absence means.
        why: what another value means.
        file: the config's.

    Raises:
        ConfigError: the field has another value.
    """
    got = config.get(field, default)
    if type(got) is not type(wanted) or got != wanted:
        raise ConfigError(f"{file}: {field} must be {wanted!r}, got {got!r:.80}: {why}")


def count(config: Mapping[str, Any], field: str, file: Path) -> int:
    """Return a field that must be a whole number of 1 or more.

    Raises:
        StoreError: the field is missing or something else.
    """
    got = config.get(field)
    if not isinstance(got, int) or isinstance(got, bool) or not 1 <= got < MOST_SIZE:
        raise StoreError(f"{file}: {field} must be a whole number of 1 or more, got {got!r:.80}")
    return got


def counts(config: Mapping[str, Any], field: str, file: Path) -> tuple[int, ...]:
    """Return a field that must be a list of whole numbers of 1 or more, empty where it is absent.

    Raises:
        StoreError: the field is something else.
    """
    got = config.get(field)
    if got is not None and not isinstance(got, list):
        raise StoreError(f"{file}: {field} must be a list of whole numbers, got {got!r:.80}")
    return tuple(count({field: each}, field, file) for each in got or ())


def traits(config: Mapping[str, Any], architecture: str, file: Path) -> dict[str, Any]:
    """Return what saemill notes of an SAE beside what its tool does, as arguments of `SaeConfig`.

    Args:
        config: the settings that it is noted among.
        architecture: what the SAE is where nothing is noted.
        file: the config's.
    """
    return {
        "architecture": text(config, "architecture", file) or architecture,
        "prefixes": counts(config, "prefixes", file),
        "ks": counts(config, "ks", file),
    }


class _Joined(BaseModel):
    """Types of a site that is joined with others."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    site: str
    width: Positive
    scale: float


def joined(config: Mapping[str, Any], field: str, file: Path) -> tuple[Joined, ...]:
    """Return the sites whose vectors a field says to follow each other, none where it is absent.

    Raises:
        StoreError: the field is something else.
    """
    try:
        found = TypeAdapter(list[_Joined]).validate_python(config.get(field) or [])
    except ValidationError as error:
        raise StoreError(f"{file}: {field} tells of sites what it cannot: {first_finding(error)}") from error
    return tuple(Joined(each.site, each.width, each.scale) for each in found)


def noted(config: SaeConfig, architecture: str) -> dict[str, Any]:
    """Return what `traits` reads, of an SAE that is by its tool's own fields an `architecture`."""
    notes = {"prefixes": list(config.prefixes), "ks": list(config.ks)}
    own = {} if config.architecture == architecture else {"architecture": config.architecture}
    return own | {name: values for name, values in notes.items() if values}


def one_of(config: Mapping[str, Any], field: str, known: Collection[str], default: str, file: Path) -> str:
    """Return a field that must be one of some names.

    Raises:
        ConfigError: it is another one: the SAE cannot be represented.
    """
    got = config.get(field, default)
    if not isinstance(got, str) or got not in known:
        raise ConfigError(f"{file}: {field} must be one of {', '.join(known)}, got {got!r:.80}")
    return got


def text(config: Mapping[str, Any], field: str, file: Path) -> str | None:
    """Return a field that must be text, or None where it is absent.

    Raises:
        StoreError: the field is something else.
    """
    got = config.get(field)
    if got is not None and not isinstance(got, str):
        raise StoreError(f"{file}: {field} must be text, got {got!r:.80}")
    return got


def flag(config: Mapping[str, Any], field: str, default: bool, file: Path) -> bool:
    """Return a field that must be true or false.

    Raises:
        StoreError: the field is something else.
    """
    got = config.get(field, default)
    if not isinstance(got, bool):
        raise StoreError(f"{file}: {field} must be true or false, got {got!r:.80}")
    return got


def group(config: Mapping[str, Any], field: str, file: Path) -> dict[str, Any]:
    """Return a field that must be a group of settings, empty where it is absent.

    Raises:
        StoreError: the field is something else.
    """
    got = config.get(field)
    if got is not None and not isinstance(got, dict):
        raise StoreError(f"{file}: {field} must be a group of settings, got {got!r:.80}")
    return got or {}


def check_weights(
    file: Path,
    weights: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    optional: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Refuse weights that do not agree with the config.

    Args:
        file: the file that they are from.
        weights: by name.
        shapes: what must be there, by name.
        optional: names of what may be there beside it, and is not converted.

    Returns: the weights of `shapes`, of one dtype: the widest of the file, float32 for 8 bits and less.

    Raises:
        StoreError: a tensor is missing, has another shape, or holds anything but floating-point numbers.
        ConfigError: there is one more, so that the SAE computes something else.
    """
    for name, shape in shapes.items():
        check_shape(file, weights, name, shape)
    if more := sorted(set(weights) - set(shapes) - set(optional)):
        raise ConfigError(
            f"{file}: {', '.join(more)} must be absent from an SAE of this kind; it cannot be represented"
        )
    return _of_one_dtype({name: weights[name] for name in shapes}, file)


def check_shape(file: Path, weights: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor that must be there, of a shape and of floating-point numbers.

    Raises:
        StoreError: it is missing or something else.
    """
    got = tuple(weights[name].shape) if name in weights else "nothing"
    if got != shape:
        raise StoreError(f"{file}: {name} must be {shape} by the config beside it, got {got}")
    plain = weights[name].layout == torch.strided and weights[name].device.type == "cpu"
    if not plain or not weights[name].is_floating_point():
        raise StoreError(f"{file}: {name} must hold floating-point numbers, got {weights[name].dtype}")
    return weights[name]


def _of_one_dtype(weights: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Convert weights to the widest of their types. torch computes with none of 8 bits."""
    wide = [torch.float32 if w.element_size() == 1 else w.dtype for w in weights.values()]
    dtype = wide[0]
    for other in wide[1:]:
        dtype = torch.promote_types(dtype, other)
    try:
        return {name: w.to(dtype) for name, w in weights.items()}
    except (RuntimeError, NotImplementedError) as error:
        types = ", ".join(sorted({str(w.dtype) for w in weights.values()}))
        raise StoreError(
            f"{file}: weights of {types} cannot be read as {dtype}; save them as float32"
        ) from error


def provenance(name: str, config: Mapping[str, Any], own: Any, file: Path, **known: Any) -> dict[str, Any]:
    """Collect where an SAE came from.

    Args:
        name: of the format.
        config: as it was read; stored whole.
        own: what saemill wrote there, if saemill made the file; nothing else is stored then.
        file: the config's.
        known: site, model and so on; None is left out.

    Raises:
        StoreError: what saemill reads of it is of another type.
    """
    origin = own if isinstance(own, dict) else {key: v for key, v in known.items() if v is not None}
    try:
        Provenance.model_validate(origin)
    except ValidationError as error:
        raise StoreError(
            f"{file} tells of the SAE's origin what it cannot: {first_finding(error)}"
        ) from error
    return dict(origin) if origin is own else origin | {"imported": {"format": name, "config": dict(config)}}

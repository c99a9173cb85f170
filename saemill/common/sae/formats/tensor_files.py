"""Files of tensors, of any tool: safetensors, numpy's npz, and pickles, of which nothing but tensors and
plain values is unpickled."""

import errno
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from saemill.common import durable
from saemill.common.errors import ConfigError, DiskError, StoreError

FACTORS = "scaling_factor"
PICKLES = (".pt", ".pth")
"""Ends of names of pickles."""


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, on the CPU.

    Raises:
        StoreError: it is missing or damaged.
        DiskError: it cannot be read.
    """
    try:
        return load_file(file)
    except OSError as error:
        raise _unread(error, file) from error
    except Exception as error:  # the library has several kinds of its own
        raise StoreError(f"{file} is damaged: {first_line(error)}") from error


def names_in(file: Path) -> frozenset[str]:
    """List the names of a safetensors file's tensors; none where it is no such file."""
    try:
        with safe_open(file, "pt") as opened:
            return frozenset(opened.keys())
    except Exception:  # of any kind: the reader of the tensors will report it
        return frozenset()


def read_npz(file: Path) -> dict[str, Tensor]:
    """Read the arrays of numpy's archive, float32 where they are wider.

    Raises:
        StoreError: it is missing or damaged, or holds what is no array of numbers.
        DiskError: it cannot be read.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {name: _float(torch.from_numpy(arrays[name])) for name in arrays.files}
    except OSError as error:
        raise _unread(error, file) from error
    except (ValueError, TypeError, EOFError, AttributeError, KeyError, zipfile.BadZipFile) as error:
        raise StoreError(f"{file} is damaged: {first_line(error)}") from error


def _float(array: Tensor) -> Tensor:
    return array.float() if array.dtype == torch.float64 else array


def read_pickle(file: Path, *, is_mapped: bool = False) -> dict[str, Any]:
    """Read a pickled dict of tensors and plain values, on the CPU.

    Args:
        file: the pickle.
        is_mapped: leave tensors on disk, where only names are asked for.

    Raises:
        StoreError: it is missing or damaged, or is no such dict.
        DiskError: it cannot be read.
    """
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=is_mapped)
    except OSError as error:
        raise _unread(error, file) from error
    except Exception as error:  # a pickle that is cut off or changed may raise anything
        raise StoreError(f"{file} holds no dict of tensors: {first_line(error)}") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise StoreError(f"{file} must hold a dict of tensors, got {type(found).__name__}")
    return found


def names_in_pickle(place: Path) -> frozenset[str]:
    """List the names of what a pickle holds; none where a path is no pickle's by its name.

    Raises:
        StoreError, DiskError: as `read_pickle`.
    """
    if not is_pickle(place):
        return frozenset()
    return frozenset(read_pickle(place, is_mapped=zipfile.is_zipfile(place)))  # older ones cannot be mapped


def is_pickle(place: Path) -> bool:
    """Tell whether a path is a pickle's by its name."""
    return place.suffix in PICKLES and place.is_file()


def sizes(file: Path, found: Mapping[str, Any], name: str, axes: str) -> tuple[int, int]:
    """Return the sizes of a matrix, which tell D and F where no config does.

    Args:
        file: what messages begin with.
        found: tensors by name.
        name: of the matrix.
        axes: what it must be, `[D, F]`.

    Raises:
        StoreError: it is missing or no matrix.
    """
    matrix = found.get(name)
    shape = tuple(matrix.shape) if isinstance(matrix, Tensor) else ()
    if len(shape) != 2 or 0 in shape:
        raise StoreError(f"{file}: {name} must be a matrix {axes}, got {shape or 'nothing'}")
    return shape[0], shape[1]


def tensors_of(file: Path, found: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a pickle's values, if all are tensors.

    Raises:
        StoreError: one is something else.
    """
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise StoreError(f"{file}: {name} must be a tensor, got {type(value).__name__}")
    return dict(found)


def without_ones(file: Path, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the factors on latents that an SAE with none has in some files.

    Raises:
        ConfigError: one of them is not 1.
    """
    factors = found.get(FACTORS)
    if factors is not None and not bool((factors == 1).all()):
        raise ConfigError(
            f"{file}: {FACTORS} must be 1, got {factors.flatten()[:4].tolist()}, …: it multiplies latents "
            "after they are chosen, which SAELens refuses as well"
        )
    return {name: tensor for name, tensor in found.items() if name != FACTORS}


def first_line(error: Exception) -> str:
    """Return the first line of a library's message, or its kind where it has none."""
    return str(error).partition("\n")[0][:200] or type(error).__name__


def _unread(error: OSError, file: Path) -> Exception:
    """Explain why a file was not read."""
    if isinstance(error, FileNotFoundError):
        return StoreError(f"{file.parent} holds no SAE: {file.name} is missing")
    if error.errno == errno.EINVAL:  # a place beyond the end
        return StoreError(f"{file} is damaged: it is cut off")
    return DiskError(durable.explained(error, file) or f"{file} cannot be read: {error.strerror}")

"""Embeddings in array files: .npy, .npz, raw rows, .pt and safetensors."""

import warnings
import zipfile
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from saemill.common.errors import ConfigError, DataError
from saemill.embeddings.rows import Rows, reading
from saemill.embeddings.tables import fingerprint_files

BATCH_BYTES = 1 << 24
KINDS = {".npy": "npy", ".npz": "npz", ".pt": "pt", ".pth": "pt", ".safetensors": "safetensors"}
RAW_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
}


class Matrix(Protocol):
    """A matrix in a file, [n_rows, width]."""

    n_rows: int
    width: int
    dtype: torch.dtype

    @abstractmethod
    def read(self, start: int, stop: int) -> Tensor:
        """Read rows start..stop."""


class ArraySource:
    """Matrices of several files, one below the other.

    Args:
        name: what the user called them.
        files: in their order.
        matrices: one per file.
        site: what the vectors are called.

    Raises:
        DataError: they differ in width or type.
    """

    has_ids = has_texts = False

    def __init__(self, name: str, files: list[Path], matrices: Sequence[Matrix], site: str) -> None:
        self.name, self.files, self.matrices, self.site = name, files, matrices, site
        first = matrices[0]
        for file, matrix in zip(files, matrices, strict=True):
            if (matrix.width, matrix.dtype) != (first.width, first.dtype):
                raise DataError(
                    f"{file} holds rows of {matrix.width:,} {matrix.dtype}, {files[0]} of "
                    f"{first.width:,} {first.dtype}"
                )

    def fingerprint(self) -> str:
        """Hash the files."""
        return fingerprint_files(self.files)

    def batches(self, start: int) -> Iterator[Rows]:
        """Read the matrices' rows from number `start` on."""
        n_before = 0
        for file, matrix in zip(self.files, self.matrices, strict=True):
            at_once = max(1, BATCH_BYTES // (matrix.width * matrix.dtype.itemsize))
            for first in range(max(0, start - n_before), matrix.n_rows, at_once):
                with reading(file):
                    x_TD = matrix.read(first, min(first + at_once, matrix.n_rows))
                yield Rows(n_before + first, x_TD)
            n_before += matrix.n_rows


def open_arrays(
    name: str, files: list[Path], kind: str, key: str | None, width: int | None, raw_dtype: str | None
) -> ArraySource:
    """Open array files of one kind.

    Args:
        name: what the user called them.
        files: in their order.
        kind: npy, npz, pt, safetensors or raw.
        key: which array of each file, where a file may hold several.
        width: of raw rows.
        raw_dtype: of raw rows.

    Raises:
        ConfigError: options that the kind does not have or lacks, or several arrays and no key.
        DataError: a file that cannot be read, or holds no matrix of floats.
    """
    if kind == "raw":
        if key is not None:
            raise ConfigError("--column has no effect on raw rows; leave it out")
        assert width is not None
        assert raw_dtype is not None
        opened: Callable[[Path, str | None], Matrix] = partial(_raw, width, RAW_DTYPES[raw_dtype])
    elif kind == "npy" and key is not None:
        raise ConfigError(f"--column has no effect on {name}, which holds one array; leave it out")
    else:
        opened = {"npy": _npy, "npz": _npz, "pt": _pt, "safetensors": _safetensors}[kind]
    matrices = []
    for file in files:
        with reading(file), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # files of old versions are read or refused, and no matter which
            matrices.append(opened(file, key))
    return ArraySource(name, files, matrices, key or "embedding")


class _Stream:
    """Rows of one type in a binary file that can be sought in, from some byte on."""

    def __init__(self, file: IO[bytes], offset: int, n_rows: int, width: int, dtype: torch.dtype) -> None:
        self.file, self.offset, self.n_rows, self.width, self.dtype = file, offset, n_rows, width, dtype

    def read(self, start: int, stop: int) -> Tensor:
        """Read rows start..stop into memory of their own: the file is not mapped."""
        row_bytes = self.width * self.dtype.itemsize
        self.file.seek(self.offset + start * row_bytes)
        content = self.file.read((stop - start) * row_bytes)
        if len(content) != (stop - start) * row_bytes:
            raise DataError(f"{self.file.name} ends within row {start + len(content) // row_bytes:,}")
        return torch.frombuffer(bytearray(content), dtype=self.dtype).view(-1, self.width)


class _Tensor:
    """A tensor in memory, or mapped."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.dtype = tensor, tensor.dtype
        self.n_rows, self.width = tensor.shape

    def read(self, start: int, stop: int) -> Tensor:
        """Copy rows start..stop."""
        return self.tensor[start:stop].clone()


class _Slice:
    """A tensor of a safetensors file."""

    def __init__(self, tensor_slice: Any, dtype: torch.dtype) -> None:
        self.tensor_slice, self.dtype = tensor_slice, dtype
        self.n_rows, self.width = tensor_slice.get_shape()

    def read(self, start: int, stop: int) -> Tensor:
        """Read rows start..stop."""
        rows: Tensor = self.tensor_slice[start:stop]
        return rows


def _raw(width: int, dtype: torch.dtype, file: Path, _key: str | None) -> Matrix:
    n_bytes, row_bytes = file.stat().st_size, width * dtype.itemsize
    if n_bytes % row_bytes or not n_bytes:
        raise DataError(
            f"{file} has {n_bytes:,} bytes, which are no whole number of rows of {width:,} x "
            f"{dtype.itemsize} bytes; is --width or --raw-dtype another?"
        )
    return _Stream(file.open("rb"), 0, n_bytes // row_bytes, width, dtype)


def _npy(file: Path, _key: str | None) -> Matrix:
    return _array_in(file.open("rb"), file.stat().st_size, file)


def _npz(file: Path, key: str | None) -> Matrix:
    archive = zipfile.ZipFile(file)
    names = {name.removesuffix(".npy"): name for name in archive.namelist() if name.endswith(".npy")}
    member = archive.getinfo(names[_choose(file, list(names), key)])
    return _array_in(archive.open(member), member.file_size, file)


def _array_in(stream: IO[bytes], n_bytes: int, file: Path) -> Matrix:
    """Open the array of numpy's format in a stream of `n_bytes`, whose rows are then read one after the
    other."""
    major, _ = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, column_major, dtype = read_header(stream)
    kinds = {np.dtype(t): getattr(torch, t) for t in ("float16", "float32", "float64")}
    _check_matrix(file, shape, dtype, dtype in kinds)
    if column_major and shape[1] > 1:
        raise DataError(f"{file} is stored column by column; save np.ascontiguousarray(array)")
    if stream.tell() + shape[0] * shape[1] * dtype.itemsize > n_bytes:
        raise DataError(f"{file} is cut off: it has {n_bytes:,} bytes, fewer than {shape} of {dtype} take")
    return _Stream(stream, stream.tell(), shape[0], shape[1], kinds[dtype])


def _pt(file: Path, key: str | None) -> Matrix:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # of many kinds; some advise to run whatever the file says
        raise DataError(
            f"cannot read {file} ({type(error).__name__}): it must be what torch.save wrote, a tensor or a "
            "dict of tensors, and no other objects"
        ) from error
    if isinstance(content, dict):
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        content = tensors[_choose(file, list(tensors), key)]
    elif key is not None:
        raise ConfigError(f"--column has no effect on {file}, which holds no dict; leave it out")
    if not isinstance(content, Tensor):
        raise DataError(f"{file} must hold a tensor, or a dict of tensors, got {type(content).__name__}")
    is_plain = content.layout is torch.strided and content.device.type == "cpu"
    _check_matrix(file, content.shape, content.dtype, is_plain and content.dtype in RAW_DTYPES.values())
    return _Tensor(content.detach())


def _safetensors(file: Path, key: str | None) -> Matrix:
    opened: Any = safe_open(str(file), "pt")
    tensor_slice = opened.get_slice(_choose(file, list(opened.keys()), key))
    names = {"F16": "fp16", "BF16": "bf16", "F32": "fp32", "F64": "fp64"}
    _check_matrix(file, tensor_slice.get_shape(), tensor_slice.get_dtype(), tensor_slice.get_dtype() in names)
    return _Slice(tensor_slice, RAW_DTYPES[names[tensor_slice.get_dtype()]])


def _choose(file: Path, names: list[str], key: str | None) -> str:
    """Choose the array of a file."""
    if key in names:
        return str(key)
    if key is None and len(names) == 1:
        return names[0]
    listed = (", ".join(names[:20]) + (", …" if len(names) > 20 else "")) or "none"
    if key is None:
        raise ConfigError(f"{file} must hold one array, or the one that --column names; it holds {listed}")
    raise ConfigError(f"{file} has no array {key!r}; it holds {listed}")


def _check_matrix(file: Path, shape: Sequence[int], dtype: object, is_float: bool) -> None:
    if len(shape) != 2 or not is_float or min(shape) < 1:
        raise DataError(
            f"{file} must hold a matrix of floats, a row per embedding; got {tuple(shape)} of {dtype}"
        )

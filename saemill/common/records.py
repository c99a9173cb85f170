"""Records: the JSON files that saemill writes and reads back, each of one type and with a hash of itself.

A record's file holds its fields and, last, `checksum`: xxh3 of all the others. One that was changed by
anything but saemill, or that is of another version, is an error with the way to repair it.
"""

import base64
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from saemill.common import durable
from saemill.common.errors import DiskError, StoreError

CHECKSUM = "checksum"


class Record(BaseModel):
    """Base of every record: its fields are of the stated types exactly, none is missing and none is more."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


R = TypeVar("R", bound=Record)
T = TypeVar("T")


def encode_array(values: NDArray[Any]) -> str:
    """Encode a little-endian array as base64 text for JSON."""
    return base64.b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode()


def decode_array(text: str, dtype: str) -> NDArray[Any]:
    """Decode the array that `encode_array` wrote.

    Raises:
        ValueError: the text is none.
    """
    return np.frombuffer(base64.b64decode(text, validate=True), np.dtype(dtype).newbyteorder("<"))


def _below(name: str) -> str:
    """Refuse a name that leads out of the folder that it is looked for in."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\0" in name or "\\" in name:
        raise ValueError(f"must be a path below its folder, got {name!r}")
    return name


def single(name: str) -> str:
    """Refuse a name that is not that of one file or folder.

    Raises:
        ValueError: it is empty, hidden or a path.
    """
    if len(PurePosixPath(_below(name)).parts) != 1 or name.startswith("."):
        raise ValueError(f"must be a plain name, got {name!r}")
    return name


Count = Annotated[int, Field(ge=0, lt=1 << 62)]
"""Number of things, or of bytes."""
Positive = Annotated[int, Field(ge=1, lt=1 << 62)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
"""xxh3 (64 bits) in hexadecimal."""
Below = Annotated[str, AfterValidator(_below)]
"""Path of a file, relative to the folder that lists it; it cannot lead out of that."""
Name = Annotated[str, AfterValidator(single)]
"""Name of one file or folder."""


class File(Record):
    """A file that a record answers for."""

    path: Below
    bytes: Count
    xxh3: Hash

    @classmethod
    def of(cls, folder: Path, path: str) -> "File":
        """Describe a file as it is now, named by its path below a folder."""
        file = folder / path
        return cls(path=path, bytes=file.stat().st_size, xxh3=durable.hash_file(file))

    def problem(self, folder: Path, hashes: bool = True) -> str | None:
        """Describe what is wrong with the file below a folder by its size and, with `hashes`, its content;
        None if nothing is."""
        return durable.problem(folder / self.path, self.bytes, self.xxh3 if hashes else None)


def listed(folder: Path) -> tuple[File, ...]:
    """Flush every file below a folder to disk. Return the list of them."""
    files = []
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        durable.sync_file(file)
        name, n_bytes = file.relative_to(folder).as_posix(), file.stat().st_size
        files.append(File(path=name, bytes=n_bytes, xxh3=durable.hash_file(file)))
    return tuple(files)


def problems(folder: Path, files: Iterable[File], hashes: bool = True) -> list[str]:
    """List each file that is missing, of another size or, with `hashes`, of other content."""
    checked = ((folder / entry.path, entry.problem(folder, hashes)) for entry in files)
    return [f"{file}: {problem}" for file, problem in checked if problem]


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Add the checksum to values, as a record's file holds them."""
    return dict(values) | {CHECKSUM: durable.hash_json(dict(values))}


def content(record: Record) -> dict[str, Any]:
    """Return the fields of a record as JSON has them, with the checksum."""
    return sealed(record.model_dump(mode="json"))


def write(path: Path, record: Record) -> None:
    """Write a record, whole or not at all."""
    durable.write_json(path, content(record))


def read(path: Path, kind: type[R], repair: str) -> R:
    """Read a record.

    Args:
        path: its file.
        kind: what it must be.
        repair: the sentence on what to do, put at the end of messages.

    Raises:
        MissingError: there is no such file.
        StoreError: it is damaged, or of another version.
    """
    return parse(durable.read_json(path, repair), kind, str(path), repair)


def if_whole(read: Callable[[], T]) -> T | None:
    """Return what a reader returns; None where what it reads is missing or damaged.

    Raises:
        DiskError: it cannot be read now, so that it may be whole.
    """
    try:
        return read()
    except DiskError:
        raise
    except StoreError:
        return None


def parse(values: Any, kind: type[R], where: str, repair: str) -> R:
    """Parse a record from the content of its file, or from a value within another file.

    Args:
        values: as JSON has them, with the checksum.
        kind: what they must be.
        where: what messages begin with.
        repair: the sentence on what to do.

    Raises:
        StoreError: damaged, or of another version.
    """
    if not isinstance(values, dict):
        raise StoreError(f"{where} is damaged: it holds no fields. {repair}")
    if "format" in kind.model_fields and values.get("format") != (
        wanted := kind.model_fields["format"].default
    ):
        got = values.get("format")
        raise StoreError(
            f"{where}: format {got!r:.80}, but this version of saemill reads {wanted!r}. {repair}"
        )
    fields = {key: value for key, value in values.items() if key != CHECKSUM}
    if values.get(CHECKSUM) != durable.hash_json(fields):
        raise StoreError(f"{where} is damaged: its content differs from its checksum. {repair}")
    try:
        return kind.model_validate_json(json.dumps(fields))
    except ValidationError as error:
        raise StoreError(f"{where} is damaged: {first_finding(error)}. {repair}") from error


def first_finding(error: ValidationError) -> str:
    """Describe the first of pydantic's findings in a few words."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    if "got" not in message.split():  # as our own messages say already
        message += f", got {first['input']!r:.80}"
    return f"{place}: {message}" if place else message

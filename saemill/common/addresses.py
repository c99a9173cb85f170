"""Addresses of object stores (S3, Google Cloud, Azure) in the place of a folder's path."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from saemill.common.errors import ConfigError, SaemillError

SCHEMES = ("s3", "gs", "az")


def address_of(path: Path | str) -> str | None:
    """Return the address that a path is, `s3://bucket/folder`, also where pathlib has left it one slash; None
    for a path of a disk."""
    scheme, colon, rest = str(path).partition(":")
    if colon and scheme in SCHEMES and rest.startswith("/"):
        return f"{scheme}://{rest.strip('/')}"
    return None


def named(path: Path) -> str:
    """Write a path, or the address that it is, as the user does."""
    return address_of(path) or str(path)


@contextmanager
def naming(path: Path, name: str) -> Iterator[None]:
    """Write a name in place of a path, such as that of a mirror, in errors while the block runs."""
    try:
        yield
    except SaemillError as error:
        told = str(error).replace(str(path), name)
        if told == str(error):
            raise
        raise type(error)(told) from error


def is_there(path: Path) -> bool:
    """Tell whether a path exists, as far as can be told without asking: that of an address may."""
    return address_of(path) is not None or path.exists()


def check_disk_path(path: Path) -> None:
    """Refuse an address where something is to be written.

    Raises:
        ConfigError: it is one.
    """
    if address := address_of(path):
        raise ConfigError(
            f"out is {address}, and only stores are written there (`tokenize`, `cache`, `embed`, "
            "`import-activations`, `convert-store`); write to a folder, and copy that there: "
            f"aws s3 cp --recursive FOLDER {address}, rclone, or what your provider has"
        )

"""Sizes on the disk as people write them: 200GB, 1.5TB, 512MiB."""

import math
import re
from fractions import Fraction

from saemill.common.errors import ConfigError

UNITS = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3}
BINARY = {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
SIZE = re.compile(r"(?P<number>\d{1,15}(\.\d{1,15})?) ?(?P<unit>[KMGT]i?B)?")


def size_of(text: str, name: str) -> int:
    """Read a size in bytes.

    Args:
        text: as 200GB; without a unit it counts bytes.
        name: of the setting, for the message.

    Raises:
        ConfigError: it is none.
    """
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{name} must be a size, as 200GB or 1.5TB, got {text!r:.60}")
    return int(Fraction(match["number"]) * (UNITS | BINARY).get(match["unit"] or "", 1))


def written(n_bytes: int) -> str:
    """Write a size so that it is read as no less: with two decimals, rounded up."""
    for unit, scale in UNITS.items():
        if n_bytes >= scale:
            return f"{math.ceil(100 * Fraction(n_bytes, scale)) / 100:g}{unit}"
    return str(n_bytes)

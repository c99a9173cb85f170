"""Batches of a source's rows: vectors with their ids and texts, the checks of vectors, what they become."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from saemill.common.errors import DataError, SaemillError
from saemill.common.stores.forms.form import FLOATS, StoredType
from saemill.common.stores.rounding import largest, not_finite, rounded


@contextmanager
def reading(file: Path | str) -> Iterator[None]:
    """Turn a library's error on a file that it cannot read, while the block runs, into a sentence.

    Libraries have errors of any kind for damaged files, so the block shall hold little but their calls.

    Raises:
        DataError: in place of any other error.
    """
    try:
        yield
    except SaemillError:
        raise
    except Exception as error:
        why = str(error).partition("\n")[0][:200] or type(error).__name__
        raise DataError(f"cannot read {file}: {why}") from error


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a source, in its order."""

    start: int
    """Number of the first row in the whole source."""
    x_TD: Tensor
    """Vectors [T, D] in the source's own type, on the CPU."""
    ids: list[str] | None = None
    texts: list[str] | None = None
    sources: list[str] | None = None


class Source(Protocol):
    """Embeddings in files or in a dataset."""

    name: str
    site: str
    """Name of the vectors in the store."""
    has_ids: bool
    has_texts: bool

    def fingerprint(self) -> str:
        """Identify the content."""

    def batches(self, start: int) -> Iterator[Rows]:
        """Read the rows from number `start` on, in order, a few MiB at a time."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a vector becomes before it is stored: whether it is normalized, and its type."""

    stored: StoredType
    normalize: bool

    @property
    def dtype(self) -> torch.dtype:
        """Type that vectors are converted to; those that int8 is made of stay as exact as fp32."""
        return FLOATS.get(self.stored, torch.float32)

    def of(self, rows: Rows) -> Tensor:
        """Convert vectors. [T, D] in `dtype`.

        Raises:
            DataError: a value is NaN, infinite or beyond the type, or a vector to be normalized is
                zero; the first such row is named.
        """
        x_TD = rows.x_TD
        _refuse(rows, not_finite(x_TD), "has NaN or infinite values; repair it or leave it out")
        if self.normalize:
            x_TD = x_TD.double()
            length_T1 = torch.linalg.vector_norm(x_TD, dim=1, keepdim=True)
            _refuse(rows, length_T1 == 0, "is zero and has no direction; leave it out, or --normalize")
            x_TD = x_TD / length_T1
        stored_TD = rounded(x_TD, self.dtype)
        kind = str(self.dtype).removeprefix("torch.")
        beyond = f"has values beyond {kind}, which ends at {largest(self.dtype):.4g}; use --dtype fp32"
        _refuse(rows, not_finite(stored_TD), beyond)
        return stored_TD


def _refuse(rows: Rows, bad_TD: Tensor | None, why: str) -> None:
    """Refuse rows with a bad value."""
    if bad_TD is not None and bool(bad_TD.any()):
        bad_T = bad_TD.any(1)
        n_bad, n_read = int(bad_T.sum()), len(bad_T)
        others = f" ({n_bad:,} such passages among {n_read:,} read at once)" if n_bad > 1 else ""
        raise DataError(f"row {rows.start + int(bad_T.nonzero()[0, 0]):,} {why}{others}")

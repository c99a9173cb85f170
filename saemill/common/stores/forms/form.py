"""The forms that there are: floats, or 8-bit codes.

Axis C is the columns of the stored array: D of them, or more where a row carries a scale of its own.
"""

from typing import Literal, Protocol

import torch
from torch import Tensor

from saemill.common.stores.forms.floats import Floats
from saemill.common.stores.forms.int8 import Calibration, Int8

StoredType = Literal["bf16", "fp16", "fp32", "int8"]
"""Names of the types that activations are stored in, as settings have them."""
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Form(Protocol):
    """What turns the activations of one site into stored rows and back, each row by itself."""

    width: int
    """Number D of values per row."""
    columns: int
    """Number C of columns of the stored array."""
    stored: torch.dtype
    """Type of the stored array."""
    dtype: torch.dtype
    """Type of the rows that are read."""
    attributes: dict[str, str]
    """What `zarr.json` says of it beside the type."""

    def encode(self, x_TD: Tensor, into_TC: Tensor) -> None:
        """Write rows where they are stored: the one lossy act of a store. What the form cannot hold is not
        finite when it is decoded.

        Args:
            x_TD: of any float type and on any device.
            into_TC: of the stored type, on the CPU.
        """

    def decode(self, stored_TC: Tensor) -> Tensor:
        """Read stored rows. [T, D] of `dtype`, on their device; floats are not copied."""


def form_of(dtype: str, width: int, calibration: Calibration | None = None) -> Form:
    """Make the form of a site.

    Args:
        dtype: a `StoredType`.
        width: D.
        calibration: of the site, for int8. Without it rows can neither be encoded nor decoded.
    """
    return Int8(width, calibration) if dtype == "int8" else Floats(width, FLOATS[dtype])


def empty(form: Form, n_rows: int) -> Tensor:
    """Make room for stored rows, on the CPU. [n_rows, C]."""
    return torch.empty(n_rows, form.columns, dtype=form.stored)


def rounded(form: Form, x_TD: Tensor) -> Tensor:
    """Round rows as a store does: to what is read of them. [T, D] of the form's `dtype`, on the CPU."""
    stored_TC = empty(form, len(x_TD))
    form.encode(x_TD, stored_TC)
    return form.decode(stored_TC)

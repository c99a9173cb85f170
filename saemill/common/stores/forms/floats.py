"""Activations as floats: bf16, fp16 or fp32. What is stored is what is read."""

import torch
from torch import Tensor

from saemill.common.stores.rounding import round_into


class Floats:
    """A form whose stored rows are the values, each rounded to the type."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self.width = self.columns = width
        self.stored = self.dtype = dtype
        self.attributes: dict[str, str] = {}

    def encode(self, x_TD: Tensor, into_TC: Tensor) -> None:
        """Round rows into their place; see `Form`."""
        round_into(into_TC, x_TD)

    def decode(self, stored_TC: Tensor) -> Tensor:
        """Return the rows as they are."""
        return stored_TC

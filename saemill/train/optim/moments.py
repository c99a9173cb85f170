"""Adam's moments between steps, in float32, bfloat16 or 8 bits per weight.

A moment moves by a small share of itself per step, which may be less than the spacing of short
formats: rounded to the nearest it would never move. So what is written is rounded
up or down at random without bias, by a table of noise read from a place that depends on the
step and the row: the same run gives the same result, killed and resumed or not.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from saemill.common.stores.permutation import combine
from saemill.train.memory import zeros

NOISE_ENTRIES = 1 << 20
BLOCK = 256
"""Columns of a row with a scale of their own, in 8 bits."""


class LogCodes(NamedTuple):
    """Evenly spaced logarithms below a block's largest magnitude."""

    n: int
    """The largest code, of that magnitude."""
    octaves: int
    """Octaves from it down to code 0."""
    least: int
    """The code of all that is smaller."""


FIRST, SECOND = LogCodes(127, 24, 0), LogCodes(255, 48, 1)


@lru_cache(1)
def _table(n_entries: int) -> Tensor:
    return torch.rand(n_entries, generator=torch.Generator().manual_seed(0))


def _noise(like: Tensor, step: int, first_row: int) -> Tensor:
    """Return numbers uniform in [0, 1), of `like`'s shape, from another place in the table for each step and
    block."""
    table = _table(max(NOISE_ENTRIES, 2 * like.numel()))
    start = combine(step, first_row) % (len(table) - like.numel() + 1)
    return table[start : start + like.numel()].view_as(like).to(like.device)


class Float32Moment:
    """A moment in float32. [F, D] or [F]."""

    def __init__(self, leaf: Tensor) -> None:
        self.value = zeros(*leaf.shape, device=leaf.device)

    def read(self, rows: slice) -> Tensor:
        """Return the rows themselves: a change of them changes the moment."""
        return self.value[rows]

    def write(self, rows: slice, value: Tensor, step: int) -> None:
        """Do nothing: `read` returned the memory itself."""

    def tensors(self) -> list[Tensor]:
        """List what a checkpoint needs."""
        return [self.value]


class Bfloat16Moment:
    """Two bytes per weight: 8 bits of precision, randomly rounded. [F, D]."""

    def __init__(self, leaf: Tensor) -> None:
        self.value = zeros(*leaf.shape, dtype=torch.bfloat16, device=leaf.device)

    def read(self, rows: slice) -> Tensor:
        """Copy the rows to float32."""
        return self.value[rows].float()

    def write(self, rows: slice, value: Tensor, step: int) -> None:
        """Round the rows and keep them."""
        noise = _noise(value, step, rows.start).mul(1 << 16).to(torch.int32)
        bits = value.view(torch.int32).add(noise).bitwise_and_(-(1 << 16))
        self.value[rows] = bits.view(torch.float32).to(torch.bfloat16)

    def tensors(self) -> list[Tensor]:
        """List what a checkpoint needs."""
        return [self.value]


def _blocks(rows: Tensor) -> list[Tensor]:
    """Cut the columns into those that share scales."""
    return [rows[:, first : first + BLOCK] for first in range(0, rows.shape[1], BLOCK)]


class EightBitMoment:
    """One byte per weight: a sign and a logarithm, against the largest magnitude of its block. [F, D].

    A block is up to 256 columns of a row (as in Dettmers et al. 2022, with other codes). Codes are spaced
    evenly in the logarithm. The first moment has 127 over 24 octaves, a factor of 1.14 apart; what is
    smaller counts as 0. The second, of squares, has 255 over 48, likewise 1.14; what is smaller counts as
    the smallest, since an update divides by its root. What matters is the relative error: evenly spaced
    magnitudes would drown the small ones.
    """

    def __init__(self, leaf: Tensor, signed: bool) -> None:
        n_rows, d = leaf.shape
        self.codes = FIRST if signed else SECOND
        dtype = torch.int8 if signed else torch.uint8
        self.code = zeros(n_rows, d, dtype=dtype, device=leaf.device)
        self.log2_scale = torch.zeros(n_rows, -(-d // BLOCK), device=leaf.device)

    def read(self, rows: slice) -> Tensor:
        """Compute the rows in float32."""
        code = self.code[rows].float()
        log2 = (code.abs() - self.codes.n) * (self.codes.octaves / self.codes.n)
        for i, block in enumerate(_blocks(log2)):
            block.add_(self.log2_scale[rows, i, None])
        return torch.exp2(log2).mul_(code.sign())

    def write(self, rows: slice, value: Tensor, step: int) -> None:
        """Round the rows and keep them."""
        n, octaves, least = self.codes
        code = value.abs().log2_()
        for i, block in enumerate(_blocks(code)):
            scale = block.amax(1).clamp_(min=-126)
            self.log2_scale[rows, i] = scale
            block.sub_(scale[:, None])
        code.mul_(n / octaves).add_(n)
        code.add_(_noise(value, step, rows.start)).floor_().clamp_(least, n)
        self.code[rows] = code.mul_(value.sign()).to(self.code.dtype)

    def tensors(self) -> list[Tensor]:
        """List what a checkpoint needs."""
        return [self.code, self.log2_scale]


Moment = Float32Moment | Bfloat16Moment | EightBitMoment


def moment(leaf: Tensor, moment_format: str, signed: bool) -> Moment:
    """Make the storage of a moment of `leaf`: fp32, bf16 or 8bit; those of biases are always float32."""
    if moment_format == "fp32" or leaf.dim() == 1:
        return Float32Moment(leaf)
    return Bfloat16Moment(leaf) if moment_format == "bf16" else EightBitMoment(leaf, signed)

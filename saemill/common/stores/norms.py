"""Norms of stored rows: one number per row, rounded to bfloat16, and counts of rows by it.

The numbers of bfloat16 from 0 on are 128 to the octave, the same 32,640 for every store. So one is a row's
norm, to within 0.4% (2^-8), and at once the bin in which it is counted. Counts add up, whatever the order of
shards and processes, and a quantile of them is the exact one of the rounded norms: to within 0.4% as well.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

N_BINS = 0x7F80
"""Number of finite bfloat16 numbers from 0 on; the bits of each are its bin."""
LARGEST_NORM = torch.finfo(torch.bfloat16).max
SMALLEST_NORM = torch.finfo(torch.bfloat16).smallest_normal
"""Smallest norm that is told to within 0.4%."""


def norms_of(x_TD: Tensor) -> NDArray[np.uint16]:
    """Compute the Euclidean norm of each row, mean not removed, as the bits of its bfloat16. Larger ones than
    bfloat16 has count as its largest. uint16 [T]."""
    from saemill.common.loops.moments import squared_norms  # numba is loaded where it is used

    return norms_from_squares(squared_norms(x_TD))


def norms_from_squares(square_T: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Round norms, whose squares are given, as `norms_of` does. uint16 [T]."""
    # Squares in float64: none is too large or too small for it, and the order of sums does not show.
    norm_T = torch.from_numpy(square_T).sqrt().clamp_(max=LARGEST_NORM)
    return norm_T.to(torch.bfloat16).view(torch.uint16).numpy()


def norms_from(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Read norms from their bits. float32, of the same shape."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


class NormSketch:
    """Counts of rows by norm.

    Args:
        counts: of rows, by the bits of their norm.
    """

    def __init__(self, counts: Mapping[int, int] | None = None) -> None:
        self.counts_B = np.zeros(N_BINS, np.int64)
        for bits, count in (counts or {}).items():
            self.counts_B[bits] = count

    def add(self, bits_T: NDArray[np.uint16]) -> None:
        """Count some rows by the bits of their norms."""
        self.counts_B += np.bincount(bits_T, minlength=N_BINS)

    def merge(self, other: "NormSketch") -> None:
        """Add the rows that were counted elsewhere."""
        self.counts_B += other.counts_B

    @property
    def counts(self) -> dict[int, int]:
        """Counts of rows by the bits of their norm, those of none left out."""
        bins = np.flatnonzero(self.counts_B)
        return dict(zip(bins.tolist(), self.counts_B[bins].tolist(), strict=True))

    @property
    def n_rows(self) -> int:
        """Number of rows counted."""
        return int(self.counts_B.sum())

    @property
    def median(self) -> float:
        """Median norm: the smallest than which at least half of the rows are no longer; 0 where there are
        none."""
        below_B = np.cumsum(self.counts_B)
        return float(NORMS_B[np.searchsorted(2 * below_B, below_B[-1])])

    def n_beyond(self, limit: float) -> int:
        """Count the rows that are longer than `limit`."""
        return int(self.counts_B[limit < NORMS_B].sum())


NORMS_B = norms_from(np.arange(N_BINS, dtype=np.uint16))
"""Norm of each bin."""

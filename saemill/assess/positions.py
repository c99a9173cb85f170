"""Groups of positions in a row, by powers of two: 0, 1, 2–3, 4–7, …"""

import numpy as np
from numpy.typing import NDArray


class Positions:
    """The groups of a row's positions.

    Args:
        ctx_len: tokens per row.
    """

    def __init__(self, ctx_len: int) -> None:
        self.ctx_len = ctx_len
        starts = [0, *(1 << i for i in range((ctx_len - 1).bit_length()))]
        stops = [*starts[1:], ctx_len]
        self.starts = np.array(starts)
        self.labels = [
            f"{start}" if stop == start + 1 else f"{start}–{stop - 1}"
            for start, stop in zip(starts, stops, strict=True)
        ]

    def of(self, addresses: NDArray[np.int64]) -> NDArray[np.int64]:
        """Look up the group of each address."""
        return np.searchsorted(self.starts, addresses % self.ctx_len, side="right") - 1

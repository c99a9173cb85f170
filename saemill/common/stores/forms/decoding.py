"""Codes → values on a CPU: one pass, compiled by numba when it is first needed.

Torch's operations do the same on other devices, one after the other. No product and sum may be contracted
here, so that the bits are theirs.
"""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray


def decode(
    stored_TC: NDArray[np.int8],
    mean_D: NDArray[np.float32],
    scale_D: NDArray[np.float32],
    out_TD: NDArray[np.float32],
) -> None:
    """Write code · step · scale + mean of each value to out_TD."""
    width = len(mean_D)
    step_T = np.ascontiguousarray(stored_TC[:, width:]).view(np.float32)[:, 0]
    _decode(stored_TC, step_T, mean_D, scale_D, out_TD)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _decode(stored_TC: Any, step_T: Any, mean_D: Any, scale_D: Any, out_TD: Any) -> None:
    for row in range(len(out_TD)):
        step = step_T[row]
        for d in range(len(mean_D)):
            out_TD[row, d] = np.float32(stored_TC[row, d]) * step * scale_D[d] + mean_D[d]

"""Into how many panels of columns the update of the rows is split.

`rows.update_kernel` gathers each row of x and of e for K latents. Between two of these gathers pass, per
column, the same column of the other tokens' rows and about 1/K of the latents' parameters. Where all
that fits the L2 cache, the row is found there; where it does not, the gathers go to memory. With panels,
one panel of all latents is done before the next, so that only a panel's columns need to fit.

The rule is a model and was not measured on a GPU. That the L2 delivers 1.8 times what the memory does
is an assumption, on the low side of what is published for an H100.
"""

import math
import sys

import torch

from saemill.train.optim import moments

BLOCK = moments.BLOCK
"""Columns in registers at a time, 256. One warp: 8 columns per thread, 16 bytes of bfloat16 in one load."""
PARAMETER_BYTES = 52
"""Read and written per latent and column: both weights, their float32 moments, their bfloat16 copies."""
NORMALISING_BYTES = 8
"""More with panels, per latent and column: the decoder row is read and written once more."""
L2_GAIN = 1.8
"""Bandwidth of the L2 over the memory's: about 5.5 TB/s over 3."""
L2_SHARE = 0.5
"""The L2 of A100 and H100 has two halves, and may hold a line twice: once for the processors at either."""


def panel_columns(n_tokens: int, k: int, n_latents: int, d: int, itemsize: int, cache_bytes: int) -> int:
    """Columns of a panel: a multiple of BLOCK, and no less than d where whole rows are better.

    Args:
        n_tokens: T of the batch.
        k: active latents per token.
        n_latents: F.
        d: width.
        itemsize: bytes of a number of x and e.
        cache_bytes: size of the device's L2.
    """
    blocks = math.ceil(d / BLOCK)
    gathered_bytes = 2 * itemsize * n_tokens * k / n_latents
    if gathered_bytes * (1 - 1 / L2_GAIN) < NORMALISING_BYTES:
        return blocks * BLOCK
    between_uses_bytes = 2 * itemsize * n_tokens + PARAMETER_BYTES * n_latents / k
    fitting = max(1, int(L2_SHARE * cache_bytes / (between_uses_bytes * BLOCK)))
    n_panels = math.ceil(blocks / fitting)
    return math.ceil(blocks / n_panels) * BLOCK


def l2_bytes(device: torch.device) -> int:
    """Of a CUDA device; without bound for Triton's interpreter, which has no cache to fit."""
    if device.type != "cuda":
        return sys.maxsize
    size: int = torch.cuda.get_device_properties(device).L2_cache_size
    return size

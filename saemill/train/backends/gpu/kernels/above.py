"""The pre-activations above the floors of their latents, in one read of each row.

A program goes through its token's row from the first latent on. A prefix sum over each block tells the next
slots of what it found there, so codes come in ascending order of their latents.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from saemill.train.backends.gpu.kernels.arguments import INPUT_DTYPES, NUMERICS, expect


@triton.jit
def above_kernel(
    pre_ptr,
    floor_ptr,
    val_ptr,
    idx_ptr,
    n_ptr,
    F,
    n_slots,
    BLOCK: tl.constexpr,
):
    """Find the codes of one token per program, and count also those for which there is no slot."""
    token = tl.program_id(0).to(tl.int64)
    n = 0
    for first in range(0, F, BLOCK):
        latent = first + tl.arange(0, BLOCK)
        inside = latent < F
        pre = tl.load(pre_ptr + token * F + latent, mask=inside, other=0.0).to(tl.float32)
        floor = tl.load(floor_ptr + latent, mask=inside, other=float("inf"))
        found = (pre > floor).to(tl.int32)
        slot = n + tl.cumsum(found, 0) - 1
        kept = (found > 0) & (slot < n_slots)
        tl.store(val_ptr + token * n_slots + slot, pre, mask=kept)
        tl.store(idx_ptr + token * n_slots + slot, latent, mask=kept)
        n += tl.sum(found, 0)
    tl.store(n_ptr + token, n)


def launch(n_latents: int) -> tuple[dict[str, int], dict[str, Any]]:
    """Return the kernel's constants and its launch options."""
    block = min(1024, triton.next_power_of_2(n_latents))
    return {"BLOCK": block}, {"num_warps": 4 if block == 1024 else 1, **NUMERICS}


def above(pre_TF: Tensor, floor_F: Tensor, val_TK: Tensor, idx_TK: Tensor, n_T: Tensor) -> None:
    """Fill in the pre-activations above the floors, as many as there is room for, and count them all.

    They come in ascending order of their latents. Slots not in use are left as they are. NaN is above
    nothing.

    Args:
        pre_TF: float32, bfloat16 or float16.
        floor_F: float32.
        val_TK, idx_TK, n_T: float32, int32 and int64, filled.

    Raises:
        TypeError: another dtype.
        ValueError: shapes that do not agree, or a tensor with gaps.
    """
    n_tokens, n_latents = pre_TF.shape
    expect("pre_TF", pre_TF, INPUT_DTYPES, (n_tokens, n_latents))
    expect("floor_F", floor_F, (torch.float32,), (n_latents,))
    slots = (n_tokens, val_TK.shape[1])
    expect("val_TK", val_TK, (torch.float32,), slots)
    expect("idx_TK", idx_TK, (torch.int32,), slots)
    expect("n_T", n_T, (torch.int64,), (n_tokens,))
    constants, options = launch(n_latents)
    if n_tokens:
        with torch.cuda.device_of(pre_TF):
            above_kernel[(n_tokens,)](
                pre_TF, floor_F, val_TK, idx_TK, n_T, n_latents, slots[1], **constants, **options
            )

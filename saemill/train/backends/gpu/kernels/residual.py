"""Decoding and everything that follows from its error, with each decoder row gathered once.

One program per token walks over the width in panels of [K, panel] weights: their weighted sum is the
reconstruction, and their product with the error, once that is known, the gradient of each code.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from saemill.train.backends.gpu.kernels.arguments import INPUT_DTYPES, NUMERICS, expect

MAX_K = 512


@triton.jit
def residual_kernel(
    val_ptr,
    idx_ptr,
    w_ptr,
    b_ptr,
    x_ptr,
    e_ptr,
    dot_ptr,
    sse_ptr,
    D: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    PANEL: tl.constexpr,
):
    """Decode one token per program. `dot` takes the rounded error, as every later sum does."""
    token = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, K_PADDED)
    active = slots < K
    latent = tl.load(idx_ptr + token * K + slots, mask=active, other=0).to(tl.int64)
    val = tl.load(val_ptr + token * K + slots, mask=active, other=0.0)
    dot = tl.zeros((K_PADDED,), tl.float32)
    squares = tl.zeros((PANEL,), tl.float32)
    for first in range(0, D, PANEL):
        column = first + tl.arange(0, PANEL)
        inside = column < D
        w_ptrs = w_ptr + latent[:, None] * D + column[None, :]
        w = tl.load(w_ptrs, mask=active[:, None] & inside[None, :], other=0.0).to(tl.float32)
        b = tl.load(b_ptr + column, mask=inside, other=0.0)
        x = tl.load(x_ptr + token * D + column, mask=inside, other=0.0).to(tl.float32)
        e = tl.sum(val[:, None] * w, 0) + b - x
        squares += e * e
        stored = e.to(e_ptr.dtype.element_ty)
        tl.store(e_ptr + token * D + column, stored, mask=inside)
        dot += tl.sum(w * stored.to(tl.float32)[None, :], 1)
    tl.store(sse_ptr + token, tl.sum(squares, 0))
    tl.store(dot_ptr + token * K + slots, dot, mask=active)


def launch(d: int, k: int) -> tuple[dict[str, int], dict[str, Any]]:
    """Return the kernel's constants and its launch options: at most 8,192 weights at a time."""
    k_padded = triton.next_power_of_2(k)
    panel = min(128, 8192 // k_padded, triton.next_power_of_2(d))
    constants = {"D": d, "K": k, "K_PADDED": k_padded, "PANEL": panel}
    return constants, {"num_warps": 4 if k_padded * panel >= 2048 else 1, **NUMERICS}


def residual(
    val_TK: Tensor, idx_TK: Tensor, w_dec_FD: Tensor, b_D: Tensor, x_TD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the reconstruction's error, its product with each active decoder row, and its square.

    e = Σ_k val · w_dec[idx] + b − x is summed in float32 and stored in the dtype of `x_TD`, unscaled;
    dot = ⟨e as stored, w_dec[idx]⟩; sse = Σ_d e² before rounding. Indices are not checked.

    Args:
        val_TK: float32, k at most 512.
        idx_TK: int32, 0 to F − 1.
        w_dec_FD: float32, bfloat16 or float16.
        b_D: float32, b_dec in the units of `x_TD`.
        x_TD: float32, bfloat16 or float16.

    Returns: e_TD in the dtype of `x_TD`, dot_TK float32, sse_T float32.

    Raises:
        TypeError: another dtype.
        ValueError: shapes that do not agree, a tensor with gaps, or a larger k.
    """
    (n_tokens, d), k = x_TD.shape, val_TK.shape[1]
    if not 1 <= k <= MAX_K:
        raise ValueError(f"k must be 1 to {MAX_K}, got {k}")
    expect("val_TK", val_TK, (torch.float32,), (n_tokens, k))
    expect("idx_TK", idx_TK, (torch.int32,), (n_tokens, k))
    expect("w_dec_FD", w_dec_FD, INPUT_DTYPES, (len(w_dec_FD), d))
    expect("b_D", b_D, (torch.float32,), (d,))
    expect("x_TD", x_TD, INPUT_DTYPES, (n_tokens, d))
    constants, options = launch(d, k)
    e_TD, dot_TK = torch.empty_like(x_TD), torch.empty_like(val_TK)
    sse_T = torch.empty(n_tokens, device=x_TD.device)
    if n_tokens:
        with torch.cuda.device_of(x_TD):
            residual_kernel[(n_tokens,)](
                val_TK, idx_TK, w_dec_FD, b_D, x_TD, e_TD, dot_TK, sse_T, **constants, **options
            )
    return e_TD, dot_TK, sse_T

"""Decoding of as many slots as each token has, in nested groups: the error of each group, and what follows.

One program per token keeps a whole row of the width and gathers a few decoder rows at a time. It decodes all
slots first. Then it walks back from the largest group: it adds the group's weighted error to those of the
larger ones, which is the row that the group's own slots learn from, and takes these slots away, which leaves
the error of the next smaller group.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from saemill.train.backends.gpu.kernels.arguments import INPUT_DTYPES, NUMERICS, expect

WARP_COLUMNS = 1024
"""Columns of a row that one warp holds."""
MAX_WARPS = 16


@triton.jit
def slots_and_rows(
    val_ptr,
    idx_ptr,
    w_ptr,
    token,
    first,
    last,
    column,
    n_slots,
    D: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Load some slots of a token: their places, which of them are below `last`, codes and decoder rows."""
    slot = first + tl.arange(0, SLOTS)
    present = slot < last
    at = token * n_slots + slot
    latent = tl.load(idx_ptr + at, mask=present, other=0).to(tl.int64)
    val = tl.load(val_ptr + at, mask=present, other=0.0)
    mask = present[:, None] & (column < D)[None, :]
    w = tl.load(w_ptr + latent[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)
    return at, present, val, w


@triton.jit
def groups_kernel(
    val_ptr,
    idx_ptr,
    ends_ptr,
    weights_ptr,
    w_ptr,
    b_ptr,
    x_ptr,
    e_ptr,
    dot_ptr,
    sse_ptr,
    rows_ptr,
    n_tokens,
    n_slots,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    SHOWN: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Decode one token per program. `dot` takes the rounded rows, as every later sum does."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < D
    ends_ptr += token * GROUPS
    b = tl.load(b_ptr + column, mask=inside, other=0.0)
    e = b - tl.load(x_ptr + token * D + column, mask=inside, other=0.0).to(tl.float32)
    last = tl.load(ends_ptr + GROUPS - 1)
    for first in range(0, last, SLOTS):
        _, _, val, w = slots_and_rows(val_ptr, idx_ptr, w_ptr, token, first, last, column, n_slots, D, SLOTS)
        e += tl.sum(val[:, None] * w, 0)
    total = tl.zeros((WIDTH,), tl.float32)
    for step in range(GROUPS):
        group = GROUPS - 1 - step
        tl.store(sse_ptr + token * GROUPS + group, tl.sum(e * e, 0))
        if group == SHOWN:
            tl.store(e_ptr + token * D + column, e.to(e_ptr.dtype.element_ty), mask=inside)
        if weights_ptr is not None:
            total += tl.load(weights_ptr + group) * e
        else:
            total += e
        stored = total.to(e_ptr.dtype.element_ty)
        if rows_ptr is not None:
            at_row = (group * n_tokens + token) * D
            tl.store(rows_ptr + at_row + column, stored, mask=inside)
        row = stored.to(tl.float32)
        start = tl.load(ends_ptr + group - 1, mask=group > 0, other=0)
        for first in range(start, last, SLOTS):
            at, present, val, w = slots_and_rows(
                val_ptr, idx_ptr, w_ptr, token, first, last, column, n_slots, D, SLOTS
            )
            tl.store(dot_ptr + at, tl.sum(w * row[None, :], 1), mask=present)
            e -= tl.sum(val[:, None] * w, 0)
        last = start


def launch(d: int, n_groups: int, shown: int) -> tuple[dict[str, int], dict[str, Any]]:
    """Return the kernel's constants and its launch options."""
    width = triton.next_power_of_2(d)
    n_rows = 4 if n_groups == 1 else 2  # registers: what the next smaller group needs is kept beside the rows
    constants = {"D": d, "WIDTH": width, "GROUPS": n_groups, "SHOWN": shown, "SLOTS": n_rows}
    return constants, {"num_warps": min(MAX_WARPS, max(1, width // WARP_COLUMNS)), **NUMERICS}


def residual_of_groups(
    val_TK: Tensor,
    idx_TK: Tensor,
    ends_TG: Tensor,
    weights_G: Tensor | None,
    shown: int,
    w_dec_FD: Tensor,
    b_D: Tensor,
    x_TD: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute the errors of nested groups of codes, and for each the weighted sum of those that hold it.

    e_g = Σ val · w_dec[idx] + b − x over the slots before ends[t, g], in float32; rows_g = Σ_{h ≥ g}
    weights_h · e_h. Both are stored in the dtype of `x_TD`; sse is of what was not rounded. Indices are not
    checked.

    Args:
        val_TK: float32.
        idx_TK: int32, 0 to F − 1, in the order of the groups.
        ends_TG: int32, ascending in each row; slots from the last one on are not in use.
        weights_G: float32, of the groups' errors; None where there is one group, of weight 1.
        shown: the group whose error is returned.
        w_dec_FD: float32, bfloat16 or float16.
        b_D: float32, b_dec in the units of `x_TD`.
        x_TD: float32, bfloat16 or float16.

    Returns: the error of the group that is shown, [T, D]; ⟨row of the slot's group, w_dec[idx]⟩, float32, 0
        where a slot is not in use; Σ e² of each token and group, float32; rows_GTD, None without weights.

    Raises:
        TypeError: another dtype.
        ValueError: shapes that do not agree, or a tensor with gaps.
    """
    (n_tokens, d), (n_slots, n_groups) = x_TD.shape, (val_TK.shape[1], ends_TG.shape[1])
    expect("val_TK", val_TK, (torch.float32,), (n_tokens, n_slots))
    expect("idx_TK", idx_TK, (torch.int32,), (n_tokens, n_slots))
    expect("ends_TG", ends_TG, (torch.int32,), (n_tokens, n_groups))
    if weights_G is not None:
        expect("weights_G", weights_G, (torch.float32,), (n_groups,))
    elif n_groups > 1:
        raise ValueError(f"{n_groups} groups need weights_G")
    expect("w_dec_FD", w_dec_FD, INPUT_DTYPES, (len(w_dec_FD), d))
    expect("b_D", b_D, (torch.float32,), (d,))
    expect("x_TD", x_TD, INPUT_DTYPES, (n_tokens, d))
    e_TD, dot_TK = torch.empty_like(x_TD), torch.zeros_like(val_TK)
    sse_TG = torch.empty(n_tokens, n_groups, device=x_TD.device)
    rows_GTD = None if weights_G is None else x_TD.new_empty(n_groups, n_tokens, d)
    inputs = (val_TK, idx_TK, ends_TG, weights_G, w_dec_FD, b_D, x_TD)
    filled = (e_TD, dot_TK, sse_TG, rows_GTD)
    constants, options = launch(d, n_groups, shown)
    if n_tokens:
        with torch.cuda.device_of(x_TD):
            groups_kernel[(n_tokens,)](*inputs, *filled, n_tokens, n_slots, **constants, **options)
    return e_TD, dot_TK, sse_TG, rows_GTD

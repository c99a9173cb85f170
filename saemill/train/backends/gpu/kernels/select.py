"""The k largest pre-activations of each token, exactly, in one read of the row.

A row is cut into groups of G neighbouring latents. The k largest entries lie in the k groups with the
largest maxima, so the row is read once for the maxima, k groups are chosen, and only they (k·G entries, by
then in cache) are read again. Both choices are the same search: the k-th largest key, bit by bit, then all
above it and the first of those equal to it.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from saemill.train.backends.gpu.kernels.arguments import INPUT_DTYPES, NUMERICS, expect

INFINITY_BITS = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}
MAX_CANDIDATES = 1 << 15
"""Two counts share one 32-bit scan."""
MAX_ROW_BYTES = 1 << 17
"""Bytes of a row that 16 warps hold without spilling."""
SLAB_BYTES = 1 << 16
"""Bytes of the slabs in which longer rows are read."""


@triton.jit
def ordered_key(bits, WIDTH: tl.constexpr, INFINITY: tl.constexpr, SIGNED: tl.constexpr):
    """Map float bits to int32 that sort as the values do, or as their sizes: both zeros equal, every NaN
    above infinity."""
    LARGEST: tl.constexpr = (1 << (WIDTH - 1)) - 1
    wide = bits.to(tl.int32)
    magnitude = wide & LARGEST
    key = magnitude if SIGNED else tl.where(wide < 0, -magnitude, magnitude)
    return tl.where(magnitude > INFINITY, LARGEST, key)


@triton.jit
def rectified(key, WIDTH: tl.constexpr, INFINITY: tl.constexpr):
    """Compute the value of a key as float32: 0 where it is negative, NaN where it was."""
    positive = tl.maximum(key, 0)
    if WIDTH == 32:
        value = positive.to(tl.float32, bitcast=True)
    elif INFINITY == 0x7F80:
        value = (positive << 16).to(tl.float32, bitcast=True)
    else:
        value = positive.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return value


@triton.jit
def largest(key, K: tl.constexpr, WIDTH: tl.constexpr):
    """Find the K largest of a vector, ties to the lowest place. Returns: which they are, and the place of
    each among them."""
    LOWEST: tl.constexpr = -(1 << (WIDTH - 1))
    threshold = tl.where(tl.sum((key >= 0).to(tl.int32), 0) >= K, 0, LOWEST)
    step = 1 << (WIDTH - 2)
    for _ in range(WIDTH - 1):
        higher = threshold + step
        threshold = tl.where(tl.sum((key >= higher).to(tl.int32), 0) >= K, higher, threshold)
        step = step >> 1
    above = key > threshold
    equal = key == threshold
    counts = tl.cumsum(above.to(tl.int32) * 65536 + equal.to(tl.int32), 0)
    n_equal = counts & 65535
    needed = K - tl.sum(above.to(tl.int32), 0)
    chosen = above | (equal & (n_equal <= needed))
    return chosen, (counts >> 16) + tl.minimum(n_equal, needed) - 1


@triton.jit
def select_kernel(
    bits_ptr,
    val_ptr,
    idx_ptr,
    F,
    K: tl.constexpr,
    K_GROUPS: tl.constexpr,
    K_PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    N_GROUPS: tl.constexpr,
    N_SLABS: tl.constexpr,
    WIDTH: tl.constexpr,
    INFINITY: tl.constexpr,
    SIGNED: tl.constexpr,
):
    """Select the codes of one token per program."""
    PADDING: tl.constexpr = -(1 << (WIDTH - 1))
    token = tl.program_id(0).to(tl.int64)
    row_ptr = bits_ptr + token * F
    within = tl.arange(0, GROUP)
    slabs = tl.arange(0, N_SLABS)
    maxima = tl.full((N_SLABS, N_GROUPS // N_SLABS), PADDING, tl.int32)
    for slab in range(N_SLABS):  # a long row does not fit the registers at once
        groups = slab * (N_GROUPS // N_SLABS) + tl.arange(0, N_GROUPS // N_SLABS)
        latents = groups[:, None] * GROUP + within[None, :]
        bits = tl.load(row_ptr + latents, mask=latents < F, other=0)
        keys = tl.where(latents < F, ordered_key(bits, WIDTH, INFINITY, SIGNED), PADDING)
        maxima = tl.where((slabs == slab)[:, None], tl.max(keys, 1)[None, :], maxima)
    chosen, place = largest(tl.reshape(maxima, (N_GROUPS,)), K_GROUPS, WIDTH)
    # The chosen groups pass through the indices' own memory: no vector can be compacted in registers.
    scratch_ptr = idx_ptr + token * K
    tl.store(scratch_ptr + place, tl.arange(0, N_GROUPS), mask=chosen)
    tl.debug_barrier()
    slots = tl.arange(0, K_PADDED)
    group = tl.load(scratch_ptr + slots, mask=slots < K_GROUPS, other=0)
    tl.debug_barrier()
    candidates = group[:, None] * GROUP + within[None, :]
    present = (slots < K_GROUPS)[:, None] & (candidates < F)
    bits = tl.load(row_ptr + candidates, mask=present, other=0)
    keys = tl.where(present, ordered_key(bits, WIDTH, INFINITY, SIGNED), PADDING)
    keys = tl.reshape(keys, (K_PADDED * GROUP,))
    candidates = tl.reshape(candidates, (K_PADDED * GROUP,))
    chosen, place = largest(keys, K, WIDTH)
    tl.store(idx_ptr + token * K + place, candidates, mask=chosen)
    values = rectified(keys, WIDTH, INFINITY)
    if SIGNED:
        values = tl.where(tl.reshape(bits, (K_PADDED * GROUP,)) < 0, -values, values)
    tl.store(val_ptr + token * K + place, values, mask=chosen)


def launch(
    n_latents: int, k: int, dtype: torch.dtype, is_signed: bool = False
) -> tuple[dict[str, int], dict[str, Any]]:
    """Return the kernel's constants and its launch options.

    The group size balances the number of groups, F/G, against that of candidates, k·G.
    """
    group = max(16, 2 ** math.ceil(math.log2(math.sqrt(n_latents / k))))
    n_groups = triton.cdiv(n_latents, group)
    k_groups = min(k, n_groups)
    constants = {
        "K": k,
        "K_GROUPS": k_groups,
        "K_PADDED": triton.next_power_of_2(k_groups),
        "GROUP": group,
        "N_GROUPS": triton.next_power_of_2(n_groups),
        "WIDTH": dtype.itemsize * 8,
        "INFINITY": INFINITY_BITS[dtype],
        "SIGNED": is_signed,
    }
    n_entries = constants["N_GROUPS"] * group
    n_bytes = n_entries * dtype.itemsize
    constants["N_SLABS"] = 1 if n_bytes <= MAX_ROW_BYTES else n_bytes // SLAB_BYTES
    n_candidates = constants["K_PADDED"] * group
    size = max(n_entries // constants["N_SLABS"], 4 * n_candidates)
    n_warps = 1 if size <= 1024 else 4 if size <= 8192 else 8 if size <= 32768 and n_entries <= 32768 else 16
    return constants, {"num_warps": n_warps, **NUMERICS}


def select(pre_TF: Tensor, k: int, is_signed: bool = False) -> tuple[Tensor, Tensor]:
    """Select the k largest entries of each row, exactly and rectified, in ascending order of index.

    Entries that tie for the last places are taken from the lowest index on; −0 and 0 tie. NaN counts as
    larger than everything, whatever its sign (as in torch.topk), and stays NaN in `val`, so that the
    squared error shows it.

    Args:
        pre_TF: float32, bfloat16 or float16, contiguous.
        k: 1 to F.
        is_signed: whether to select the largest by absolute value, with their signs.

    Returns: val_TK float32, 0 or more but where they keep their signs; idx_TK int32.

    Raises:
        TypeError: another dtype.
        ValueError: not a contiguous matrix, or a k out of range or too large for one program.
    """
    if pre_TF.dim() != 2:
        raise ValueError(f"pre_TF must be a matrix, got shape {list(pre_TF.shape)}")
    n_tokens, n_latents = pre_TF.shape
    expect("pre_TF", pre_TF, INPUT_DTYPES, (n_tokens, n_latents))
    if not 1 <= k <= n_latents:
        raise ValueError(f"k must be 1 to {n_latents} (the number of latents), got {k}")
    constants, options = launch(n_latents, k, pre_TF.dtype, is_signed)
    if max(constants["K_PADDED"] * constants["GROUP"], constants["N_GROUPS"]) > MAX_CANDIDATES:
        raise ValueError(f"k={k} of {n_latents} latents is more than one program can hold; use torch.topk")
    val_TK = torch.empty(n_tokens, k, device=pre_TF.device)
    idx_TK = torch.empty(n_tokens, k, dtype=torch.int32, device=pre_TF.device)
    bits_TF = pre_TF.view(torch.int32 if pre_TF.dtype == torch.float32 else torch.int16)
    if n_tokens:
        with torch.cuda.device_of(pre_TF):
            select_kernel[(n_tokens,)](bits_TF, val_TK, idx_TK, n_latents, **constants, **options)
    return val_TK, idx_TK

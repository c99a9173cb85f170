"""The pairs (token, latent) in the order of their latents, and sums over each latent's pairs.

A pair is numbered p = t·K + k, as it lies in idx_TK. One stable sort brings the pairs of each latent
together in the order of their tokens, so every sum below has a fixed order. A latent with more than
CHUNK_PAIRS pairs is hot: its sums of rows are made chunk by chunk by several programs and added up, in
order, by the program that updates it.

Where codes are in groups that fit alone, a pair's error is not its token's but that of its group on the
token: row g·T + t of the errors, which `row_TK` says.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saemill.train.backends.gpu.kernels.arguments import INPUT_DTYPES, NUMERICS, expect
from saemill.train.backends.gpu.kernels.hyper import Hyper

GRADIENT_SCALE = tl.constexpr(int(Hyper.GRADIENT_SCALE))
CHUNK_PAIRS = 256
"""Pairs that one program sums; latents with more are hot."""


class Segments(NamedTuple):
    """The sorted pairs of a batch. All int32, of sizes that depend on the shapes alone."""

    order_P: Tensor
    """Numbers of the pairs, sorted by latent, then token."""
    starts: Tensor
    """[F + 1]: latent f has the pairs at starts[f] to starts[f + 1] of `order_P`."""
    latents_F: Tensor
    """All latents, those with the most pairs first."""
    first_chunk_F: Tensor
    """The first chunk of each hot latent; without meaning for others."""
    chunk_latent_C: Tensor
    """The latent of each chunk; without meaning from n_chunks on."""
    n_chunks: Tensor
    """[1]: chunks in use."""
    k: int
    """Active latents per token."""
    chunk_pairs: int
    """Pairs per chunk."""


class Terms(NamedTuple):
    """What gradients of rows are summed from, pair by pair."""

    x_TD: Tensor
    """The batch in training units, float32, bfloat16 or float16."""
    e_ND: Tensor
    """Errors, of `residual` or `residual_of_groups`, float32, bfloat16 or float16."""
    val_TK: Tensor
    """float32, the codes."""
    dpre_TK: Tensor
    """float32, gradients at the pre-activations, scaled."""
    row_TK: Tensor | None = None
    """int32, the row of `e_ND` that is the error of a pair; None where it is its token's."""


class AuxGradients(NamedTuple):
    """Gradients of some latents' rows from another loss (AuxK), already scaled."""

    slot_F: Tensor
    """int32: the latent's row in the tensors below, −1 where it has none."""
    enc_SD: Tensor
    """float32."""
    b_S: Tensor
    """float32."""
    dec_SD: Tensor
    """float32, without its component along the decoder row."""


class LatentSums(NamedTuple):
    """Sums of numbers over each latent's pairs."""

    dpre_F: Tensor
    """float32: Σ dpre."""
    toward_F: Tensor | None
    """float32: what is added to a decoder row's gradient, times the row. Of unit rows −gs · Σ val · dot =
    −gs · ⟨Σ val · e, w_dec⟩, which takes away the component along the row. None adds nothing."""
    db_enc_F: Tensor
    """float32: gradient of b_enc, Σ dpre + aux."""
    fired_F: Tensor
    """bool: active on some token."""


def segments(idx_TK: Tensor, n_latents: int, chunk_pairs: int = CHUNK_PAIRS) -> Segments:
    """Sort the pairs of a batch by latent. Nothing waits for the device.

    Args:
        idx_TK: int32, 0 to n_latents − 1, or n_latents for pairs of no latent (not checked).
        n_latents: F.
        chunk_pairs: more pairs than this make a latent hot.

    Raises:
        TypeError: another dtype.
        ValueError: 2^31 pairs or more.
    """
    if idx_TK.dtype != torch.int32:
        raise TypeError(f"idx_TK must be int32, got {idx_TK.dtype}; convert it first")
    n_pairs, device = idx_TK.numel(), idx_TK.device
    if n_pairs >= 1 << 31:
        raise ValueError(f"{n_pairs} pairs do not fit 32-bit numbers; train with fewer tokens per batch")
    keys_P, order_P = torch.sort(idx_TK.reshape(-1), stable=True)
    bounds = torch.arange(n_latents + 1, dtype=torch.int32, device=device)
    starts = torch.searchsorted(keys_P, bounds, out_int32=True)
    count_F = starts[1:] - starts[:-1]
    chunks_F = torch.where(count_F > chunk_pairs, (count_F + (chunk_pairs - 1)) // chunk_pairs, 0)
    ends_F = torch.cumsum(chunks_F, 0, dtype=torch.int32)
    # n > L pairs make ceil(n / L) ≤ 2n / (L + 1) chunks, with equality at n = L + 1.
    capacity = max(1, 2 * n_pairs // (chunk_pairs + 1))
    numbers_C = torch.arange(capacity, dtype=torch.int32, device=device)
    chunk_latent_C = torch.searchsorted(ends_F, numbers_C, right=True, out_int32=True).clamp_(
        max=n_latents - 1
    )
    latents_F = torch.argsort(count_F, descending=True, stable=True).int()
    first_chunk_F = (ends_F - chunks_F).int()
    k = idx_TK.shape[1]
    return Segments(
        order_P.int(), starts, latents_F, first_chunk_F, chunk_latent_C, ends_F[-1:], k, chunk_pairs
    )


@triton.jit
def latent_sums_kernel(
    latents_ptr,
    starts_ptr,
    order_ptr,
    val_ptr,
    dot_ptr,
    dpre_ptr,
    hyper_ptr,
    slot_ptr,
    aux_b_ptr,
    dpre_sum_ptr,
    toward_ptr,
    db_ptr,
    fired_ptr,
    K,
    n_shown,
    BLOCK: tl.constexpr,
):
    """Sum over the pairs of one latent per program, those with the most pairs first."""
    latent = tl.load(latents_ptr + tl.program_id(0))
    start = tl.load(starts_ptr + latent)
    end = tl.load(starts_ptr + latent + 1)
    dpres = tl.zeros((BLOCK,), tl.float32)
    alongs = tl.zeros((BLOCK,), tl.float32)
    fired = tl.zeros((BLOCK,), tl.int32)
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < end
        pair = tl.load(order_ptr + at, mask=inside, other=0)
        val = tl.load(val_ptr + pair, mask=inside, other=0.0)
        dpres += tl.load(dpre_ptr + pair, mask=inside, other=0.0)
        if dot_ptr is not None:
            alongs += val * tl.load(dot_ptr + pair, mask=inside, other=0.0)
        shown = tl.abs(val) > 0
        if n_shown is not None:
            shown = shown & (pair % K < n_shown)
        fired |= shown.to(tl.int32)
    dpre = tl.sum(dpres, 0)
    db = dpre
    if slot_ptr is not None:
        slot = tl.load(slot_ptr + latent)
        db += tl.load(aux_b_ptr + slot, mask=slot >= 0, other=0.0)
    tl.store(dpre_sum_ptr + latent, dpre)
    if dot_ptr is not None:
        tl.store(toward_ptr + latent, -tl.load(hyper_ptr + GRADIENT_SCALE) * tl.sum(alongs, 0))
    tl.store(db_ptr + latent, db)
    tl.store(fired_ptr + latent, tl.max(fired, 0).to(tl.int8))


@triton.jit
def gather_rows(
    order_ptr,
    val_ptr,
    dpre_ptr,
    row_ptr,
    x_ptr,
    e_ptr,
    start,
    end,
    column,
    inside,
    K,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Sum dpre · x_t and val · e over the pairs from start to end, in one block of columns."""
    sum_enc = tl.zeros((BLOCK,), tl.float32)
    sum_dec = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, end, UNROLL):
        at = first + tl.arange(0, UNROLL)
        present = at < end
        pair = tl.load(order_ptr + at, mask=present, other=0)
        val = tl.load(val_ptr + pair, mask=present, other=0.0)
        dpre = tl.load(dpre_ptr + pair, mask=present, other=0.0)
        rows = (pair // K).to(tl.int64)[:, None] * D + column[None, :]
        mask = present[:, None] & inside[None, :]
        x = tl.load(x_ptr + rows, mask=mask, other=0.0).to(tl.float32)
        if row_ptr is not None:
            row = tl.load(row_ptr + pair, mask=present, other=0)
            rows = row.to(tl.int64)[:, None] * D + column[None, :]
        e = tl.load(e_ptr + rows, mask=mask, other=0.0).to(tl.float32)
        sum_enc += tl.sum(dpre[:, None] * x, 0)
        sum_dec += tl.sum(val[:, None] * e, 0)
    return sum_enc, sum_dec


@triton.jit
def chunk_sums_kernel(
    starts_ptr,
    first_chunk_ptr,
    chunk_latent_ptr,
    n_chunks_ptr,
    order_ptr,
    val_ptr,
    dpre_ptr,
    row_ptr,
    x_ptr,
    e_ptr,
    partial_ptr,
    K,
    D: tl.constexpr,
    PANEL: tl.constexpr,
    UNROLL: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Sum one chunk of a hot latent and panel per program; those past the last chunk return at once."""
    chunk = tl.program_id(0)
    if chunk < tl.load(n_chunks_ptr):
        latent = tl.load(chunk_latent_ptr + chunk)
        start = tl.load(starts_ptr + latent) + (chunk - tl.load(first_chunk_ptr + latent)) * CHUNK
        end = tl.minimum(start + CHUNK, tl.load(starts_ptr + latent + 1))
        column = tl.program_id(1) * PANEL + tl.arange(0, PANEL)
        inside = column < D
        where = (start, end, column, inside)
        sum_enc, sum_dec = gather_rows(
            order_ptr, val_ptr, dpre_ptr, row_ptr, x_ptr, e_ptr, *where, K, D, PANEL, UNROLL
        )
        at = chunk.to(tl.int64) * (2 * D) + column
        tl.store(partial_ptr + at, sum_enc, mask=inside)
        tl.store(partial_ptr + at + D, sum_dec, mask=inside)


LATENT_SUMS_LAUNCH: tuple[dict[str, int], dict[str, Any]] = ({"BLOCK": 256}, {"num_warps": 1, **NUMERICS})


def chunk_sums_launch(d: int, chunk_pairs: int) -> tuple[dict[str, int], dict[str, Any]]:
    """Return the kernel's constants and its launch options."""
    panel = min(256, triton.next_power_of_2(d))
    return {"D": d, "PANEL": panel, "UNROLL": 8, "CHUNK": chunk_pairs}, {"num_warps": 2, **NUMERICS}


def latent_sums(
    val_TK: Tensor,
    dot_TK: Tensor | None,
    dpre_TK: Tensor,
    pairs: Segments,
    hyper: Tensor,
    aux: AuxGradients | None = None,
    n_shown: int | None = None,
) -> LatentSums:
    """Sum over each latent's pairs.

    Args:
        val_TK: float32, the codes.
        dot_TK: float32, of `residual`; None where decoder rows are not of unit length.
        dpre_TK: float32, gradients at the pre-activations, scaled.
        pairs: of the same batch.
        hyper: see `hyper.Hyper`; only the gradient scale is read.
        aux: gradients to add to b_enc's.
        n_shown: codes in later slots than so many do not count as fired; None counts all.

    Raises:
        TypeError: another dtype.
        ValueError: shapes that do not agree, or a tensor with gaps.
    """
    n_pairs, n_latents = len(pairs.order_P), len(pairs.latents_F)
    for name, tensor in (("val_TK", val_TK), ("dot_TK", dot_TK), ("dpre_TK", dpre_TK)):
        if tensor is not None:
            expect(name, tensor, (torch.float32,), (n_pairs // pairs.k, pairs.k))
    expect("hyper", hyper, (torch.float32,), (len(Hyper),))
    slot_F, b_S = (aux.slot_F, aux.b_S) if aux else (None, None)
    if aux:
        expect("aux.slot_F", aux.slot_F, (torch.int32,), (n_latents,))
        expect("aux.b_S", aux.b_S, (torch.float32,), (len(aux.b_S),))
    dpre_F, db_enc_F = (torch.empty(n_latents, device=val_TK.device) for _ in range(2))
    toward_F = None if dot_TK is None else torch.empty_like(dpre_F)
    fired_F = torch.empty(n_latents, dtype=torch.int8, device=val_TK.device)
    inputs = (pairs.latents_F, pairs.starts, pairs.order_P, val_TK, dot_TK, dpre_TK, hyper, slot_F, b_S)
    filled = (dpre_F, toward_F, db_enc_F, fired_F)
    constants, options = LATENT_SUMS_LAUNCH
    with torch.cuda.device_of(val_TK):
        latent_sums_kernel[(n_latents,)](*inputs, *filled, pairs.k, n_shown, **constants, **options)
    return LatentSums(dpre_F, toward_F, db_enc_F, fired_F.view(torch.bool))


def chunk_sums(pairs: Segments, terms: Terms) -> Tensor:
    """Sum dpre · x_t and val · e over each chunk of the hot latents.

    Args:
        pairs: of the batch.
        terms: of the same.

    Returns: float32 [C, 2, D]; chunks not in use are left as they were allocated.

    Raises:
        TypeError: another dtype.
        ValueError: shapes that do not agree, or a tensor with gaps.
    """
    x_TD, e_ND, val_TK, dpre_TK, row_TK = terms
    n_tokens, d = x_TD.shape
    for name, tensor in (("val_TK", val_TK), ("dpre_TK", dpre_TK)):
        expect(name, tensor, (torch.float32,), (n_tokens, pairs.k))
    expect("x_TD", x_TD, INPUT_DTYPES, (n_tokens, d))
    expect("e_ND", e_ND, INPUT_DTYPES, (n_tokens if row_TK is None else len(e_ND), d))
    if row_TK is not None:
        expect("row_TK", row_TK, (torch.int32,), (n_tokens, pairs.k))
    capacity = len(pairs.chunk_latent_C)
    partial = torch.empty(capacity, 2, d, device=x_TD.device)
    constants, options = chunk_sums_launch(d, pairs.chunk_pairs)
    table = (pairs.starts, pairs.first_chunk_F, pairs.chunk_latent_C, pairs.n_chunks, pairs.order_P)
    inputs = (val_TK, dpre_TK, row_TK, x_TD, e_ND)
    grid = (capacity, triton.cdiv(d, constants["PANEL"]))
    with torch.cuda.device_of(x_TD):
        chunk_sums_kernel[grid](*table, *inputs, partial, pairs.k, **constants, **options)
    return partial

"""One pass over the parameters: gradients of both rows of a latent, projection, optimizer, renorming.

A program gathers the inputs and errors of its latent's tokens, block by block, and steps the encoder row,
encoder bias and decoder row in place. Rows without pairs are stepped too: moments decay and weights move
on, as in torch.optim.

A row's length is known only after its last block; then a row that is to be of unit length, and is still in
the cache, is read once more and renormalised.

With gs the gradient scale and the sums over the latent's pairs (t, val, dpre):

    g_enc = Σ dpre x_t − (Σ dpre) b + aux,   g_b = Σ dpre + aux,
    g_dec = gs Σ val e + toward · w_dec + aux.

For rows of unit length `toward` is −gs Σ val · dot, which is −gs ⟨Σ val e, w_dec⟩ with the weights that
`residual` gathered. If these are bfloat16, about 5e-5 of the gradient's length stays parallel to the row;
the renorming removes its effect. Rows that are not renormed may have a penalty in its place.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saemill.train.backends.gpu.kernels.arguments import INPUT_DTYPES, NUMERICS, expect
from saemill.train.backends.gpu.kernels.hyper import Hyper
from saemill.train.backends.gpu.kernels.segments import (
    AuxGradients,
    LatentSums,
    Segments,
    Terms,
    chunk_sums,
    gather_rows,
)
from saemill.train.backends.gpu.kernels.stepping import LR, load_rates, mixed, stepped
from saemill.train.optim import moments

GRADIENT_SCALE = tl.constexpr(int(Hyper.GRADIENT_SCALE))
WEIGHT_DECAY = tl.constexpr(int(Hyper.WEIGHT_DECAY))
HEALTHY = tl.constexpr(int(Hyper.HEALTHY))

BLOCK = moments.BLOCK
"""Columns in registers at a time, 256. One warp: 8 columns per thread, 16 bytes of bfloat16 in one load."""
OPTIMIZERS = ("adam", "sgd")
MOMENT_DTYPES = (torch.float32, torch.bfloat16, torch.int8)


class Latents(NamedTuple):
    """One SAE's latents. Masters are float32; all are changed in place."""

    w_enc_FD: Tensor
    b_enc_F: Tensor
    w_dec_FD: Tensor
    """Rows of unit length, unless they are free."""
    copy_enc_FD: Tensor | None
    """bfloat16 copy for the encoder's product, written anew; None where float32 is multiplied."""
    copy_dec_FD: Tensor | None
    """bfloat16 copy for `residual`; None or not as `copy_enc_FD`."""


class Moments(NamedTuple):
    """The optimizer's state, zero at first; changed in place. With SGD m is the buffer and v None.

    Those of the rows are float32, bfloat16, or int8 (m) and uint8 (v), all alike; those of the bias
    float32. 8-bit moments have scales, one per block of columns: see `moments.EightBitMoment`.
    """

    m_enc_FD: Tensor
    m_b_F: Tensor
    m_dec_FD: Tensor
    v_enc_FD: Tensor | None
    v_b_F: Tensor | None
    v_dec_FD: Tensor | None
    m_enc_scale_FB: Tensor | None = None
    m_dec_scale_FB: Tensor | None = None
    v_enc_scale_FB: Tensor | None = None
    v_dec_scale_FB: Tensor | None = None


@triton.jit
def normalise(w_dec_ptr, copy_dec_ptr, latent, squares, D: tl.constexpr, BLOCK: tl.constexpr):
    """Divide a decoder row by its length, the root of `squares`, and write its copy."""
    inverse = 1.0 / tl.sqrt_rn(squares)
    for first in range(0, D, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < D
        at = latent.to(tl.int64) * D + column
        w_dec = tl.load(w_dec_ptr + at, mask=inside, other=0.0) * inverse
        tl.store(w_dec_ptr + at, w_dec, mask=inside)
        if copy_dec_ptr is not None:
            tl.store(copy_dec_ptr + at, w_dec.to(copy_dec_ptr.dtype.element_ty), mask=inside)


@triton.jit
def step_bias(b_enc_ptr, m_b_ptr, v_b_ptr, db_ptr, latent, rates, ADAM: tl.constexpr):
    """Step a latent's encoder bias."""
    lane = tl.zeros((1,), tl.int32)
    place = latent + lane
    b, db = tl.load(b_enc_ptr + place), tl.load(db_ptr + place)
    only = (lane, lane == 0, 0)
    b = stepped(b, db, m_b_ptr + place, v_b_ptr + place, None, None, lane, only, rates, ADAM)
    tl.store(b_enc_ptr + place, b)


@triton.jit
def add_chunks(g_enc, g_dec, partial_ptr, first_chunk_ptr, n_chunks, column, inside, D: tl.constexpr):
    """Add to a row's gradients the sums over its chunks of pairs."""
    if n_chunks > 0:
        partial = partial_ptr + tl.load(first_chunk_ptr).to(tl.int64) * (2 * D) + column
        for chunk in range(n_chunks):
            g_enc += tl.load(partial + chunk * (2 * D), mask=inside, other=0.0)
            g_dec += tl.load(partial + chunk * (2 * D) + D, mask=inside, other=0.0)
    return g_enc, g_dec


@triton.jit
def step_row(w, g, w_ptr, copy_ptr, m_ptr, v_ptr, scale_ptrs, at, row_hash, lanes, rates, ADAM: tl.constexpr):
    """Step some columns of a row, and write them and their copy. Returns the weights."""
    w = stepped(w, g, m_ptr + at, v_ptr + at, scale_ptrs[0], scale_ptrs[1], row_hash, lanes, rates, ADAM)
    tl.store(w_ptr + at, w, mask=lanes[1])
    if copy_ptr is not None:
        tl.store(copy_ptr + at, w.to(copy_ptr.dtype.element_ty), mask=lanes[1])
    return w


@triton.jit
def update_kernel(
    latents_ptr,
    starts_ptr,
    first_chunk_ptr,
    order_ptr,
    val_ptr,
    dpre_ptr,
    row_ptr,
    x_ptr,
    e_ptr,
    b_ptr,
    partial_ptr,
    dpre_sum_ptr,
    toward_ptr,
    db_ptr,
    w_enc_ptr,
    b_enc_ptr,
    w_dec_ptr,
    copy_enc_ptr,
    copy_dec_ptr,
    m_enc_ptr,
    m_b_ptr,
    m_dec_ptr,
    v_enc_ptr,
    v_b_ptr,
    v_dec_ptr,
    m_enc_scale_ptr,
    m_dec_scale_ptr,
    v_enc_scale_ptr,
    v_dec_scale_ptr,
    slot_ptr,
    aux_enc_ptr,
    aux_dec_ptr,
    hyper_ptr,
    seed_ptr,
    K,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    CHUNK: tl.constexpr,
    ADAM: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Update one latent per program, those with the most pairs first."""
    if tl.load(hyper_ptr + HEALTHY) == 0:
        return
    latent = tl.load(latents_ptr + tl.program_id(0))
    start = tl.load(starts_ptr + latent)
    end = tl.load(starts_ptr + latent + 1)
    rates = load_rates(hyper_ptr)
    shrink = 1 - tl.load(hyper_ptr + LR) * tl.load(hyper_ptr + WEIGHT_DECAY)
    scale = tl.load(hyper_ptr + GRADIENT_SCALE)
    step_bias(b_enc_ptr, m_b_ptr, v_b_ptr, db_ptr, latent, rates, ADAM)

    dpre = tl.load(dpre_sum_ptr + latent)
    n_chunks = 0
    if end - start > CHUNK:
        n_chunks = (end - start + CHUNK - 1) // CHUNK
        end = start
    slot = tl.zeros((1,), tl.int32)
    if slot_ptr is not None:
        slot = tl.load(slot_ptr + latent + slot)
    enc_hash = tl.zeros((1,), tl.uint32)
    if seed_ptr is not None:
        enc_hash += mixed(mixed(tl.load(seed_ptr).to(tl.uint32)) ^ latent.to(tl.uint32))
    dec_hash = enc_hash ^ 0x5BD1E995
    enc_scales, dec_scales = (m_enc_scale_ptr, v_enc_scale_ptr), (m_dec_scale_ptr, v_dec_scale_ptr)
    row_squares = 0.0
    for first in range(0, D, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < D
        at = latent.to(tl.int64) * D + column
        lanes = (column, inside, latent * ((D + BLOCK - 1) // BLOCK) + first // BLOCK)
        where = (start, end, column, inside)
        g_enc, g_dec = gather_rows(
            order_ptr, val_ptr, dpre_ptr, row_ptr, x_ptr, e_ptr, *where, K, D, BLOCK, UNROLL
        )
        g_enc, g_dec = add_chunks(
            g_enc, g_dec, partial_ptr, first_chunk_ptr + latent, n_chunks, column, inside, D
        )
        aux_at = slot.to(tl.int64) * D + column
        has_aux = inside & (slot >= 0)

        # The encoder's row is done before the decoder's is read: fewer registers, more warps.
        w = tl.load(w_enc_ptr + at, mask=inside, other=0.0)
        g = g_enc - dpre * tl.load(b_ptr + column, mask=inside, other=0.0)
        if slot_ptr is not None:
            g += tl.load(aux_enc_ptr + aux_at, mask=has_aux, other=0.0)
        w *= shrink
        step_row(
            w, g, w_enc_ptr, copy_enc_ptr, m_enc_ptr, v_enc_ptr, enc_scales, at, enc_hash, lanes, rates, ADAM
        )

        w = tl.load(w_dec_ptr + at, mask=inside, other=0.0)
        g = scale * g_dec
        if toward_ptr is not None:
            g += tl.load(toward_ptr + latent) * w
        if slot_ptr is not None:
            g += tl.load(aux_dec_ptr + aux_at, mask=has_aux, other=0.0)
        copy_ptr = None if UNIT else copy_dec_ptr
        w = step_row(
            w, g, w_dec_ptr, copy_ptr, m_dec_ptr, v_dec_ptr, dec_scales, at, dec_hash, lanes, rates, ADAM
        )
        if UNIT:
            row_squares += tl.sum(tl.where(inside, w * w, 0.0), 0)

    if UNIT:
        tl.debug_barrier()
        normalise(w_dec_ptr, copy_dec_ptr, latent, row_squares, D, BLOCK)  # the row is still in cache


def launch(
    d: int, chunk_pairs: int, optimizer: str, unit: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `update_kernel`'s constants and launch options: one warp, so that sums need no barrier."""
    block = min(BLOCK, triton.next_power_of_2(d))
    constants = {"D": d, "BLOCK": block, "UNROLL": 4, "CHUNK": chunk_pairs}
    return constants | {"ADAM": optimizer == "adam", "UNIT": unit}, {"num_warps": 1, **NUMERICS}


def update_rows(
    latents: Latents,
    moments: Moments,
    terms: Terms,
    b_D: Tensor,
    pairs: Segments,
    sums: LatentSums,
    hyper: Tensor,
    *,
    optimizer: str,
    seed: Tensor | None = None,
    aux: AuxGradients | None = None,
    unit: bool = True,
) -> None:
    """Take one optimizer step of one SAE's latents, in place; nothing where hyper's HEALTHY is 0.

    `adam` is torch.optim.AdamW on w_enc and torch.optim.Adam on b_enc and w_dec; `sgd` is
    torch.optim.SGD on all three, whose first buffer is the gradient (a zero buffer gives just that), with
    AdamW's decay of w_enc.
    Micro-batches are joined before: one call per step. The gradient of b needs w_enc as it was before.

    Args:
        latents, moments: changed in place.
        terms: what the gradients are summed from.
        b_D: float32, what the encoder subtracts from the batch, as it was in the forward pass.
        pairs, sums: of the same batch; `sums` with the same `aux`.
        hyper: float32 [len(Hyper)], on the device.
        optimizer: "adam" or "sgd".
        seed: int32 [1] on the device, another for every step; for moments shorter than float32, and only
            there.
        aux: gradients to add to some latents' rows.
        unit: whether decoder rows are renormed.

    Raises:
        TypeError: another dtype.
        ValueError: shapes that do not agree, a tensor with gaps, an unknown optimizer, or state that does
            not go with it.
    """
    _check(latents, moments, b_D, hyper, optimizer, seed, aux)
    _check_sums(terms.x_TD, sums, *latents.w_enc_FD.shape)
    x_TD, e_ND, val_TK, dpre_TK, row_TK = terms
    n_latents, d = latents.w_enc_FD.shape
    partial = chunk_sums(pairs, terms)
    constants, options = launch(d, pairs.chunk_pairs, optimizer, unit)
    if optimizer == "sgd":  # never reads v: any pointer will do
        moments = moments._replace(v_enc_FD=moments.m_enc_FD, v_b_F=moments.m_b_F, v_dec_FD=moments.m_dec_FD)
    extra = (aux.slot_F, aux.enc_SD, aux.dec_SD) if aux else (None, None, None)
    with torch.cuda.device_of(x_TD):
        update_kernel[(n_latents,)](
            *(pairs.latents_F, pairs.starts, pairs.first_chunk_F, pairs.order_P),
            *(val_TK, dpre_TK, row_TK, x_TD, e_ND, b_D, partial),
            *(sums.dpre_F, sums.toward_F, sums.db_enc_F),
            *latents,
            *moments,
            *extra,
            *(hyper, seed, pairs.k),
            **constants,
            **options,
        )


def _check_sums(x_TD: Tensor, sums: LatentSums, n_latents: int, d: int) -> None:
    """Refuse a batch, and sums over it, that are not of these latents."""
    expect("x_TD", x_TD, INPUT_DTYPES, (len(x_TD), d))
    for name, sum_F in (("toward_F", sums.toward_F), ("db_enc_F", sums.db_enc_F)):
        if sum_F is not None:
            expect(name, sum_F, (torch.float32,), (n_latents,))


def _check(
    latents: Latents,
    moments: Moments,
    b_D: Tensor,
    hyper: Tensor,
    optimizer: str,
    seed: Tensor | None,
    aux: AuxGradients | None,
) -> None:
    """Refuse parameters and state that do not fit together."""
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    single, rows = (torch.float32,), tuple(latents.w_enc_FD.shape)
    shapes = {"FD": rows, "_F": rows[:1]}
    for name, tensor in latents._asdict().items():
        if tensor is not None:
            expect(name, tensor, (torch.bfloat16,) if "copy" in name else single, shapes[name[-2:]])
    _check_moments(moments, rows, optimizer)
    if (seed is None) == (moments.m_enc_FD.dtype != torch.float32):
        raise ValueError("a seed is needed for moments in bfloat16 or 8 bits, and only for these")
    if seed is not None:
        expect("seed", seed, (torch.int32,), (1,))
    expect("b_D", b_D, single, rows[1:])
    expect("hyper", hyper, single, (len(Hyper),))
    if aux:
        expect("aux.slot_F", aux.slot_F, (torch.int32,), rows[:1])
        for name, tensor in (("aux.enc_SD", aux.enc_SD), ("aux.dec_SD", aux.dec_SD)):
            expect(name, tensor, single, (len(aux.b_S), rows[1]))


def _check_moments(moments: Moments, rows: tuple[int, ...], optimizer: str) -> None:
    """Refuse moments of different kinds, and those that the optimizer lacks or has not."""
    if (moments.v_enc_FD is None) == (optimizer == "adam"):
        raise ValueError("Adam needs the second moments, SGD has none")
    dtype = moments.m_enc_FD.dtype
    expect("m_enc_FD", moments.m_enc_FD, MOMENT_DTYPES, rows)
    in_8bit = dtype == torch.int8
    tensors, blocks = moments._asdict(), (rows[0], triton.cdiv(rows[1], BLOCK))
    for name in ("m_enc", "m_dec", "v_enc", "v_dec"):
        moment, scale = tensors[f"{name}_FD"], tensors[f"{name}_scale_FB"]
        if moment is not None:
            expect(f"{name}_FD", moment, (torch.uint8 if in_8bit and name[0] == "v" else dtype,), rows)
        if (scale is not None) != (in_8bit and moment is not None):
            raise ValueError(f"{name}_scale_FB goes with moments in 8 bits, and these need it")
        if scale is not None:
            expect(f"{name}_scale_FB", scale, (torch.float32,), blocks)
    for name in ("m_b_F", "v_b_F"):
        if tensors[name] is not None:
            expect(name, tensors[name], (torch.float32,), rows[:1])

"""One pass over the parameters: gradients of both rows of a latent, projection, optimizer, renorming.

One program per latent gathers the inputs and errors of its tokens, panel by panel, and steps its encoder
row, encoder bias and decoder row in place. Rows without pairs are stepped too: moments decay and weights
move on, as in torch.optim.

With gs the gradient scale and the sums over the latent's pairs (t, val, dval):

    g_enc = gs (Σ dval x_t − (Σ dval) b) + aux,   g_b = gs Σ dval + aux,
    g_dec = gs (Σ val e_t − (Σ val dot) w_dec) + aux.

The coefficient Σ val · dot is ⟨Σ val e, w_dec⟩ with the weights that `residual` gathered. If these are
bfloat16, about 5e-5 of the gradient's length stays parallel to the row; the renorming removes its effect.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saemill.train.kernels.arguments import INPUT_DTYPES, NUMERICS, expect
from saemill.train.kernels.hyper import Hyper
from saemill.train.kernels.segments import AuxGradients, LatentSums, Segments, chunk_sums, gather_rows

LR = tl.constexpr(int(Hyper.LR))
BETA1 = tl.constexpr(int(Hyper.BETA1))
BETA2 = tl.constexpr(int(Hyper.BETA2))
EPS = tl.constexpr(int(Hyper.EPS))
CORRECTION1 = tl.constexpr(int(Hyper.CORRECTION1))
CORRECTION2 = tl.constexpr(int(Hyper.CORRECTION2))
GRADIENT_SCALE = tl.constexpr(int(Hyper.GRADIENT_SCALE))
WEIGHT_DECAY = tl.constexpr(int(Hyper.WEIGHT_DECAY))
HEALTHY = tl.constexpr(int(Hyper.HEALTHY))
REST1 = tl.constexpr(int(Hyper.REST1))
REST2 = tl.constexpr(int(Hyper.REST2))

OPTIMIZERS = ("adam", "sgd")
MOMENT_DTYPES = (torch.float32, torch.bfloat16)


class Parameters(NamedTuple):
    """One variant's latents. Masters are float32; all are changed in place."""

    w_enc_FD: Tensor
    b_enc_F: Tensor
    w_dec_FD: Tensor
    """Rows of unit length."""
    copy_enc_FD: Tensor | None
    """bfloat16 copy for the encoder's product, written anew; None where float32 is multiplied."""
    copy_dec_FD: Tensor | None
    """bfloat16 copy for `residual`; None or not as `copy_enc_FD`."""


class Moments(NamedTuple):
    """The optimizer's state, zero at first; changed in place. With SGD m is the buffer and v None.

    Those of the rows are float32 or bfloat16, all alike; those of the bias float32.
    """

    m_enc_FD: Tensor
    m_b_F: Tensor
    m_dec_FD: Tensor
    v_enc_FD: Tensor | None
    v_b_F: Tensor | None
    v_dec_FD: Tensor | None


@triton.jit
def mixed(h):
    """A 32-bit hash (lowbias32, Wellons 2018)."""
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def store_rounded(ptrs, value, row_hash, column, mask):
    """Store float32, or bfloat16 rounded up with the probability of the part cut off.

    A second moment in bfloat16 would otherwise stop: 0.001 of it is less than half its last place.
    """
    if ptrs.dtype.element_ty == tl.bfloat16:
        random = mixed(row_hash + column.to(tl.uint32) * 0x9E3779B9) & 0xFFFF
        bits = value.to(tl.uint32, bitcast=True) + random
        tl.store(ptrs, (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(ptrs, value, mask=mask)


@triton.jit
def stepped(
    w,
    g,
    m_ptrs,
    v_ptrs,
    row_hash,
    column,
    mask,
    rates,
    ADAM: tl.constexpr,
):
    """The weights after torch.optim's Adam or SGD with momentum, without decay; moments in place."""
    lr, beta1, rest1, beta2, rest2, eps, correction1, correction2 = rates
    m = tl.load(m_ptrs, mask=mask, other=0.0).to(tl.float32)
    if ADAM:
        v = tl.load(v_ptrs, mask=mask, other=0.0).to(tl.float32)
        m = beta1 * m + rest1 * g
        v = beta2 * v + rest2 * g * g
        w -= (lr / correction1) * (m / (tl.sqrt_rn(v) / tl.sqrt_rn(correction2) + eps))
        store_rounded(v_ptrs, v, row_hash, column, mask)
    else:
        m = beta1 * m + g
        w -= lr * m
    tl.store(m_ptrs, m.to(m_ptrs.dtype.element_ty), mask=mask)
    return w


@triton.jit
def load_rates(hyper_ptr):
    """What `stepped` needs of the step's numbers."""
    lr, eps = tl.load(hyper_ptr + LR), tl.load(hyper_ptr + EPS)
    beta1, rest1 = tl.load(hyper_ptr + BETA1), tl.load(hyper_ptr + REST1)
    beta2, rest2 = tl.load(hyper_ptr + BETA2), tl.load(hyper_ptr + REST2)
    correction1, correction2 = tl.load(hyper_ptr + CORRECTION1), tl.load(hyper_ptr + CORRECTION2)
    return lr, beta1, rest1, beta2, rest2, eps, correction1, correction2


@triton.jit
def update_kernel(
    latents_ptr,
    starts_ptr,
    first_chunk_ptr,
    order_ptr,
    val_ptr,
    dot_ptr,
    x_ptr,
    e_ptr,
    b_ptr,
    partial_ptr,
    dval_ptr,
    along_ptr,
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
    slot_ptr,
    aux_enc_ptr,
    aux_dec_ptr,
    hyper_ptr,
    seed_ptr,
    K,
    D: tl.constexpr,
    PANEL: tl.constexpr,
    UNROLL: tl.constexpr,
    CHUNK: tl.constexpr,
    ADAM: tl.constexpr,
):
    """One program per latent, those with the most pairs first."""
    if tl.load(hyper_ptr + HEALTHY) == 0:
        return
    latent = tl.load(latents_ptr + tl.program_id(0))
    start = tl.load(starts_ptr + latent)
    end = tl.load(starts_ptr + latent + 1)
    rates = load_rates(hyper_ptr)
    shrink = 1 - tl.load(hyper_ptr + LR) * tl.load(hyper_ptr + WEIGHT_DECAY)
    scale = tl.load(hyper_ptr + GRADIENT_SCALE)

    lane = tl.zeros((1,), tl.int32)
    b_enc = stepped(
        tl.load(b_enc_ptr + latent + lane),
        tl.load(db_ptr + latent),
        m_b_ptr + latent + lane,
        v_b_ptr + latent + lane,
        lane,
        lane,
        lane == 0,
        rates,
        ADAM,
    )
    tl.store(b_enc_ptr + latent + lane, b_enc)

    dval = tl.load(dval_ptr + latent)
    along = tl.load(along_ptr + latent)
    n_chunks = 0
    if end - start > CHUNK:
        n_chunks = (end - start + CHUNK - 1) // CHUNK
        end = start
    slot = lane
    if slot_ptr is not None:
        slot = tl.load(slot_ptr + latent + lane)
    row_hash = tl.zeros((1,), tl.uint32)
    if seed_ptr is not None:
        row_hash += mixed(mixed(tl.load(seed_ptr).to(tl.uint32)) ^ latent.to(tl.uint32))
    squares = tl.zeros((PANEL,), tl.float32)
    for first in range(0, D, PANEL):
        column = first + tl.arange(0, PANEL)
        inside = column < D
        at = latent.to(tl.int64) * D + column
        g_enc, g_dec = gather_rows(
            order_ptr, val_ptr, dot_ptr, x_ptr, e_ptr, start, end, column, inside, K, D, PANEL, UNROLL
        )
        if n_chunks > 0:
            partial = partial_ptr + tl.load(first_chunk_ptr + latent).to(tl.int64) * (2 * D) + column
            for chunk in range(n_chunks):
                g_enc += tl.load(partial + chunk * (2 * D), mask=inside, other=0.0)
                g_dec += tl.load(partial + chunk * (2 * D) + D, mask=inside, other=0.0)
        aux_at = slot.to(tl.int64) * D + column
        has_aux = inside & (slot >= 0)

        # The encoder's row is done before the decoder's is read: fewer registers, more warps.
        w = tl.load(w_enc_ptr + at, mask=inside, other=0.0)
        g = scale * (g_enc - dval * tl.load(b_ptr + column, mask=inside, other=0.0))
        if slot_ptr is not None:
            g += tl.load(aux_enc_ptr + aux_at, mask=has_aux, other=0.0)
        w *= shrink
        w = stepped(w, g, m_enc_ptr + at, v_enc_ptr + at, row_hash, column, inside, rates, ADAM)
        tl.store(w_enc_ptr + at, w, mask=inside)
        if copy_enc_ptr is not None:
            tl.store(copy_enc_ptr + at, w.to(copy_enc_ptr.dtype.element_ty), mask=inside)

        w = tl.load(w_dec_ptr + at, mask=inside, other=0.0)
        g = scale * (g_dec - along * w)
        if slot_ptr is not None:
            g += tl.load(aux_dec_ptr + aux_at, mask=has_aux, other=0.0)
        w = stepped(w, g, m_dec_ptr + at, v_dec_ptr + at, row_hash ^ 0x5BD1E995, column, inside, rates, ADAM)
        tl.store(w_dec_ptr + at, w, mask=inside)
        squares += tl.where(inside, w * w, 0.0)

    inverse = 1.0 / tl.sqrt_rn(tl.sum(squares, 0))
    tl.debug_barrier()
    for first in range(0, D, PANEL):  # the row just written, still in cache
        column = first + tl.arange(0, PANEL)
        inside = column < D
        at = latent.to(tl.int64) * D + column
        w_dec = tl.load(w_dec_ptr + at, mask=inside, other=0.0) * inverse
        tl.store(w_dec_ptr + at, w_dec, mask=inside)
        if copy_dec_ptr is not None:
            tl.store(copy_dec_ptr + at, w_dec.to(copy_dec_ptr.dtype.element_ty), mask=inside)


def launch(d: int, chunk_pairs: int, optimizer: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The kernel's constants and its launch options: one warp, so that sums need no barrier."""
    panel = min(256, triton.next_power_of_2(d))
    constants = {"D": d, "PANEL": panel, "UNROLL": 4, "CHUNK": chunk_pairs, "ADAM": optimizer == "adam"}
    return constants, {"num_warps": 1, **NUMERICS}


def update_rows(
    parameters: Parameters,
    moments: Moments,
    x_TD: Tensor,
    e_TD: Tensor,
    val_TK: Tensor,
    dot_TK: Tensor,
    b_D: Tensor,
    pairs: Segments,
    sums: LatentSums,
    hyper: Tensor,
    *,
    optimizer: str,
    seed: Tensor | None = None,
    aux: AuxGradients | None = None,
) -> None:
    """One optimizer step of one variant's latents, in place; nothing where hyper's HEALTHY is 0.

    `adam` is torch.optim.AdamW on w_enc and torch.optim.Adam on b_enc and w_dec; `sgd` is
    torch.optim.SGD on all three, whose first buffer is the gradient (a zero buffer gives just that), with
    AdamW's decay of w_enc.
    Micro-batches are joined before: one call per step. The gradient of b needs w_enc as it was before
    (`decoder_bias_gradient`).

    Args:
        parameters, moments: changed in place.
        x_TD: the batch in training units, float32, bfloat16 or float16.
        e_TD: of `residual`.
        val_TK, dot_TK: float32, of `select` and `residual`.
        b_D: float32, b_dec in the units of `x_TD`, as it was in the forward pass.
        pairs, sums: of the same batch; `sums` with the same `aux`.
        hyper: float32 [len(Hyper)], on the device.
        optimizer: "adam" or "sgd".
        seed: int32 [1] on the device, another for every step; for Adam's v in bfloat16, and only there.
        aux: gradients to add to some latents' rows.

    Raises:
        TypeError: another dtype.
        ValueError: shapes that do not agree, a tensor with gaps, an unknown optimizer, or state that
            does not go with it.
    """
    _check(parameters, moments, b_D, hyper, optimizer, seed, aux)
    n_latents, d = parameters.w_enc_FD.shape
    expect("x_TD", x_TD, INPUT_DTYPES, (len(x_TD), d))
    partial = chunk_sums(pairs, val_TK, dot_TK, x_TD, e_TD)
    constants, options = launch(d, pairs.chunk_pairs, optimizer)
    if optimizer == "sgd":  # never reads v: any pointer will do
        moments = moments._replace(v_enc_FD=moments.m_enc_FD, v_b_F=moments.m_b_F, v_dec_FD=moments.m_dec_FD)
    extra = (aux.slot_F, aux.enc_SD, aux.dec_SD) if aux else (None, None, None)
    with torch.cuda.device_of(x_TD):
        update_kernel[(n_latents,)](
            *(pairs.latents_F, pairs.starts, pairs.first_chunk_F, pairs.order_P),
            *(val_TK, dot_TK, x_TD, e_TD, b_D, partial, sums.dval_F, sums.along_F, sums.db_enc_F),
            *parameters,
            *moments,
            *extra,
            *(hyper, seed, pairs.k),
            **constants,
            **options,
        )


def _check(
    parameters: Parameters,
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
    single, rows = (torch.float32,), tuple(parameters.w_enc_FD.shape)
    shapes = {"FD": rows, "_F": rows[:1]}
    for name, tensor in parameters._asdict().items():
        if tensor is not None:
            expect(name, tensor, (torch.bfloat16,) if "copy" in name else single, shapes[name[-2:]])
    if (moments.v_enc_FD is None) == (optimizer == "adam"):
        raise ValueError("Adam needs the second moments, SGD has none")
    for name, tensor in moments._asdict().items():
        if tensor is not None:
            expect(name, tensor, MOMENT_DTYPES if name.endswith("FD") else single, shapes[name[-2:]])
    if (seed is None) == (moments.v_enc_FD is not None and moments.v_enc_FD.dtype == torch.bfloat16):
        raise ValueError("a seed is needed for second moments in bfloat16, and only for these")
    if seed is not None:
        expect("seed", seed, (torch.int32,), (1,))
    expect("b_D", b_D, single, rows[1:])
    expect("hyper", hyper, single, (len(Hyper),))
    if aux:
        expect("aux.slot_F", aux.slot_F, (torch.int32,), rows[:1])
        for name, tensor in (("aux.enc_SD", aux.enc_SD), ("aux.dec_SD", aux.dec_SD)):
            expect(name, tensor, single, (len(aux.b_S), rows[1]))


def decoder_bias_gradient(
    e_TD: Tensor, db_enc_F: Tensor, w_enc_FD: Tensor, hyper: Tensor, n_shards: int = 1
) -> Tensor:
    """gs · Σ_t e / n − db_enc · W_enc: the gradient of b, which the encoder's input has subtracted.

    To be called before `update_rows`, which overwrites `w_enc_FD`.

    Args:
        e_TD: of `residual`.
        db_enc_F: of `latent_sums`, AuxK's part included.
        w_enc_FD: float32.
        hyper: float32 [len(Hyper)].
        n_shards: n processes hold parts of the latents; their results add up to the gradient.

    Returns: float32 [D].
    """
    per_shard = hyper[Hyper.GRADIENT_SCALE] / n_shards
    return per_shard * e_TD.sum(0, dtype=torch.float32) - db_enc_F @ w_enc_FD

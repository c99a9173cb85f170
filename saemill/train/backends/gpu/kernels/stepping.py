"""The optimizer's step of some weights of one row, and how moments are read and written.

Moments shorter than float32 are rounded up or down at random, as in `moments`: a second moment would
otherwise stop, since 0.001 of it is less than half its last place. The random bits are a hash of the
step, the row, the column and the matrix, so they do not depend on how the rows are dealt to programs.
"""

import triton
import triton.language as tl

from saemill.train.backends.gpu.kernels.hyper import Hyper
from saemill.train.optim.moments import FIRST, SECOND

LR = tl.constexpr(int(Hyper.LR))
BETA1 = tl.constexpr(int(Hyper.BETA1))
BETA2 = tl.constexpr(int(Hyper.BETA2))
EPS = tl.constexpr(int(Hyper.EPS))
CORRECTION1 = tl.constexpr(int(Hyper.CORRECTION1))
CORRECTION2 = tl.constexpr(int(Hyper.CORRECTION2))
REST1 = tl.constexpr(int(Hyper.REST1))
REST2 = tl.constexpr(int(Hyper.REST2))

N1, N2 = tl.constexpr(FIRST.n), tl.constexpr(SECOND.n)
PER_OCTAVE1, PER_OCTAVE2 = tl.constexpr(FIRST.n / FIRST.octaves), tl.constexpr(SECOND.n / SECOND.octaves)
LEAST1, LEAST2 = tl.constexpr(FIRST.least), tl.constexpr(SECOND.least)
SMALLEST = tl.constexpr(2.0**-126)
"""The smallest normal float32; the logarithm of anything smaller is replaced by its logarithm."""


@triton.jit
def mixed(h):
    """Hash 32 bits (lowbias32, Wellons 2018)."""
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def random_bits(row_hash, column, SECOND: tl.constexpr):
    """Draw 16 random bits per column; others for the second moment than for the first."""
    h = mixed(row_hash + column.to(tl.uint32) * 0x9E3779B9)
    return h >> 16 if SECOND else h & 0xFFFF


@triton.jit
def load_moment(ptrs, scale_ptr, block, mask, SECOND: tl.constexpr):
    """Load a moment in float32; 8-bit codes as in `EightBitMoment`, with one scale for all lanes."""
    moment = tl.load(ptrs, mask=mask, other=0).to(tl.float32)
    if scale_ptr is not None:
        N: tl.constexpr = N2 if SECOND else N1
        PER_OCTAVE: tl.constexpr = PER_OCTAVE2 if SECOND else PER_OCTAVE1
        magnitude = tl.exp2((tl.abs(moment) - N) * (1.0 / PER_OCTAVE) + tl.load(scale_ptr + block))
        moment = tl.where(moment == 0, 0.0, tl.where(moment < 0, -magnitude, magnitude))
    return moment


@triton.jit
def store_moment(ptrs, scale_ptr, block, moment, row_hash, column, mask, SECOND: tl.constexpr):
    """Store a moment in float32, bfloat16 or 8 bits, the latter two randomly rounded. Masked lanes must be
    0."""
    if scale_ptr is not None:
        N: tl.constexpr = N2 if SECOND else N1
        PER_OCTAVE: tl.constexpr = PER_OCTAVE2 if SECOND else PER_OCTAVE1
        LEAST: tl.constexpr = LEAST2 if SECOND else LEAST1
        log2 = tl.log2(tl.maximum(tl.abs(moment), SMALLEST))
        scale = tl.max(log2, 0)
        up = random_bits(row_hash, column, SECOND).to(tl.float32) * 2.0**-16
        code = tl.floor((log2 - scale) * PER_OCTAVE + N + up)
        code = tl.minimum(tl.maximum(code, LEAST), N)
        code = tl.where(moment == 0, 0.0, tl.where(moment < 0, -code, code))
        tl.store(ptrs, code.to(ptrs.dtype.element_ty), mask=mask)
        tl.store(scale_ptr + block, scale)
    elif ptrs.dtype.element_ty == tl.bfloat16:
        bits = moment.to(tl.uint32, bitcast=True) + random_bits(row_hash, column, SECOND)
        tl.store(ptrs, (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(ptrs, moment, mask=mask)


@triton.jit
def stepped(w, g, m_ptrs, v_ptrs, m_scale_ptr, v_scale_ptr, row_hash, lanes, rates, ADAM: tl.constexpr):
    """Step weights by torch.optim's Adam or SGD with momentum, without decay; moments in place.

    `lanes` are their columns, which of them there are, and the place of their scales. `w` and `g` must be 0
    in the others.
    """
    column, mask, block = lanes
    lr, beta1, rest1, beta2, rest2, eps, correction1, correction2 = rates
    m = load_moment(m_ptrs, m_scale_ptr, block, mask, False)
    if ADAM:
        v = load_moment(v_ptrs, v_scale_ptr, block, mask, True)
        m = beta1 * m + rest1 * g
        v = beta2 * v + rest2 * g * g
        w -= (lr / correction1) * (m / (tl.sqrt_rn(v) / tl.sqrt_rn(correction2) + eps))
        store_moment(v_ptrs, v_scale_ptr, block, v, row_hash, column, mask, True)
    else:
        m = beta1 * m + g
        w -= lr * m
    store_moment(m_ptrs, m_scale_ptr, block, m, row_hash, column, mask, False)
    return w


@triton.jit
def load_rates(hyper_ptr):
    """Load what `stepped` needs of the step's numbers."""
    lr, eps = tl.load(hyper_ptr + LR), tl.load(hyper_ptr + EPS)
    beta1, rest1 = tl.load(hyper_ptr + BETA1), tl.load(hyper_ptr + REST1)
    beta2, rest2 = tl.load(hyper_ptr + BETA2), tl.load(hyper_ptr + REST2)
    correction1, correction2 = tl.load(hyper_ptr + CORRECTION1), tl.load(hyper_ptr + CORRECTION2)
    return lr, beta1, rest1, beta2, rest2, eps, correction1, correction2

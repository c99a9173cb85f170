"""The optimizer's step of some weights of one row, and how moments are read and written.

Moments shorter than float32 are rounded up or down at random, as in `moments`: a second moment would
otherwise stop, since 0.001 of it is less than half its last place. The random bits are a hash of the
step, the row, the column and the matrix, so they do not depend on how the rows are dealt to programs.
"""

import triton
import triton.language as tl

from saemill.train.kernels.hyper import Hyper

LR = tl.constexpr(int(Hyper.LR))
BETA1 = tl.constexpr(int(Hyper.BETA1))
BETA2 = tl.constexpr(int(Hyper.BETA2))
EPS = tl.constexpr(int(Hyper.EPS))
CORRECTION1 = tl.constexpr(int(Hyper.CORRECTION1))
CORRECTION2 = tl.constexpr(int(Hyper.CORRECTION2))
REST1 = tl.constexpr(int(Hyper.REST1))
REST2 = tl.constexpr(int(Hyper.REST2))


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
    """Store float32, or bfloat16 rounded up with the probability of the part cut off."""
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

"""The GPU's kernel that updates latents' rows, against dense autograd and torch.optim."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

import triton
import triton.language as tl
from kernel_inputs import (
    BF16,
    DEVICE,
    F32,
    dense_codes,
    distinct,
    hyper,
    largest,
    randn,
    random_pairs,
    unit_rows,
)

from saemill.train.backends.gpu.kernels.hyper import Hyper, hyper_values
from saemill.train.backends.gpu.kernels.residual import residual
from saemill.train.backends.gpu.kernels.rows import Latents, Moments, update_rows
from saemill.train.backends.gpu.kernels.segments import (
    AuxGradients,
    Terms,
    latent_sums,
    segments,
)
from saemill.train.backends.gpu.kernels.stepping import load_moment
from saemill.train.optim.moments import EightBitMoment

pytestmark = [pytest.mark.no_cover, pytest.mark.usefixtures("seeded")]  # slow enough without being traced


class Trained:
    """One variant stepped by the kernels, and the same by dense autograd and torch.optim.

    Both take their gradients at the kernels' weights, so that differences do not grow through the choice
    of latents.
    """

    def __init__(self, f: int, d: int, k: int, dtype: torch.dtype, optimizer: str, chunk: int) -> None:
        self.k, self.dtype, self.optimizer, self.chunk = k, dtype, optimizer, chunk
        w_dec, w_enc = unit_rows(f, d), unit_rows(f, d)
        b_enc = randn(f) * 0.1
        b_enc[f // 2], b_enc[-f // 4 :] = 9, -9  # one latent takes every token, some never fire
        self.b = randn(d) * 0.3
        copies = (w_enc.to(BF16), w_dec.to(BF16)) if dtype == BF16 else (None, None)
        self.mine = Latents(w_enc, b_enc, w_dec, *copies)
        self.moments = zero_moments(self.mine, optimizer, F32)
        leaves = [torch.nn.Parameter(p.clone()) for p in (w_enc, b_enc, w_dec)]
        self.leaves = leaves
        if optimizer == "adam":
            self.torch: torch.optim.Optimizer = torch.optim.Adam(leaves, lr=0.01, eps=1e-8)
        else:
            self.torch = torch.optim.SGD(leaves, lr=0.01, momentum=0.9)

    def weights(self) -> tuple[Tensor, Tensor]:
        """The weights that the forward pass multiplies with."""
        enc, dec = self.mine.copy_enc_FD, self.mine.copy_dec_FD
        return (self.mine.w_enc_FD, self.mine.w_dec_FD) if enc is None or dec is None else (enc, dec)

    def step(self, number: int, aux: AuxGradients | None) -> None:
        x = randn(24, len(self.b), dtype=self.dtype)
        enc, dec = (w.double().requires_grad_() for w in self.weights())
        b_enc, b = self.mine.b_enc_F.double().requires_grad_(), self.b.double()
        pre = (x.double() - b) @ enc.T + b_enc
        val, idx = largest(pre.detach(), self.k)
        e, dot, _ = residual(val, idx, self.weights()[1], self.b, x)
        pairs = segments(idx, len(b_enc), self.chunk)
        now = hyper(number)
        dpre = 0.37 * dot * (val > 0)
        sums = latent_sums(val, dot, dpre, pairs, now, aux)
        mask = dense_codes(idx, torch.ones_like(val), len(b_enc))
        (torch.relu(pre * mask) @ dec + b).backward(0.37 * e.double())
        self.reference_step((enc, b_enc, dec), aux)
        update_rows(
            *(self.mine, self.moments, Terms(x, e, val, dpre), self.b, pairs, sums, now),
            optimizer=self.optimizer,
            aux=aux,
        )

    def reference_step(self, used: tuple[Tensor, Tensor, Tensor], aux: AuxGradients | None) -> None:
        """Projection, torch's optimizer and renorming, from autograd's gradients."""
        enc, b_enc, dec = (leaf.grad for leaf in used)
        assert enc is not None
        assert b_enc is not None
        assert dec is not None
        dec = dec - (dec * used[2].detach()).sum(1, keepdim=True) * self.leaves[2].double()
        if aux is not None:
            place = aux.slot_F.long()
            for grad, extra in ((enc, aux.enc_SD), (b_enc, aux.b_S), (dec, aux.dec_SD)):
                grad[place >= 0] += extra[place[place >= 0]]
        for leaf, grad in zip(self.leaves, (enc, b_enc, dec), strict=True):
            leaf.grad = grad.float()
        self.leaves[0].data *= 1 - 0.01 * 0.02
        self.torch.step()
        self.leaves[2].data /= self.leaves[2].data.norm(dim=1, keepdim=True)

    def compare(self) -> None:
        for mine, leaf in zip(self.mine[:3], self.leaves, strict=True):
            torch.testing.assert_close(mine, leaf.data, rtol=1e-5, atol=5e-6)
        lengths = self.mine.w_dec_FD.norm(dim=1)
        torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=1e-6, atol=0)
        states = [self.torch.state[leaf] for leaf in self.leaves]
        names = ("exp_avg", "exp_avg_sq") if self.optimizer == "adam" else ("momentum_buffer",)
        theirs = [state[name] for name in names for state in states]
        for mine, expected in zip([m for m in self.moments if m is not None], theirs, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max() + 1))
        for copy, master in zip(self.mine[3:], (self.mine.w_enc_FD, self.mine.w_dec_FD), strict=True):
            if copy is not None:
                torch.testing.assert_close(copy.float(), master, rtol=2**-7, atol=0)


def zero_moments(parameters: Latents, optimizer: str, dtype: torch.dtype) -> Moments:
    def zeros() -> tuple[Tensor, Tensor, Tensor]:
        enc, b, dec = (torch.zeros_like(p) for p in parameters[:3])
        return enc.to(dtype), b, dec.to(dtype)

    return Moments(*zeros(), *(zeros() if optimizer == "adam" else (None, None, None)))


@pytest.mark.parametrize(
    ("f", "d", "k", "dtype", "optimizer", "chunk", "with_aux"),
    [
        (60, 40, 5, BF16, "adam", 256, False),
        (30, 96, 5, F32, "adam", 16, False),
        (16, 130, 1, BF16, "adam", 5, True),
        (12, 300, 4, BF16, "sgd", 16, False),
        (34, 40, 32, F32, "sgd", 256, True),
        (12, 300, 4, BF16, "adam", 16, True),
        (9, 600, 3, F32, "sgd", 16, True),
    ],
)
def test_three_steps_equal_torch(
    f: int, d: int, k: int, dtype: torch.dtype, optimizer: str, chunk: int, with_aux: bool
) -> None:
    """Oracle: dense float64 autograd from the stored error, projection, torch.optim and renorming."""
    trained = Trained(f, d, k, dtype, optimizer, chunk)
    aux = None
    if with_aux:
        slot = torch.full((f,), -1, dtype=torch.int32)
        slot[[f - 1, 2, f - 3]] = torch.tensor([0, 1, 2], dtype=torch.int32)
        aux = AuxGradients(slot.to(DEVICE), randn(3, d), randn(3), randn(3, d))
    for number in (1, 2, 3):
        trained.step(number, aux)
    trained.compare()


def start_moment(f: int, d: int, dtype: torch.dtype, signed: bool, coarse: bool) -> list[Tensor]:
    """A moment and, in 8 bits, its scales; with numbers that bfloat16 or, if coarse, 8 bits can hold."""
    value = randn(f, d, dtype=BF16)
    value = value if signed else value.square()
    if not coarse:
        return [value.to(dtype)]
    moment = EightBitMoment(value.float(), signed)
    moment.write(slice(0, f), value.float(), 1)
    return moment.tensors() if dtype == torch.int8 else [moment.read(slice(0, f)).to(dtype)]


def one_update(
    moments_dtype: torch.dtype,
    seed: int | None,
    d: int = 300,
    with_aux: bool = False,
    coarse: bool = False,
    **changes: Any,
) -> list[Tensor]:
    """A step from a given state over given pairs; all that it may change. Nothing is left to chance."""
    torch.manual_seed(5)
    f, k, n_tokens = 12, 3, 24
    idx, val, dot = random_pairs(n_tokens, f, k, hot=4)
    x, e = randn(n_tokens, d, dtype=BF16), randn(n_tokens, d, dtype=BF16)
    w_enc, b_enc, w_dec = randn(f, d), randn(f), unit_rows(f, d)
    parameters = Latents(w_enc, b_enc, w_dec, w_enc.to(BF16), w_dec.to(BF16))
    rows = [start_moment(f, d, moments_dtype, signed, coarse) for signed in (True, True, False, False)]
    m_enc, m_dec, v_enc, v_dec = (tensors[0] for tensors in rows)
    scales = [tensors[1] for tensors in rows if len(tensors) > 1]
    moments = Moments(m_enc, randn(f), m_dec, v_enc, randn(f).square(), v_dec, *scales)
    pairs, now = segments(idx, f, 8), hyper(7, **changes)
    aux = None
    if with_aux:
        slot = torch.arange(-9, f - 9, dtype=torch.int32).clamp(min=-1).to(DEVICE)
        aux = AuxGradients(slot, randn(3, d), randn(3), randn(3, d))
    dpre = 0.37 * dot * (val > 0)
    sums = latent_sums(val, dot, dpre, pairs, now, aux)
    place = None if seed is None else torch.tensor([seed], dtype=torch.int32, device=DEVICE)
    inputs = (Terms(x, e, val, dpre), randn(d), pairs, sums, now)
    update_rows(parameters, moments, *inputs, optimizer="adam", seed=place, aux=aux)
    return [tensor for tensor in (*parameters, *moments) if tensor is not None]


def test_update_repeats_bit_by_bit() -> None:
    """Oracle: the same step again, with a hot latent and stochastic rounding."""
    for first, second in zip(one_update(BF16, 3), one_update(BF16, 3), strict=True):
        assert torch.equal(first, second)


def test_rounded_moments_change_only_what_is_stored() -> None:
    """Oracle: the step in float32 from the same state. A moment takes one of its two neighbours, by a fair
    draw that differs between the moments and between rows."""
    single, rounded, other = one_update(F32, None), one_update(BF16, 3), one_update(BF16, 4)
    for mine, expected in zip(rounded[:3], single[:3], strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-7)
    up = []
    for place in (5, 7, 8, 10):
        exact = single[place]
        below = (exact.view(torch.int32) & ~0xFFFF).view(F32)
        last_place = ((exact.view(torch.int32) & ~0xFFFF) + 0x10000).view(F32) - below
        steps = (rounded[place].float() - below) / last_place
        assert bool(((steps == 0) | (steps == 1)).all())
        assert abs(float((steps - (exact - below) / last_place).mean())) < 0.03
        assert not torch.equal(rounded[place], other[place])
        up.append(steps - (exact - below) / last_place)
    for first, second in itertools.combinations(up, 2):
        assert abs(float((first * second).mean())) < 0.02
    assert abs(float((up[0][:6] * up[0][6:]).mean())) < 0.03


@triton.jit
def decode_kernel(code_ptr, scale_ptr, out_ptr, SECOND: tl.constexpr):
    row, lane = tl.program_id(0), tl.arange(0, 256)
    at = row * 256 + lane
    tl.store(out_ptr + at, load_moment(code_ptr + at, scale_ptr, row, lane < 256, SECOND))


@pytest.mark.parametrize("signed", [True, False])
def test_every_8_bit_code_is_read_as_in_torch(signed: bool) -> None:
    """Oracle: `EightBitMoment.read`."""
    moment = EightBitMoment(randn(4, 256), signed)
    codes = torch.arange(256, device=DEVICE) - 128 * signed
    moment.code.copy_(codes.clamp(min=-127))
    moment.log2_scale.copy_(torch.tensor([-90.3, -7.1, 0.0, 30.7])[:, None])
    found = torch.empty(4, 256, device=DEVICE)
    decode_kernel[(4,)](moment.code, moment.log2_scale, found, SECOND=not signed)
    torch.testing.assert_close(found, moment.read(slice(0, 4)), rtol=2e-5, atol=0)


def test_8_bit_moments_change_only_what_is_stored() -> None:
    """Oracle: the step in float32 from the same state. A moment takes one of its two neighbouring codes,
    by a fair draw in the logarithm that differs between matrices and between rows."""
    single = one_update(F32, None, coarse=True)
    short, other = (one_update(torch.int8, seed, coarse=True) for seed in (3, 4))
    for mine, expected in zip(short[:3], single[:3], strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)
    draws = []
    for place, scale, signed in ((5, 11, True), (7, 12, True), (8, 13, False), (10, 14, False)):
        exact, code = single[place], short[place].float()
        codes = EightBitMoment(exact, signed).codes
        log2 = exact.abs().log2()
        largest = torch.stack((log2[:, :256].amax(1), log2[:, 256:].amax(1)), 1)
        torch.testing.assert_close(short[scale], largest, rtol=1e-5, atol=1e-5)
        wanted = (log2 - largest.repeat_interleave(256, 1)[:, :300]) * (codes.n / codes.octaves) + codes.n
        assert bool((code.sign() == exact.sign())[wanted > 1].all())
        draw = torch.where(wanted > 1, code.abs() - wanted, 0)
        assert float(draw.abs().max()) < 1.001
        assert abs(float(draw.mean())) < 0.03
        up = torch.where(wanted > 1, wanted - wanted.floor(), 0)
        assert float((draw.square() - up * (1 - up)).mean().abs()) < 0.01
        assert not torch.equal(short[place], other[place])
        draws.append(draw)
    for first, second in itertools.combinations(draws, 2):
        assert abs(float((first * second).mean())) < 0.02
    assert abs(float((draws[0][:6] * draws[0][6:]).mean())) < 0.02


def test_a_diverged_variant_is_left_as_it_was() -> None:
    """Oracle: the same state, where a step would change all of it."""
    before = one_update(F32, None, healthy=0.0, lr=0.5)
    again = one_update(F32, None, healthy=0.0, lr=float("nan"))
    for first, second in zip(before, again, strict=True):
        assert torch.equal(first, second)
    assert torch.equal(before[2].to(BF16), before[4])
    changed = one_update(F32, None)
    assert not any(torch.equal(a, b) for a, b in zip(before, changed, strict=True))


def test_update_refuses_state_that_does_not_fit() -> None:
    """Oracle: the sentences."""
    parameters = Latents(randn(4, 8), randn(4), unit_rows(4, 8), None, None)
    idx, val, dot = distinct(3, 4, 2), torch.rand(3, 2), randn(3, 2)
    pairs, x = segments(idx, 4), randn(3, 8)
    sums = latent_sums(val, dot, dot, pairs, hyper())

    def update(moments: Moments, optimizer: str, seed: Tensor | None = None) -> None:
        inputs = (Terms(x, x, val, dot), randn(8), pairs, sums, hyper())
        update_rows(parameters, moments, *inputs, optimizer=optimizer, seed=seed)

    adam, sgd = zero_moments(parameters, "adam", F32), zero_moments(parameters, "sgd", F32)
    with pytest.raises(ValueError, match="optimizer must be one of adam, sgd, got 'lion'"):
        update(adam, "lion")
    with pytest.raises(ValueError, match="Adam needs the second moments"):
        update(sgd, "adam")
    with pytest.raises(ValueError, match="Adam needs the second moments"):
        update(adam, "sgd")
    with pytest.raises(ValueError, match="a seed is needed"):
        update(zero_moments(parameters, "adam", BF16), "adam")
    with pytest.raises(ValueError, match="a seed is needed"):
        update(adam, "adam", torch.zeros(1, dtype=torch.int32))
    with pytest.raises(TypeError, match="m_enc_FD must be float32 or bfloat16"):
        update(adam._replace(m_enc_FD=adam.m_enc_FD.half()), "adam")
    with pytest.raises(TypeError, match="v_dec_FD must be float32, got"):
        update(adam._replace(v_dec_FD=adam.v_dec_FD.bfloat16()), "adam")
    with pytest.raises(ValueError, match="m_dec_scale_FB goes with moments in 8 bits"):
        update(adam._replace(m_dec_scale_FB=randn(4, 1)), "adam")


def test_hyper_is_computed_in_doubles() -> None:
    """Oracle: torch's bias corrections; 1 − 0.999 keeps all its digits."""
    values = hyper_values(lr=0.1, step=1, gradient_scale=2.0)
    assert len(values) == len(Hyper)
    assert values[Hyper.REST2] == values[Hyper.CORRECTION2] == pytest.approx(0.001, rel=1e-12)
    with pytest.raises(ValueError, match="counts from 1"):
        hyper_values(lr=0.1, step=0, gradient_scale=2.0)

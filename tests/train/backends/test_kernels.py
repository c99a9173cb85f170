"""The GPU's kernels against torch: compiled where CUDA is present, else in Triton's interpreter.

The interpreter cuts bfloat16 off where compiled code rounds, so stored values may differ by one last place.
"""

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

import triton
import triton.language as tl

from saemill.train.backends.gpu.kernels.hyper import Hyper, hyper_values
from saemill.train.backends.gpu.kernels.residual import residual
from saemill.train.backends.gpu.kernels.rows import Latents, Moments, decoder_bias_gradient, update_rows
from saemill.train.backends.gpu.kernels.segments import (
    AuxGradients,
    Segments,
    chunk_sums,
    latent_sums,
    segments,
)
from saemill.train.backends.gpu.kernels.select import select
from saemill.train.backends.gpu.kernels.stepping import load_moment
from saemill.train.optim.moments import EightBitMoment

pytestmark = pytest.mark.no_cover  # the interpreter is slow enough without being traced
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape).to(dtype).to(DEVICE)


def unit_rows(f: int, d: int) -> Tensor:
    return torch.nn.functional.normalize(randn(f, d), dim=1)


def distinct(n_tokens: int, f: int, k: int, hot: int = -1) -> Tensor:
    """k ascending latents per token; `hot` is among them wherever given. int32."""
    weight = torch.rand(n_tokens, f)
    if hot >= 0:
        weight[:, hot] = 2
    return weight.topk(k).indices.sort(1).values.int().to(DEVICE)


def largest(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Oracle: a stable descending sort, which puts NaN first and the lower index of a tie first."""
    index = torch.sort(pre.float(), dim=1, descending=True, stable=True).indices[:, :k].sort(1).values
    return pre.float().gather(1, index).relu(), index.int()


def assert_selects(pre: Tensor, k: int) -> None:
    val, idx = select(pre, k)
    expected_val, expected_idx = largest(pre, k)
    assert torch.equal(idx, expected_idx)
    torch.testing.assert_close(val, expected_val, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(("f", "k"), [(100, 5), (257, 32), (1000, 32), (1000, 1), (40, 40)])
def test_select_is_exact(f: int, k: int, dtype: torch.dtype) -> None:
    """Oracle: a stable sort of each row; indices and values equal."""
    pre = randn(7, f)
    pre[0] = -pre[0].abs()
    pre[1] = pre[1].round()
    pre[2] = torch.where(pre[2] > 0, 0.0, -0.0)
    pre[3] = 1.5
    pre[4, f // 2 :: 7] = float("-inf")
    pre[5, f - 1] = float("inf")
    assert_selects(pre.to(dtype), k)


@pytest.mark.parametrize(("f", "k", "dtype"), [(70_000, 3, BF16), (33_000, 40, F32)])
def test_select_reads_long_rows_in_slabs(f: int, k: int, dtype: torch.dtype) -> None:
    """Oracle: a stable sort; a tie for the last place spans the slabs."""
    pre = randn(2, f)
    pre[1] = 0
    pre[1, [f - 1, f // 2]] = 1
    assert_selects(pre.to(dtype), k)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_select_orders_every_bit_pattern(dtype: torch.dtype) -> None:
    """Oracle: a stable sort; subnormals, infinities, and NaN of either sign, which rank highest."""
    kind = torch.int32 if dtype == F32 else torch.int16
    info = torch.iinfo(kind)
    bits = torch.randint(info.min, info.max + 1, (3, 300)).to(kind)
    infinity = int(torch.tensor(float("inf"), dtype=dtype).view(kind))
    bits[2] = infinity + 1 + torch.arange(300) % 100
    bits[2, ::3] += info.min
    assert_selects(bits.view(dtype).to(DEVICE), 40)


def test_select_refuses_what_it_cannot_do() -> None:
    """Oracle: the sentences."""
    with pytest.raises(ValueError, match="k must be 1 to 8"):
        select(randn(2, 8), 9)
    with pytest.raises(TypeError, match="pre_TF must be float32 or bfloat16 or float16, got"):
        select(randn(2, 8).double(), 2)
    with pytest.raises(ValueError, match="contiguous"):
        select(randn(8, 2).T, 2)
    with pytest.raises(ValueError, match=r"use torch\.topk"):
        select(randn(1, 131072), 4096)


@pytest.mark.parametrize(
    ("d", "f", "k", "dtype"),
    [(40, 100, 1, BF16), (96, 257, 5, F16), (130, 1000, 32, BF16), (300, 64, 7, F32)],
)
def test_residual_equals_dense_decoding(d: int, f: int, k: int, dtype: torch.dtype) -> None:
    """Oracle: float64 sums over gathered rows; `dot` from the stored error."""
    n_tokens = 9
    idx, val = distinct(n_tokens, f, k), torch.rand(n_tokens, k, device=DEVICE)
    val[0] = 0
    w, b, x = unit_rows(f, d).to(dtype), randn(d), randn(n_tokens, d, dtype=dtype)
    e, dot, sse = residual(val, idx, w, b, x)
    rows = w.double()[idx.long()]
    expected = torch.einsum("tk,tkd->td", val.double(), rows) + b - x.double()
    assert e.dtype == dtype
    ulp = torch.finfo(dtype).eps if dtype != F32 else 1e-5
    torch.testing.assert_close(e.double(), expected, rtol=ulp, atol=1e-6)
    expected_dot = torch.einsum("td,tkd->tk", e.double(), rows)
    torch.testing.assert_close(dot.double(), expected_dot, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sse.double(), expected.square().sum(1), rtol=1e-5, atol=0)


def test_residual_refuses_what_does_not_fit() -> None:
    """Oracle: the sentences."""
    val, idx, w, b, x = torch.rand(3, 2), distinct(3, 8, 2), unit_rows(8, 4), randn(4), randn(3, 4)
    with pytest.raises(TypeError, match="idx_TK must be int32"):
        residual(val, idx.long(), w, b, x)
    with pytest.raises(ValueError, match=r"w_dec_FD must have shape \[8, 4\], got \[8, 5\]"):
        residual(val, idx, unit_rows(8, 5), b, x)
    with pytest.raises(ValueError, match="k must be 1 to 512"):
        residual(torch.rand(3, 513), idx, w, b, x)


def chunk_ranges(pairs: Segments) -> dict[int, list[int]]:
    """The places in `order_P` that each hot latent's chunks cover, as the kernels compute them."""
    covered: dict[int, list[int]] = {}
    for chunk in range(int(pairs.n_chunks)):
        latent = int(pairs.chunk_latent_C[chunk])
        start = int(pairs.starts[latent]) + (chunk - int(pairs.first_chunk_F[latent])) * pairs.chunk_pairs
        end = min(start + pairs.chunk_pairs, int(pairs.starts[latent + 1]))
        assert start < end
        covered.setdefault(latent, []).extend(range(start, end))
    return covered


@pytest.mark.parametrize(("n_tokens", "f", "k", "chunk"), [(30, 40, 3, 4), (50, 9, 5, 7), (1, 100, 1, 256)])
def test_segments_hold_each_pair_once(n_tokens: int, f: int, k: int, chunk: int) -> None:
    """Oracle: pairs collected per latent in Python, in the order of their numbers."""
    idx = distinct(n_tokens, f, k, hot=f // 2)
    pairs = segments(idx, f, chunk)
    flat = idx.flatten().tolist()
    counts = [flat.count(latent) for latent in range(f)]
    for latent in range(f):
        start, end = pairs.starts[latent : latent + 2].tolist()
        assert pairs.order_P[start:end].tolist() == [p for p, at in enumerate(flat) if at == latent]
    assert [counts[latent] for latent in pairs.latents_F.tolist()] == sorted(counts, reverse=True)
    covered = chunk_ranges(pairs)
    hot = {latent for latent in range(f) if counts[latent] > chunk}
    assert set(covered) == hot
    for latent, places in covered.items():
        assert places == list(range(int(pairs.starts[latent]), int(pairs.starts[latent + 1])))
    assert all(tensor.dtype == torch.int32 for tensor in pairs if isinstance(tensor, Tensor))


@pytest.mark.parametrize("chunk", [1, 2, 16])
def test_chunk_table_holds_the_worst_case(chunk: int) -> None:
    """Oracle: latents with one pair more than a chunk each, which need the most chunks per pair."""
    idx = torch.arange(6, dtype=torch.int32).repeat_interleave(chunk + 1)[:, None].to(DEVICE)
    pairs = segments(idx, 6, chunk)
    assert int(pairs.n_chunks) == 12 == len(pairs.chunk_latent_C)
    assert sum(map(len, chunk_ranges(pairs).values())) == len(idx)


def test_segments_refuse_int64() -> None:
    """Oracle: the sentence."""
    with pytest.raises(TypeError, match="idx_TK must be int32"):
        segments(distinct(2, 4, 1).long(), 4)


def hyper(step: int = 1, **changes: Any) -> Tensor:
    settings = {"lr": 0.01, "gradient_scale": 0.37, "weight_decay": 0.02} | changes
    return torch.tensor(hyper_values(step=step, **settings), device=DEVICE)


def random_pairs(n_tokens: int, f: int, k: int, hot: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices among the first two thirds of the latents, values with zeros, dots."""
    idx = distinct(n_tokens, 2 * f // 3, k, hot)
    val = torch.rand(n_tokens, k, device=DEVICE)
    val[torch.rand(n_tokens, k, device=DEVICE) < 0.2] = 0
    return idx, val, randn(n_tokens, k)


def test_latent_sums_equal_scattered_sums() -> None:
    """Oracle: float64 index_add over the unsorted pairs; one latent has more pairs than a block."""
    f, k = 30, 3
    idx, val, dot = random_pairs(300, f, k, hot=4)
    val[idx == 9] = 0
    aux = AuxGradients(torch.full((f,), -1, dtype=torch.int32), randn(2, 5), randn(2), randn(2, 5))
    aux.slot_F[[29, 7]] = torch.tensor([0, 1], dtype=torch.int32)
    aux = aux._replace(slot_F=aux.slot_F.to(DEVICE))
    found = latent_sums(val, dot, segments(idx, f), hyper(), aux)

    def scattered(values: Tensor) -> Tensor:
        total = torch.zeros(f, dtype=torch.float64, device=DEVICE)
        return total.index_add(0, idx.flatten().long(), values.double().flatten())

    dval = scattered(dot * (val > 0))
    db = 0.37 * dval
    db[[29, 7]] += aux.b_S
    for mine, expected in ((found.dval_F, dval), (found.along_F, scattered(val * dot)), (found.db_enc_F, db)):
        torch.testing.assert_close(mine.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.fired_F, scattered(val) > 0)


def test_chunk_sums_add_up_to_the_latents_gradients() -> None:
    """Oracle: float64 products of the dense codes with inputs and errors, for the hot latents."""
    f, k, d, n_tokens = 12, 3, 300, 40
    idx, val, dot = random_pairs(n_tokens, f, k, hot=4)
    x, e = randn(n_tokens, d, dtype=BF16), randn(n_tokens, d, dtype=BF16)
    pairs = segments(idx, f, 8)
    partial = chunk_sums(pairs, val, dot, x, e)[: int(pairs.n_chunks)].double()
    latent = pairs.chunk_latent_C[: int(pairs.n_chunks)].long()
    found = torch.zeros(f, 2, d, dtype=torch.float64, device=DEVICE).index_add(0, latent, partial)
    dense, ddense = dense_codes(idx, val, f), dense_codes(idx, dot * (val > 0), f)
    expected = torch.stack((ddense.T @ x.double(), dense.T @ e.double()), 1)
    hot = (pairs.starts[1:] - pairs.starts[:-1]) > 8
    assert 0 < int(hot.sum()) < f
    torch.testing.assert_close(found, expected * hot[:, None, None], rtol=1e-5, atol=1e-5)


def dense_codes(idx: Tensor, values: Tensor, f: int) -> Tensor:
    empty = torch.zeros(len(idx), f, dtype=torch.float64, device=DEVICE)
    return empty.scatter_(1, idx.long(), values.double())


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
        b_enc, b = self.mine.b_enc_F.double().requires_grad_(), self.b.double().requires_grad_()
        pre = (x.double() - b) @ enc.T + b_enc
        val, idx = largest(pre.detach(), self.k)
        e, dot, _ = residual(val, idx, self.weights()[1], self.b, x)
        pairs = segments(idx, len(b_enc), self.chunk)
        now = hyper(number)
        sums = latent_sums(val, dot, pairs, now, aux)
        db = decoder_bias_gradient(e, sums.db_enc_F, self.weights()[0].float(), now)
        mask = dense_codes(idx, torch.ones_like(val), len(b_enc))
        (torch.relu(pre * mask) @ dec + b).backward(0.37 * e.double())
        self.reference_step((enc, b_enc, dec), aux)
        if aux is None:
            torch.testing.assert_close(db.double(), b.grad, rtol=1e-4, atol=1e-4)
        update_rows(
            *(self.mine, self.moments, x, e, val, dot, self.b, pairs, sums, now),
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
    sums = latent_sums(val, dot, pairs, now, aux)
    place = None if seed is None else torch.tensor([seed], dtype=torch.int32, device=DEVICE)
    inputs = (x, e, val, dot, randn(d), pairs, sums, now)
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
    sums = latent_sums(val, dot, pairs, hyper())

    def update(moments: Moments, optimizer: str, seed: Tensor | None = None) -> None:
        inputs = (x, x, val, dot, randn(8), pairs, sums, hyper())
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


def test_the_package_needs_no_triton() -> None:
    """Oracle: a Python where importing triton fails."""
    code = "import sys; sys.modules['triton'] = None; import saemill.cli, saemill.train.trainer"
    subprocess.run([sys.executable, "-c", code], check=True)

"""The GPU's kernels against torch: compiled where CUDA is present, else in Triton's interpreter.

The interpreter cuts bfloat16 off where compiled code rounds, so stored values may differ by one last place.
"""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from kernel_inputs import BF16, DEVICE, F16, F32, distinct, largest, randn, unit_rows

from saemill.train.backends.gpu.kernels.residual import residual
from saemill.train.backends.gpu.kernels.select import select

pytestmark = [pytest.mark.no_cover, pytest.mark.usefixtures("seeded")]  # slow enough without being traced


def assert_selects(pre: Tensor, k: int) -> None:
    for is_signed in (False, True):
        val, idx = select(pre, k, is_signed)
        expected_val, expected_idx = largest(pre, k, is_signed)
        assert torch.equal(idx, expected_idx)
        torch.testing.assert_close(val, expected_val, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(("f", "k"), [(100, 5), (257, 32), (1000, 32), (1000, 1), (40, 40)])
def test_select_is_exact(f: int, k: int, dtype: torch.dtype) -> None:
    """Oracle: a stable sort of each row, by value and by absolute value; indices and values equal."""
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


def test_the_package_needs_no_triton() -> None:
    """Oracle: a Python where importing triton fails."""
    code = "import sys; sys.modules['triton'] = None; import saemill.cli, saemill.train.trainer"
    subprocess.run([sys.executable, "-c", code], check=True)

"""The GPU's kernels for codes above floors, for nested groups and for free decoder rows, against torch.

The interpreter cuts bfloat16 off where compiled code rounds, so stored values may differ by one last place.
"""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from kernel_inputs import BF16, DEVICE, F16, F32, dense_codes, distinct, hyper, randn, unit_rows

from saemill.train.backends.gpu.kernels.above import above
from saemill.train.backends.gpu.kernels.groups import residual_of_groups
from saemill.train.backends.gpu.kernels.rows import Latents, Moments, update_rows
from saemill.train.backends.gpu.kernels.segments import Terms, latent_sums, segments

pytestmark = [pytest.mark.no_cover, pytest.mark.usefixtures("seeded")]  # slow enough without being traced


def slots_for(n_tokens: int, n_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for codes, latents and counts."""
    idx = torch.zeros(n_tokens, n_slots, dtype=torch.int32, device=DEVICE)
    return torch.zeros(n_tokens, n_slots, device=DEVICE), idx, torch.zeros_like(idx[:, 0], dtype=torch.int64)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(("f", "n_slots"), [(1, 4), (100, 100), (257, 9), (2500, 60)])
def test_above_finds_what_a_comparison_finds(f: int, n_slots: int, dtype: torch.dtype) -> None:
    """Oracle: each row compared with the floors, in order; a tie with a floor, none, all, NaN and infinity
    are among them, and rows with more codes than slots."""
    pre, floor = randn(7, f, dtype=dtype), 0.5 + 0.3 * randn(f)
    pre[0], pre[1, f // 2], pre[2], pre[3, ::2] = -9, float("inf"), 9, float("nan")
    floor[f // 3] = pre[4, f // 3]
    val, idx, n = slots_for(7, n_slots)
    above(pre, floor, val, idx, n)
    for token, row in enumerate(pre.float()):
        found = (row > floor).nonzero().flatten()
        assert int(n[token]) == len(found)
        kept = found[:n_slots]
        assert idx[token, : len(kept)].tolist() == kept.tolist()
        assert torch.equal(val[token, : len(kept)], row[kept])
        assert not val[token, len(kept) :].any()
        assert not idx[token, len(kept) :].any()


def test_above_refuses_what_does_not_fit() -> None:
    """Oracle: the sentences."""
    val, idx, n = slots_for(2, 4)
    with pytest.raises(TypeError, match="idx_TK must be int32"):
        above(randn(2, 8), randn(8), val, idx.long(), n)
    with pytest.raises(ValueError, match=r"floor_F must have shape \[8\], got \[7\]"):
        above(randn(2, 8), randn(7), val, idx, n)


@pytest.mark.parametrize(
    ("d", "k", "n_groups", "dtype"),
    [(40, 7, 1, BF16), (96, 9, 3, F32), (130, 12, 5, BF16), (1030, 3, 2, F16), (20, 600, 1, F32)],
)
def test_groups_equal_dense_decoding(d: int, k: int, n_groups: int, dtype: torch.dtype) -> None:
    """Oracle: float64 sums over the gathered rows of each group; `dot` from the stored rows. Groups without
    codes, tokens without any, and slots not in use that hold numbers are among them."""
    n_tokens, f, shown = 6, 700, n_groups // 2
    idx, val = distinct(n_tokens, f, k), torch.rand(n_tokens, k, device=DEVICE)
    ends = torch.randint(0, k + 1, (n_tokens, n_groups)).sort(1).values.int().to(DEVICE)
    ends[0], ends[1] = 0, k
    w, b, x = unit_rows(f, d).to(dtype), randn(d), randn(n_tokens, d, dtype=dtype)
    weights = torch.rand(n_groups, device=DEVICE) if n_groups > 1 else None
    e, dot, sse, rows = residual_of_groups(val, idx, ends, weights, shown, w, b, x)
    gathered = w.double()[idx.long()]
    places = torch.arange(k, device=DEVICE)
    errors = torch.stack(
        [
            torch.einsum("tk,tkd->td", val.double() * (places < ends[:, g, None]), gathered) + b - x.double()
            for g in range(n_groups)
        ]
    )
    ulp = torch.finfo(dtype).eps if dtype != F32 else 1e-5
    torch.testing.assert_close(e.double(), errors[shown], rtol=ulp, atol=1e-5)
    torch.testing.assert_close(sse.double(), errors.square().sum(2).T, rtol=1e-5, atol=1e-5)
    stored = e[None]
    if n_groups > 1:
        assert rows is not None
        assert weights is not None
        weighted = errors * weights.double()[:, None, None]
        expected = weighted.flip(0).cumsum(0).flip(0)
        torch.testing.assert_close(rows.double(), expected, rtol=ulp, atol=1e-5)
        stored = rows
    group = (places[:, None] >= ends[:, None, :]).sum(2)  # the last one and more: a slot that is not in use
    own = torch.cat((stored.double(), torch.zeros_like(stored[:1], dtype=torch.float64)))
    expected_dot = torch.einsum(
        "tkd,tkd->tk", own[group, torch.arange(n_tokens, device=DEVICE)[:, None]], gathered
    )
    torch.testing.assert_close(dot.double(), expected_dot, rtol=1e-5, atol=1e-5)


def test_several_groups_need_weights() -> None:
    """Oracle: the sentence."""
    val, idx, _ = slots_for(2, 3)
    ends = torch.ones(2, 2, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="2 groups need weights_G"):
        residual_of_groups(val, idx, ends, None, 0, unit_rows(5, 4), randn(4), randn(2, 4))


@pytest.mark.parametrize(
    ("unit", "penalised", "chunk", "dtype"),
    [(True, False, 256, F32), (True, False, 8, BF16), (False, True, 8, F32), (False, False, 256, BF16)],
)
def test_rows_learn_from_the_error_of_their_group(
    unit: bool, penalised: bool, chunk: int, dtype: torch.dtype
) -> None:
    """Oracle: float64 products of dense codes with the errors of each group, and a step of SGD. Gradients
    are where no code is, too; free rows take a penalty along them, and keep their lengths otherwise."""
    f, d, k, n_tokens, n_groups, lr, gs = 12, 300, 4, 30, 3, 0.01, 0.37
    idx, val, dpre = (
        distinct(n_tokens, f, k, hot=5),
        torch.rand(n_tokens, k, device=DEVICE),
        randn(n_tokens, k),
    )
    val[:, 1], dpre[:, 2] = 0, 0
    group = torch.randint(0, n_groups, idx.shape, device=DEVICE)
    row = (group * n_tokens + torch.arange(n_tokens, device=DEVICE)[:, None]).int()
    x, e, b = randn(n_tokens, d, dtype=dtype), randn(n_groups * n_tokens, d, dtype=dtype), randn(d)
    w_enc, b_enc, w_dec = randn(f, d), randn(f), unit_rows(f, d) if unit else randn(f, d)
    copies = (w_enc.to(BF16), w_dec.to(BF16)) if dtype == BF16 else (None, None)
    latents = Latents(w_enc.clone(), b_enc.clone(), w_dec.clone(), *copies)
    moments = Moments(*(torch.zeros_like(p) for p in latents[:3]), None, None, None)
    dot = torch.einsum("tkd,tkd->tk", e.float()[row.long()], w_dec[idx.long()])
    now, pairs = hyper(weight_decay=0.0), segments(idx, f, chunk)
    sums = latent_sums(val, dot if unit else None, dpre, pairs, now)
    toward = -gs * (dense_codes(idx, val * dot, f)).sum(0) if unit else torch.zeros_like(b_enc).double()
    if penalised:
        sums, toward = sums._replace(toward_F=(toward := randn(f))), toward.double()
    update_rows(
        *(latents, moments, Terms(x, e, val, dpre, row), b, pairs, sums, now), optimizer="sgd", unit=unit
    )
    ddense = dense_codes(idx, dpre, f)
    g_enc = ddense.T @ (x.double() - b)
    codes = torch.cat([dense_codes(idx, val * (group == g), f) for g in range(n_groups)])
    g_dec = gs * codes.T @ e.double() + toward[:, None] * w_dec
    after_dec = w_dec - lr * g_dec
    if unit:
        after_dec = after_dec / after_dec.norm(dim=1, keepdim=True)
    expected = (w_enc - lr * g_enc, b_enc - lr * ddense.sum(0), after_dec)
    for mine, exact in zip(latents[:3], expected, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5)
    for copy, master in zip(latents[3:], (latents.w_enc_FD, latents.w_dec_FD), strict=True):
        if copy is not None:
            torch.testing.assert_close(copy.float(), master, rtol=2**-7, atol=0)

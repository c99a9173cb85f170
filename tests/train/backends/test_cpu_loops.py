"""Loops compiled by numba: each against torch."""

import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from cpu_weights import DTYPES, made, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saemill.common import loops
from saemill.common.loops.numbers import largest, magnitude
from saemill.train.backends.architecture import Slopes
from saemill.train.backends.base import Batch
from saemill.train.backends.codes import Codes
from saemill.train.backends.cpu.loops.above import above, above_by_scores
from saemill.train.backends.cpu.loops.auxk import keep_active, keep_largest
from saemill.train.backends.cpu.loops.quantise import Quantised, quantise
from saemill.train.backends.cpu.loops.residual import residual, residual_of_groups
from saemill.train.backends.cpu.loops.rows import gradients, sort_pairs
from saemill.train.backends.cpu.loops.select import select
from saemill.train.backends.parameters import Parameters
from saemill.train.backends.sparse import Forward, decode


def read(rows: Quantised) -> Tensor:
    """The values that the codes stand for, rotated, float64."""
    return rows.codes_ND.double() * rows.step_N[:, None].double()


@settings(max_examples=40)
@given(st.integers(1, 300), st.sampled_from(DTYPES), st.integers(0, 999))
def test_quantised_rows_keep_their_products(d: int, dtype: torch.dtype, seed: int) -> None:
    """Oracle: products of the rows in float64; a rotation keeps them, and the rounding moves them by no
    more than the bound of Cauchy and Schwarz. Norms are the rows'."""
    x_ND = torch.randn(7, d, generator=made(seed)).to(dtype)
    x_ND[0] = 0
    x_ND[1, d // 2] = 100.0
    found = quantise(x_ND)
    exact = x_ND.double()
    torch.testing.assert_close(found.norm_N.double(), exact.norm(dim=1), rtol=1e-5, atol=1e-6)
    half_step = found.step_N.double() / 2 * found.codes_ND.shape[1] ** 0.5
    off = (read(found) @ read(found).T - exact @ exact.T).abs()
    bound = half_step[:, None] * exact.norm(dim=1) + (half_step * (exact.norm(dim=1) + half_step))[:, None].T
    assert (off <= bound * 1.01 + 1e-6).all()
    assert found.codes_ND.abs().max() <= 127
    assert not found.codes_ND[0].any()


def test_outliers_are_spread() -> None:
    """Oracle: rounding without a rotation, whose error is many times as large where few entries are."""
    x_ND = torch.randn(50, 768, generator=made(0))
    x_ND[:, :4] *= 50
    step_N = x_ND.abs().amax(1) / 127
    found = quantise(x_ND)
    assert float((found.step_N / step_N).mean()) < 0.25
    assert (found.step_N < step_N / 2).all()


@pytest.mark.parametrize(
    "kind", ["normal", "sparse", "both in few columns", "alike", "constant", "outliers", "one for all"]
)
def test_errors_of_scores_are_normal_with_the_stated_deviation(kind: str) -> None:
    """Oracle: 4 million scores' errors against float64: their deviation as `quantise` states it, or less,
    and none beyond 6.5 of them, far from the bound of 8."""
    x_TD, w_FD = torch.randn(1000, 512, generator=made(1)), torch.randn(4000, 512, generator=made(2))
    if kind == "sparse":
        x_TD *= torch.rand(x_TD.shape, generator=made(3)) < 0.02
    elif kind == "both in few columns":
        x_TD[:, 3:] = w_FD[:, 3:] = 0
    elif kind == "alike":
        w_FD[:1000] = 3 * x_TD
    elif kind == "constant":
        x_TD, w_FD = x_TD * 0.05 + 3, w_FD * 0.05 + 1
    elif kind == "outliers":
        x_TD[:, :3] *= 100
    elif kind == "one for all":
        w_FD = w_FD * 0.01 + w_FD[:1]
    tokens, latents = quantise(x_TD), quantise(w_FD)
    error = read(tokens) @ read(latents).T - x_TD.double() @ w_FD.double().T
    of_x = (tokens.step_N[:, None] * latents.norm_N).double() ** 2
    of_w = (latents.step_N * tokens.norm_N[:, None]).double() ** 2
    error /= ((of_x + of_w) / 12).sqrt()
    assert error.square().mean().sqrt() < 1.1
    assert error.abs().max() < 6.5


@settings(max_examples=60)
@given(
    st.integers(1, 40),
    st.integers(1, 90),
    st.integers(1, 2500),
    st.integers(1, 60),
    st.sampled_from(DTYPES),
    st.sampled_from(["random", "alike", "below 0", "zero tokens"]),
    st.integers(0, 999),
)
def test_codes_are_those_of_the_whole_product(
    t: int, d: int, f: int, k: int, dtype: torch.dtype, kind: str, seed: int
) -> None:
    """Oracle: torch.topk of the product in float32, ReLU'd, and of its absolute values; with ties, latents
    all below 0, zero tokens."""
    k = min(k, f)
    x_TD = torch.randn(t, d, generator=made(seed)).to(dtype)
    w_FD = torch.randn(f, d, generator=made(seed + 1)).to(dtype)
    bias_F = 0.5 * torch.randn(f, generator=made(seed + 2))
    if kind == "alike":
        w_FD, bias_F = w_FD[torch.arange(f) % max(1, f // 7)], torch.zeros(f)
    elif kind == "below 0":
        bias_F = bias_F - 3 * d**0.5
    elif kind == "zero tokens":
        x_TD[::2] = 0
    tokens, latents = quantise(x_TD), quantise(w_FD)
    scores_TF = torch.mm(tokens.codes_ND.int(), latents.codes_ND.int().T)
    pre_TF = x_TD.float() @ w_FD.float().T + bias_F
    for is_signed in (False, True):
        val_TK, idx_TK = torch.full((t, k), torch.nan), torch.full((t, k), -1)
        select(scores_TF, tokens, latents, x_TD, w_FD, bias_F, val_TK, idx_TK, is_signed)
        expected = (pre_TF.abs() if is_signed else pre_TF.relu()).topk(k).values
        torch.testing.assert_close(val_TK.abs().sort(1).values, expected.sort(1).values, rtol=1e-4, atol=1e-4)
        active_TK = val_TK != 0
        exact = pre_TF.gather(1, idx_TK)[active_TK]
        torch.testing.assert_close(exact, val_TK[active_TK], rtol=1e-4, atol=1e-4)
        for row, active_K in zip(idx_TK, active_TK, strict=True):
            active = row[active_K].tolist()
            assert len(set(active)) == len(active)


@settings(max_examples=60)
@given(
    st.integers(1, 30), st.integers(1, 300), st.integers(1, 400), st.sampled_from(DTYPES),
    st.sampled_from(["plain", "alike", "far", "zero tokens"]), st.integers(0, 99),
)  # fmt: skip
def test_all_above_their_floors_are_found(
    t: int, d: int, f: int, dtype: torch.dtype, kind: str, seed: int
) -> None:
    """Oracle: the product in float32, from 8-bit scores and from the product itself; more than there is room
    for are counted, and fill the room."""
    x_TD = torch.randn(t, d, generator=made(seed)).to(dtype)
    w_FD = torch.randn(f, d, generator=made(seed + 1)).to(dtype)
    bias_F, floor_F = torch.randn(2, f, generator=made(seed + 2))
    if kind == "alike":
        w_FD = w_FD[torch.arange(f) % max(1, f // 7)]
    elif kind == "far":
        floor_F = floor_F + 2 * d**0.5
    elif kind == "zero tokens":
        x_TD[::2] = 0
    pre_TF = x_TD.float() @ w_FD.float().T + bias_F
    margin_TF = pre_TF - floor_F
    tokens, latents = quantise(x_TD), quantise(w_FD)
    scores_TF = torch.mm(tokens.codes_ND.int(), latents.codes_ND.int().T)
    for n_slots in (f, max(1, f // 3)):
        for by_scores in (True, False):
            val_TK, idx_TK = torch.zeros(t, n_slots), torch.zeros(t, n_slots, dtype=torch.int64)
            n_T = torch.full((t,), -1)
            if by_scores:
                filled = val_TK, idx_TK, n_T
                above_by_scores(scores_TF, tokens, latents, x_TD, w_FD, bias_F, floor_F, *filled)
            else:
                above(pre_TF, floor_F, val_TK, idx_TK, n_T)
            sure_T, possible_T = (margin_TF > 1e-3).sum(1), (margin_TF > -1e-3).sum(1)
            assert ((sure_T <= n_T) & (n_T <= possible_T)).all()
            used_TK = torch.arange(n_slots) < n_T[:, None]
            torch.testing.assert_close(
                pre_TF.gather(1, idx_TK)[used_TK], val_TK[used_TK], rtol=1e-4, atol=1e-4
            )
            assert (margin_TF.gather(1, idx_TK)[used_TK] > -1e-3).all()
            for row, n in zip(idx_TK, n_T.clamp(max=n_slots), strict=True):
                assert len(set(row[:n].tolist())) == n


@settings(max_examples=30)
@given(st.integers(1, 20), st.integers(1, 40), st.integers(1, 30), st.integers(1, 4), st.integers(0, 99))
def test_errors_of_groups_are_those_of_torch(t: int, d: int, k: int, n_groups: int, seed: int) -> None:
    """Oracle: dense products in float32: each group's error, and the weighted sum over those that hold it."""
    (_, _, w_dec_FD, b_D, *_), weights_G = (
        weights_of(50, d, torch.float32, seed).parameters,
        torch.rand(n_groups),
    )
    x_TD, val_TK = torch.randn(t, d, generator=made(seed)), torch.rand(t, k, generator=made(seed))
    idx_TK = torch.randint(0, 50, (t, k), generator=made(seed))
    ends_TG = torch.randint(0, k + 1, (t, n_groups), generator=made(seed)).sort(1).values
    e_TD, dot_TK = torch.empty(t, d), torch.zeros(t, k)
    sse_TG, rows_GTD = torch.empty(t, n_groups), torch.zeros(n_groups, t + 2, d)
    shown, inputs = n_groups - 1, (val_TK, idx_TK, ends_TG, weights_G, x_TD, w_dec_FD, b_D)
    residual_of_groups(*inputs, shown, 2, e_TD, dot_TK, sse_TG, rows_GTD)
    places_K, errors = torch.arange(k), []
    for g in range(n_groups):
        kept = Codes(val_TK.where(places_K < ends_TG[:, g, None], 0), idx_TK)
        errors.append(decode(kept, w_dec_FD) + b_D - x_TD)
        torch.testing.assert_close(sse_TG[:, g], errors[g].square().sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(e_TD, errors[shown], rtol=1e-4, atol=1e-4)
    for g in range(n_groups):
        rows_TD = sum(weights_G[h] * errors[h] for h in range(g, n_groups))
        torch.testing.assert_close(rows_GTD[g, 2:], rows_TD, rtol=1e-4, atol=1e-4)
        first = ends_TG[:, g - 1, None] if g else 0
        in_group = (places_K >= first) & (places_K < ends_TG[:, g, None])
        dots = (w_dec_FD[idx_TK] * rows_GTD[g, 2:, None]).sum(2)
        torch.testing.assert_close(dot_TK[in_group], dots[in_group], rtol=1e-4, atol=1e-4)


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 50), st.integers(1, 13), st.integers(0, 99))
def test_residuals_are_those_of_torch(t: int, d: int, f: int, k: int, seed: int) -> None:
    """Oracle: dense products in float32; in bfloat16 the error is its nearest, and the rest of it."""
    k, (_, _, w_dec_FD, b_D, *_) = min(k, f), weights_of(f, d, torch.float32, seed).parameters
    x_TD = torch.randn(t, d, generator=made(seed))
    idx_TK = torch.rand(t, f, generator=made(seed)).topk(k).indices
    val_TK, used_T = (
        torch.rand(t, k, generator=made(seed)),
        torch.randint(0, k + 1, (t,), generator=made(seed)),
    )
    here = Codes(val_TK, idx_TK, n_T=used_T)
    expected = decode(Codes(val_TK.where(here.used_TK, 0), idx_TK), w_dec_FD) + b_D - x_TD
    for dtype in DTYPES:
        e_TD, dot_TK, sse_T = torch.empty(t, d, dtype=dtype), torch.zeros(t, k), torch.empty(t)
        residual(val_TK, idx_TK, used_T, x_TD, w_dec_FD, b_D, e_TD, dot_TK, sse_T)
        if dtype == torch.bfloat16:
            near = expected.bfloat16().float()
            torch.testing.assert_close(e_TD.float(), near, rtol=2**-7, atol=1e-6)
        else:
            torch.testing.assert_close(e_TD, expected, rtol=1e-5, atol=1e-5)
        dots = (w_dec_FD[idx_TK] * e_TD.float()[:, None]).sum(2)
        torch.testing.assert_close(dot_TK, dots.where(here.used_TK, 0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sse_T, e_TD.float().square().sum(1), rtol=1e-5, atol=1e-6)


def test_numbers_are_rounded_to_the_nearest_bfloat16() -> None:
    """Oracle: torch's own conversion, of ties, both signs, tiny and huge numbers, infinity and NaN."""
    x = torch.cat([torch.randn(5000, generator=made(0)) * 10.0 ** torch.arange(-25, 25).repeat(100)])
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.3895e38, torch.inf, -torch.inf, torch.nan])
    x_TD = -torch.cat([x, ties])[None]
    e_TD, ones = torch.empty(x_TD.shape, dtype=torch.bfloat16), torch.ones(1, 1)
    nothing, zeros = torch.zeros_like(x_TD), torch.zeros(1, 1, dtype=torch.int64)
    used_T = torch.ones(1, dtype=torch.int64)
    residual(ones, zeros, used_T, x_TD, nothing, nothing[0], e_TD, torch.empty(1, 1), torch.empty(1))
    assert torch.equal(e_TD.isnan(), x_TD.isnan())
    assert torch.equal(e_TD[~e_TD.isnan()], (-x_TD)[~e_TD.isnan()].bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_torch(dtype: torch.dtype) -> None:
    """Oracle: dense products of the codes and their gradients; latents without any, and hot ones."""
    t, d, f, k, gs = 90, 37, 50, 5, 0.3
    (_, _, w_dec_FD, b_D, *_), generator = weights_of(f, d, dtype, 0).parameters, made(5)
    x_TD = torch.randn(t, d, generator=generator).to(dtype).float()
    idx_TK = torch.rand(t, f // 2, generator=generator).topk(k).indices
    idx_TK[:, 0] = f - 1
    val_TK = (torch.rand(t, k, generator=generator) - 0.2).relu()
    e_TD, dot_TK = torch.randn(t, d, generator=generator).to(dtype), torch.randn(t, k, generator=generator)
    rest = (torch.tensor(0.0), torch.tensor(0), torch.zeros(f))
    forward = Forward(Codes(val_TK, idx_TK), e_TD, dot_TK, *rest)
    pairs = sort_pairs(forward, Slopes((gs * dot_TK).where(val_TK > 0, 0)), f, gs)
    val_TF, dval_TF, dot_TF = (
        torch.zeros(t, f).scatter(1, idx_TK, gs * of_pair_TK)
        for of_pair_TK in (val_TK, dot_TK * (val_TK > 0), dot_TK)
    )
    n_pairs = (val_TF > 0).sum(0)
    assert pairs.offsets_F.diff().tolist() == n_pairs.tolist()
    assert torch.equal(pairs.fired_F, n_pairs > 0)
    along_F = (val_TF * dot_TF).sum(0) / gs
    torch.testing.assert_close(pairs.dpre_F, dval_TF.sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pairs.along_F, along_F, rtol=1e-5, atol=1e-5)
    for f_ in (0, f // 3, f - 1):
        tokens = pairs.token_P[pairs.offsets_F[f_] : pairs.offsets_F[f_ + 1]]
        assert tokens.tolist() == val_TF[:, f_].nonzero()[:, 0].tolist()
    enc_FD = dval_TF.T @ x_TD - dval_TF.sum(0)[:, None] * b_D
    dec_FD = val_TF.T @ e_TD.float() - along_F[:, None] * w_dec_FD
    batch, p = Batch(x_TD, x_TD.to(dtype)), Parameters(w_dec_FD, torch.zeros(f), w_dec_FD, b_D)
    for block in (slice(0, 20), slice(20, f)):
        grad_enc, grad_dec = gradients(batch, e_TD, pairs, block, p, -pairs.along_F)
        torch.testing.assert_close(grad_enc, enc_FD[block], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(grad_dec, dec_FD[block], rtol=1e-4, atol=1e-4)


@settings(max_examples=50)
@given(
    st.integers(1, 20), st.integers(1, 400), st.integers(1, 400), st.sampled_from(DTYPES), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_the_largest_are_kept_in_their_places(
    t: int, s: int, k: int, dtype: torch.dtype, coarse: bool, seed: int
) -> None:
    """Oracle: torch.topk, rectified; where entries tie, its sorted values; no more than k are left."""
    k = min(k, s)
    pre_TS = torch.randn(t, s, generator=made(seed))
    pre_TS = (pre_TS.round() if coarse else pre_TS).to(dtype)
    pre_TS[0, :2] = torch.tensor([0.99609375, 1.0])[:s] * pre_TS.abs().max()  # neighbours in bfloat16
    found = keep_largest(pre_TS.clone(), k)
    assert torch.equal(found.sort(1).values[:, s - k :], pre_TS.topk(k).values.relu().flip(1))
    assert ((found == 0) | (found == pre_TS)).all()
    assert ((found > 0).sum(1) <= k).all()


@pytest.mark.parametrize("others", [[], [-3.0], [-0.0, -torch.inf], [2.0, 1e-40], [torch.inf, -torch.inf]])
def test_largest_and_magnitude(others: list[float]) -> None:
    """Oracle: Python's max of the numbers and 0, and of their magnitudes; a NaN makes the magnitude one."""
    row = np.array(others, np.float32)
    assert largest(row, len(row)) == max([0.0, *row])
    assert magnitude(row) == max([0.0, *abs(row)])
    assert np.isnan(magnitude(np.append(row, np.float32(np.nan))))
    assert np.isnan(magnitude(np.append(row, -np.float32(np.nan))))


@settings(max_examples=30)
@given(st.integers(1, 300), st.integers(0, 300), st.sampled_from(DTYPES), st.integers(0, 99))
def test_gradients_of_inactive_latents_are_0(t: int, s: int, dtype: torch.dtype, seed: int) -> None:
    """Oracle: a product with where they are active; with pieces of a few columns too, bit by bit."""
    dpre_TS, acts_TS = torch.randn(2, t, s, generator=made(seed)).to(dtype)
    acts_TS.relu_()
    expected_TS, found_TS, again_TS = dpre_TS * (acts_TS > 0), dpre_TS.clone(), dpre_TS.clone()
    found_S = keep_active(found_TS, acts_TS)
    assert torch.equal(found_TS, expected_TS)
    torch.testing.assert_close(found_S, expected_TS.float().sum(0))
    with mock.patch("saemill.train.backends.cpu.loops.auxk.PIECE_COLUMNS", 7):
        assert torch.equal(keep_active(again_TS, acts_TS), found_S)
    assert torch.equal(again_TS, expected_TS)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1])
def test_a_nan_stays_one(bits: int) -> None:
    """Oracle: every NaN in float32 is one in bfloat16, whatever bits it has beside."""
    x_TD = torch.tensor([[bits, 0]], dtype=torch.int32).view(torch.float32)
    e_TD, zero = torch.empty(1, 2, dtype=torch.bfloat16), torch.zeros(1, 1)
    w_FD = torch.zeros(1, 2)
    used_T = torch.ones(1, dtype=torch.int64)
    residual(zero, zero.long(), used_T, x_TD, w_FD, w_FD[0], e_TD, torch.empty(1, 1), torch.empty(1))
    assert e_TD.isnan().tolist() == [[True, False]]


def test_a_change_in_any_loop_gives_another_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Oracle: numba's own rule would miss a change in what a loop calls; where nothing can be written, the
    folder is a new one."""
    copied = tmp_path / "saemill" / "common" / "loops"
    shutil.copytree(Path(loops.__file__).parent, copied)
    (other := tmp_path / "saemill" / "train" / "loops").mkdir(parents=True)
    monkeypatch.setattr(loops, "__file__", str(copied / "__init__.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = loops._cache()
    assert loops._cache() == before
    (copied / "kth.py").write_text("# changed")
    assert (changed := loops._cache()) != before
    (other / "rows.py").write_text("# another room's")
    assert loops._cache() != changed
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert Path(loops._cache()).name.startswith("saemill-loops-")


def test_a_tensor_with_gaps_is_refused() -> None:
    """Oracle: the message; a loop would read between the rows."""
    with pytest.raises(ValueError, match="without gaps"):
        quantise(torch.randn(4, 10)[:, ::2])

"""The training step's arithmetic against dense autograd and torch's own functions."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import saemill.train.backends.auxk as auxk_module
from saemill.common.sae.topk import topk
from saemill.train.backends import codes, rows
from saemill.train.backends.auxk import DeadRows, auxk
from saemill.train.learner import initial

Parameters = tuple[Tensor, Tensor, Tensor, Tensor]


def make(n_tokens: int, d: int, f: int, seed: int) -> tuple[Tensor, Parameters]:
    """Inputs and parameters of an SAE whose decoder rows have unit length."""
    torch.manual_seed(seed)
    w_dec = torch.nn.functional.normalize(torch.randn(f, d), dim=1)
    parameters = (torch.randn(f, d) / d**0.5, torch.randn(f) * 0.1, w_dec, torch.randn(d) * 0.3)
    return torch.randn(n_tokens, d), parameters


def dense_codes(x: Tensor, w_enc: Tensor, b_enc: Tensor, b: Tensor, k: int) -> Tensor:
    """relu(TopK(pre)) as a dense [T, F] tensor with gradients."""
    pre = (x - b) @ w_enc.T + b_enc
    mask = torch.zeros_like(pre).scatter(1, pre.topk(k).indices, 1.0)
    return torch.relu(pre * mask)


def weights_of(parameters: Parameters, dtype: torch.dtype = torch.float32) -> codes.Weights:
    w_enc, b_enc, w_dec, b = (p.clone() for p in parameters)
    return codes.Weights(w_enc, b_enc, w_dec, b, w_enc.to(dtype), w_dec)


def passed_forward(x: Tensor, parameters: Parameters, k: int) -> codes.Forward:
    room = codes.room(len(parameters[0]), x.dtype, x.device)
    return codes.forward(codes.Batch(x, x), weights_of(parameters), k, room)


class Recorder:
    """Stands in for an optimizer: keeps the gradients it is given, moves nothing."""

    def __init__(self, parameters: Parameters) -> None:
        self.gradients = [torch.full_like(p, torch.nan) for p in parameters]

    def begin_step(self) -> None:
        pass

    def update(self, leaf: int, rows: slice, grad: Tensor, lr: float, weight_decay: float = 0.0) -> None:
        self.gradients[leaf][rows] = grad


def found_gradients(
    x: Tensor, parameters: Parameters, passed: codes.Forward, dead: DeadRows | None, gs: float
) -> list[Tensor]:
    """What `rows.backward` hands to its optimizer, in blocks of 5 rows."""
    recorder: Any = Recorder(parameters)
    rates = rows.Rates(gs, lr=0.1, weight_decay=0.0)
    weights, healthy = weights_of(parameters), torch.tensor(True)
    rows.backward(codes.Batch(x, x), passed, dead, weights, recorder, healthy, rates)
    return recorder.gradients


def check(found: list[Tensor], loss: Tensor, leaves: list[Tensor]) -> None:
    """Oracle: autograd's gradients of `loss`, the decoder's without its part along the rows."""
    loss.backward()
    w_dec = leaves[2]
    assert w_dec.grad is not None
    w_dec.grad -= (w_dec.grad * w_dec).sum(1, keepdim=True) * w_dec.detach()
    for mine, leaf in zip(found, leaves, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(
            mine.double(), leaf.grad, rtol=1e-4, atol=1e-4 * leaf.grad.abs().max().item()
        )


def double_leaves(parameters: Parameters) -> list[Tensor]:
    return [p.double().clone().requires_grad_(True) for p in parameters]


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 3000),
    st.integers(1, 80),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.booleans(),
    st.integers(0, 999),
)
def test_topk_holds_the_same_values_as_torch(
    t: int, f: int, k: int, dtype: torch.dtype, coarse: bool, seed: int
) -> None:
    """Oracle: torch.topk and relu, also where many entries tie, in every dtype and at every depth."""
    k = min(k, f)
    pre = torch.randn(t, f, generator=torch.Generator().manual_seed(seed))
    pre = (pre.round() if coarse else pre).to(dtype)
    values, indices = topk(pre, k)
    assert torch.equal(values.sort(1).values, pre.topk(k).values.relu().sort(1).values)
    assert torch.equal(pre.gather(1, indices).relu(), values)
    assert all(len(set(row.tolist())) == k for row in indices)


def test_topk_of_long_odd_rows() -> None:
    """Oracle: torch.topk where places need more than 16 bits."""
    pre = torch.randn(2, 2**17 + 1).bfloat16()
    values, _ = topk(pre, 9)
    assert torch.equal(values.sort(1).values, pre.topk(9).values.relu().sort(1).values)


def test_topk_passes_gradients_to_the_chosen_entries() -> None:
    """Oracle: autograd through torch.topk and relu."""
    pre = torch.randn(6, 40, requires_grad=True)
    weights = torch.randn(6, 40)
    values, indices = topk(pre, 5)
    (mine,) = torch.autograd.grad((values * weights.gather(1, indices)).sum(), pre)
    theirs, places = pre.topk(5)
    (expected,) = torch.autograd.grad((theirs.relu() * weights.gather(1, places)).sum(), pre)
    assert torch.equal(mine, expected)


@pytest.mark.parametrize(
    ("t", "d", "f", "k"), [(7, 5, 13, 3), (33, 16, 64, 1), (20, 8, 40, 40), (64, 32, 1024, 9)]
)
def test_gradients_equal_dense_autograd(
    t: int, d: int, f: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: float64 autograd through a dense relu(TopK) autoencoder."""
    monkeypatch.setattr(rows, "BLOCK_BYTES", 5 * d * 4)
    x, parameters = make(t, d, f, seed=t)
    passed = passed_forward(x, parameters, k)
    c = 0.37
    found = found_gradients(x, parameters, passed, None, 2 * c)
    w_enc, b_enc, w_dec, b = leaves = double_leaves(parameters)
    dense = dense_codes(x.double(), w_enc, b_enc, b, k)
    loss = c * (dense @ w_dec + b - x.double()).square().sum()
    assert float(c * passed.e_TD.square().sum()) == pytest.approx(loss.item(), rel=1e-5)
    check(found, loss, leaves)


@pytest.mark.parametrize(("n_dead", "k_aux"), [(1, 4), (10, 4), (4, 4), (30, 16)])
def test_auxk_equals_dense_autograd(n_dead: int, k_aux: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: autograd of the main loss plus AuxK over the dead rows, residual detached."""
    monkeypatch.setattr(rows, "BLOCK_BYTES", 5 * 12 * 4)
    monkeypatch.setitem(auxk_module.CHUNK_BYTES, "cpu", 7 * n_dead * 4)
    monkeypatch.setattr(auxk_module, "LEAST_TOKENS", 1)
    x, parameters = make(24, 12, 48, seed=n_dead)
    k, c, scale = 5, 0.2, 0.11
    dead_S = torch.randperm(48, generator=torch.Generator().manual_seed(3))[:n_dead].sort().values
    passed = passed_forward(x, parameters, k)
    dead, value = auxk(
        codes.Batch(x, x), passed, dead_S, weights_of(parameters), k_aux=k_aux, scale=scale, n_dead=n_dead
    )
    found = found_gradients(x, parameters, passed, dead, 2 * c)
    w_enc, b_enc, w_dec, b = leaves = double_leaves(parameters)
    xd = x.double()
    recon = dense_codes(xd, w_enc, b_enc, b, k) @ w_dec + b
    residual = (xd - recon).detach()
    aux = dense_codes(xd, w_enc[dead_S], b_enc[dead_S], b, min(k_aux, n_dead)) @ w_dec[dead_S]
    aux_loss = scale * (aux - residual).square().sum()
    assert float(value) == pytest.approx(aux_loss.item(), rel=1e-5)
    check(found, c * (recon - xd).square().sum() + aux_loss, leaves)


def test_auxk_in_bf16_is_near_auxk_in_float32() -> None:
    """Oracle: the float32 call; bf16 gradients lie within 10% of it in length."""
    x, parameters = make(512, 64, 256, seed=3)
    dead_S = torch.arange(0, 256, 2)
    passed = passed_forward(x, parameters, 8)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        batch, weights = codes.Batch(x, x.to(dtype)), weights_of(parameters, dtype)
        found[dtype], _ = auxk(batch, passed, dead_S, weights, k_aux=32, scale=1.0, n_dead=128)
    for exact, rounded in zip(found[torch.float32][1:], found[torch.bfloat16][1:], strict=True):
        assert float((exact - rounded).norm() / exact.norm()) < 0.1


def test_forward_in_chunks_equals_forward_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the same call with room for everything."""
    x, parameters = make(50, 16, 256, seed=1)
    whole = passed_forward(x, parameters, 8)
    monkeypatch.setitem(codes.CHUNK_BYTES, "cpu", 7 * 256 * 4)
    monkeypatch.setattr(codes, "GATHER_BYTES", 3 * 8 * 16 * 4)
    parts = passed_forward(x, parameters, 8)
    torch.testing.assert_close(whole.e_TD, parts.e_TD, rtol=1e-5, atol=1e-5)
    dense = [torch.zeros(50, 256).scatter_(1, p.codes.idx_TK, p.dot_TK) for p in (whole, parts)]
    torch.testing.assert_close(dense[0], dense[1], rtol=1e-4, atol=1e-5)


def test_bf16_product_finds_nearly_the_same_latents() -> None:
    """Oracle: the float32 product, with inputs far from the origin and b there too: overlap of the
    chosen latents stays above 95%, which a bias of unrounded weights would miss."""
    x, (w_enc, b_enc, _, b) = make(200, 64, 1024, seed=2)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        w = w_enc.to(dtype)
        bias = codes.fold_bias(w, b_enc, b * 0.1)
        found.append(codes.encode(x.to(dtype), w, bias, 32).idx_TK)
    shared = sum(len(set(a.tolist()) & set(r.tolist())) for a, r in zip(*found, strict=True))
    assert shared / found[0].numel() > 0.95


@given(st.integers(0, 10_000), st.integers(1, 500), st.integers(1, 5000))
def test_chunks_cover_all_rows_once_in_order(n_rows: int, row_bytes: int, chunk_bytes: int) -> None:
    """Oracle: range(n_rows); no chunk is over its bytes unless it is a single row."""
    found = list(codes.chunks(n_rows, row_bytes, chunk_bytes))
    assert [i for chunk in found for i in range(n_rows)[chunk]] == list(range(n_rows))
    longest = max((chunk.stop - chunk.start for chunk in found), default=1)
    assert longest == 1 or longest * row_bytes <= chunk_bytes


def test_geometric_median_minimises_summed_distance() -> None:
    """Oracle: no point of a random search around it does better; far outliers do not move it much."""
    torch.manual_seed(0)
    x = torch.randn(400, 6)
    x[:40] += 1000
    median = initial.geometric_median(x)
    best = torch.linalg.vector_norm(x - median, dim=1).sum()
    for _ in range(200):
        other = median + 0.05 * torch.randn(6)
        assert torch.linalg.vector_norm(x - other, dim=1).sum() >= best - 1e-2
    assert float(median.norm()) < 2 < float(x.mean(0).norm())

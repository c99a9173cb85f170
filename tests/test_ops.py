"""The training step's arithmetic against dense autograd and torch's own functions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saemill.common.topk import topk
from saemill.train import ops

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


def leaves(parameters: Parameters) -> list[Tensor]:
    return [p.double().clone().requires_grad_(True) for p in parameters]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 200), st.integers(1, 40), st.booleans(), st.integers(0, 999))
def test_topk_holds_the_same_values_as_torch(t: int, f: int, k: int, coarse: bool, seed: int) -> None:
    """Oracle: torch.topk, also where many entries tie."""
    k = min(k, f)
    pre = torch.randn(t, f, generator=torch.Generator().manual_seed(seed))
    pre = pre.round() if coarse else pre
    values, indices = topk(pre, k)
    assert torch.equal(values.sort(1).values, pre.topk(k).values.sort(1).values)
    assert torch.equal(pre.gather(1, indices), values)
    assert all(len(set(row.tolist())) == k for row in indices)


def test_topk_takes_the_two_step_path_and_stays_exact() -> None:
    """Oracle: torch.topk on a width that is cut into groups, bf16 included."""
    for dtype in (torch.float32, torch.bfloat16):
        pre = torch.randn(50, 1024).to(dtype)
        values, indices = topk(pre, 8)
        assert torch.equal(values.sort(1).values, pre.topk(8).values.sort(1).values)
        assert torch.equal(pre.gather(1, indices), values)


@pytest.mark.parametrize(
    ("t", "d", "f", "k"), [(7, 5, 13, 3), (33, 16, 64, 1), (20, 8, 40, 40), (64, 32, 512, 9)]
)
def test_gradients_equal_dense_autograd(t: int, d: int, f: int, k: int) -> None:
    """Oracle: float64 autograd through a dense relu(TopK) autoencoder."""
    x, parameters = make(t, d, f, seed=t)
    codes = ops.encode(x, parameters[0], parameters[1], parameters[3], k, torch.float32)
    e = ops.decode(codes, parameters[2], parameters[3]) - x
    c = 0.37
    found = ops.gradients(x, 2 * c * e, codes, parameters[0], parameters[2], parameters[3])
    w_enc, b_enc, w_dec, b = leaves(parameters)
    dense = dense_codes(x.double(), w_enc, b_enc, b, k)
    loss = c * (dense @ w_dec + b - x.double()).square().sum()
    loss.backward()
    assert float(c * e.square().sum()) == pytest.approx(loss.item(), rel=1e-5)
    for mine, leaf in zip(found, (w_enc, b_enc, w_dec, b), strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(
            mine.double(), leaf.grad, rtol=1e-4, atol=1e-4 * float(leaf.grad.abs().max())
        )


@pytest.mark.parametrize(("n_dead", "k_aux"), [(1, 4), (10, 4), (4, 4), (30, 16)])
def test_auxk_equals_dense_autograd(n_dead: int, k_aux: int) -> None:
    """Oracle: autograd of the main loss plus AuxK over the dead rows, residual detached."""
    x, parameters = make(24, 12, 48, seed=n_dead)
    k, c, scale = 5, 0.2, 0.11
    dead = torch.randperm(48, generator=torch.Generator().manual_seed(3))[:n_dead].sort().values
    codes = ops.encode(x, parameters[0], parameters[1], parameters[3], k, torch.float32)
    e = ops.decode(codes, parameters[2], parameters[3]) - x
    grads = ops.gradients(x, 2 * c * e, codes, parameters[0], parameters[2], parameters[3])
    found, auxk = ops.add_auxk(
        grads,
        x,
        e,
        dead,
        parameters[0],
        parameters[1],
        parameters[2],
        parameters[3],
        k_aux=k_aux,
        scale=scale,
    )
    w_enc, b_enc, w_dec, b = leaves(parameters)
    xd = x.double()
    recon = dense_codes(xd, w_enc, b_enc, b, k) @ w_dec + b
    residual = (xd - recon).detach()
    aux = dense_codes(xd, w_enc[dead], b_enc[dead], b, min(k_aux, n_dead)) @ w_dec[dead]
    aux_loss = scale * (aux - residual).square().sum()
    (c * (recon - xd).square().sum() + aux_loss).backward()
    assert float(auxk) == pytest.approx(aux_loss.item(), rel=1e-5)
    for mine, leaf in zip(found, (w_enc, b_enc, w_dec, b), strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(
            mine.double(), leaf.grad, rtol=1e-4, atol=1e-4 * float(leaf.grad.abs().max())
        )


def test_encode_in_chunks_equals_encode_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the same call with room for everything."""
    x, (w_enc, b_enc, _, b) = make(50, 16, 256, seed=1)
    whole = ops.encode(x, w_enc, b_enc, b, 8, torch.float32)
    monkeypatch.setattr(ops, "CHUNK_BYTES", 7 * 256 * 4)
    parts = ops.encode(x, w_enc, b_enc, b, 8, torch.float32)
    dense = [torch.zeros(50, 256).scatter_(1, c.idx_TK, c.val_TK) for c in (whole, parts)]
    torch.testing.assert_close(dense[0], dense[1], rtol=1e-5, atol=1e-6)


def test_bf16_product_finds_nearly_the_same_latents() -> None:
    """Oracle: the float32 product. Overlap of the chosen latents stays above 95%."""
    x, (w_enc, b_enc, _, b) = make(200, 64, 1024, seed=2)
    exact = ops.encode(x, w_enc, b_enc, b * 0.1, 32, torch.float32).idx_TK
    rounded = ops.encode(x, w_enc, b_enc, b * 0.1, 32, torch.bfloat16).idx_TK
    shared = sum(len(set(a.tolist()) & set(r.tolist())) for a, r in zip(exact, rounded, strict=True))
    assert shared / exact.numel() > 0.95


def test_projection_leaves_nothing_along_the_rows() -> None:
    """Oracle: the inner product with each unit row is zero, the orthogonal part untouched."""
    _, (w_enc, _, w_dec, _) = make(1, 16, 40, seed=5)
    projected = ops.project(w_enc, w_dec)
    assert float((projected * w_dec).sum(1).abs().max()) < 1e-6
    torch.testing.assert_close(w_enc - projected, (w_enc * w_dec).sum(1, keepdim=True) * w_dec)


def test_geometric_median_minimises_summed_distance() -> None:
    """Oracle: no point of a random search around it does better; far outliers do not move it much."""
    torch.manual_seed(0)
    x = torch.randn(400, 6)
    x[:40] += 1000
    median = ops.geometric_median(x)
    best = torch.linalg.vector_norm(x - median, dim=1).sum()
    for _ in range(200):
        other = median + 0.05 * torch.randn(6)
        assert torch.linalg.vector_norm(x - other, dim=1).sum() >= best - 1e-2
    assert float(median.norm()) < 2 < float(x.mean(0).norm())

"""Each architecture's `loss` against its paper's formula, written down once more and differentiated."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from saemill.train.arch.abs_topk import AbsTopK
from saemill.train.arch.batchtopk import BatchTopK
from saemill.train.arch.gated import Gated
from saemill.train.arch.groupmax import GroupMax
from saemill.train.arch.jumprelu import JumpRelu
from saemill.train.arch.relu import Relu
from saemill.train.arch.topk import TopK
from saemill.train.backends.architecture import Dead, Seen
from saemill.train.backends.parameters import Parameters, Shape

T, D, F = 19, 6, 30
NONE_DEAD = Dead(torch.zeros(0, dtype=torch.int64), 0)


@pytest.fixture
def weights() -> dict[str, Tensor]:
    """Parameters of every architecture, float64, and tokens."""
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": drawn(T, D),
        "w_enc": drawn(F, D),
        "b_enc": drawn(F),
        "w_dec": drawn(F, D),
        "b": drawn(D),
        "threshold": 0.3 * drawn(F).abs() + 0.1,
        "r_mag": 0.3 * drawn(F),
        "b_mag": 0.3 * drawn(F),
    }


def same(
    weights: dict[str, Tensor],
    architecture: Any,
    names: tuple[str, ...],
    formula: Callable[..., Tensor],
    **seen: Tensor,
) -> None:
    """Compare loss and gradients of an architecture with a formula of x and the named parameters."""
    x = weights["x"]
    found, expected = (
        {
            name: copy.deepcopy(weights[name]).requires_grad_()
            for name in ("w_enc", "b_enc", "w_dec", "b", *names)
        }
        for _ in range(2)
    )
    known = Seen(NONE_DEAD, T)._replace(**seen)
    p = Parameters.of(found, Shape(F, D, D))
    losses = architecture.loss(p, x, x, known, torch.float64)
    mine, other = losses.error + losses.added, formula(x, **expected)
    torch.testing.assert_close(mine, other)
    mine.backward()
    other.backward()
    for name, leaf in expected.items():
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        torch.testing.assert_close(found[name].grad, gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_batchtopk(weights: dict[str, Tensor]) -> None:
    """Oracle: Bussmann et al. 2024: the n largest of the flattened batch, scattered among zeros."""
    n = 3 * T
    pre = (weights["x"] - weights["b"]) @ weights["w_enc"].T + weights["b_enc"]
    cutoff = pre.flatten().topk(n).values[-1] * (1 - 1e-9)

    def formula(x: Tensor, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, b: Tensor) -> Tensor:
        flat = torch.relu((x - b) @ w_enc.T + b_enc).flatten()
        codes = torch.zeros_like(flat).scatter(0, flat.topk(n).indices, flat.topk(n).values).view(T, F)
        return (x - codes @ w_dec - b).square().sum()

    same(weights, BatchTopK(3), (), formula, cutoff=cutoff)


def test_matryoshka(weights: dict[str, Tensor]) -> None:
    """Oracle: Bussmann et al. 2025: the mean over prefixes of the errors of each prefix alone."""

    def formula(x: Tensor, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, b: Tensor) -> Tensor:
        pre = (x - b) @ w_enc.T + b_enc
        codes = torch.zeros_like(pre).scatter(1, pre.topk(4).indices, pre.topk(4).values.relu())
        return sum((x - codes[:, :n] @ w_dec[:n] - b).square().sum() for n in (5, 12, F)) / 3  # type: ignore[return-value]

    same(weights, BatchTopK(4, prefixes=(5, 12, F), of_each_token=True), (), formula)


def test_several_k(weights: dict[str, Tensor]) -> None:
    """Oracle: the error with the k largest for each k: their mean, or k and 4k with weights 1 and 1/8."""

    def error(k: int, x: Tensor, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, b: Tensor) -> Tensor:
        pre = (x - b) @ w_enc.T + b_enc
        codes = torch.zeros_like(pre).scatter(1, pre.topk(k).indices, pre.topk(k).values.relu())
        return (x - codes @ w_dec - b).square().sum()

    same(weights, TopK(5, nested_k=(2,)), (), lambda x, **p: (error(2, x, **p) + error(5, x, **p)) / 2)
    same(weights, TopK(3, multi=True), (), lambda x, **p: error(3, x, **p) + error(12, x, **p) / 8)


def test_abs_topk(weights: dict[str, Tensor]) -> None:
    """Oracle: Zhu et al. 2025: hard thresholding, of all entries those that no k others exceed in size."""

    def formula(x: Tensor, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, b: Tensor) -> Tensor:
        pre = (x - b) @ w_enc.T + b_enc
        n_larger = (pre.abs()[:, None, :] > pre.abs()[:, :, None]).sum(2)
        return (x - (pre * (n_larger < 5)) @ w_dec - b).square().sum()

    same(weights, AbsTopK(5), (), formula)


def test_groupmax(weights: dict[str, Tensor]) -> None:
    """Oracle: sparsify's activation: the maximum of each of k equal slices of the latents, rectified."""

    def formula(x: Tensor, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, b: Tensor) -> Tensor:
        pre = torch.relu((x - b) @ w_enc.T + b_enc)
        largest = torch.cat([part.amax(1, keepdim=True).expand_as(part) for part in pre.split(F // 5, 1)], 1)
        return (x - (pre * (pre == largest)) @ w_dec - b).square().sum()

    same(weights, GroupMax(5), (), formula)


class Jump(torch.autograd.Function):
    """z · 1[z > θ] with the paper's pseudo-derivative of θ (equation 11)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, width: Tensor) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.width = width
        return z * (z > theta)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        z, theta = ctx.saved_tensors
        kernel = (((z - theta) / ctx.width).abs() < 0.5).to(z.dtype)
        return gradient * (z > theta), (-theta / ctx.width * kernel * gradient).sum(0), None


class Step(torch.autograd.Function):
    """1[z > θ] with the paper's pseudo-derivative of θ (equation 12)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, width: Tensor) -> Tensor:
        ctx.save_for_backward(z, theta)
        ctx.width = width
        return (z > theta).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        z, theta = ctx.saved_tensors
        kernel = (((z - theta) / ctx.width).abs() < 0.5).to(z.dtype)
        return None, (-kernel / ctx.width * gradient).sum(0), None


@pytest.mark.parametrize("target", [None, 4.0])
@pytest.mark.parametrize("bandwidth", [None, 0.4])
def test_jumprelu(weights: dict[str, Tensor], target: float | None, bandwidth: float | None) -> None:
    """Oracle: arXiv 2407.14435, equations 10 to 12, by autograd functions; a target as in other trainers. The
    kernel is half as wide as each threshold, where it has no width of its own."""
    lam = 0.07
    weights["threshold"][3] = 0
    theta = weights["threshold"] * D**0.5
    width_F = theta / 2 if bandwidth is None else torch.full_like(theta, bandwidth * D**0.5)
    width_F[3] = width_F[3].clamp(min=0.001 * D**0.5)
    pre = (weights["x"] - weights["b"]) @ weights["w_enc"].T + weights["b_enc"]
    count_F = (pre > theta).double().sum(0)

    def formula(
        x: Tensor, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, b: Tensor, threshold: Tensor
    ) -> Tensor:
        z, theta = (x - b) @ w_enc.T + b_enc, threshold * D**0.5
        codes = Jump.apply(z, theta, width_F)  # type: ignore[no-untyped-call]
        steps = Step.apply(z, theta, width_F)  # type: ignore[no-untyped-call]
        error = (x - codes @ w_dec - b).square().sum()
        if target is None:
            return error + lam * D * steps.sum()
        return error + T * D * lam * (steps.sum() / T / target - 1).square()

    architecture = JumpRelu(bandwidth, target, lam)
    same(weights, architecture, ("threshold",), formula, count_F=count_F, n_active=count_F.sum())


def test_jumprelu_with_tanh(weights: dict[str, Tensor]) -> None:
    """Oracle: λ Σ tanh(4 f), f in units in which E‖x‖² = 1, by the same autograd functions."""
    count_F = torch.zeros(F, dtype=torch.float64)

    def formula(
        x: Tensor, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, b: Tensor, threshold: Tensor
    ) -> Tensor:
        z, theta = (x - b) @ w_enc.T + b_enc, threshold * D**0.5
        codes = Jump.apply(z, theta, 0.4 * D**0.5)  # type: ignore[no-untyped-call]
        return (x - codes @ w_dec - b).square().sum() + 0.07 * D * torch.tanh(4 * codes / D**0.5).sum()

    same(weights, JumpRelu(0.4, None, 0.07, "tanh"), ("threshold",), formula, count_F=count_F)


@pytest.mark.parametrize(("power", "unit"), [(1.0, True), (1.0, False), (0.5, False)])
def test_relu(weights: dict[str, Tensor], power: float, unit: bool) -> None:
    """Oracle: Anthropic, April 2024: λ Σ (f · ‖W_dec‖)^p where E‖x‖² = 1."""

    def formula(x: Tensor, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, b: Tensor) -> Tensor:
        codes = torch.relu((x - b) @ w_enc.T + b_enc)
        sizes = (codes / D**0.5) * w_dec.norm(dim=1)
        return (x - codes @ w_dec - b).square().sum() + 0.07 * D * (sizes[sizes > 0] ** power).sum()

    same(weights, Relu(0.07, power, unit), (), formula)


def test_gated(weights: dict[str, Tensor]) -> None:
    """Oracle: arXiv 2404.16014, equations 6 to 8, with the decoder frozen in the auxiliary loss."""

    def formula(
        x: Tensor, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, b: Tensor, r_mag: Tensor, b_mag: Tensor
    ) -> Tensor:
        shared = (x - b) @ w_enc.T
        gate = shared + b_enc
        codes = (gate > 0) * torch.relu(shared * r_mag.exp() + b_mag)
        frozen = torch.relu(gate) @ w_dec.detach() + b.detach()
        return (
            (x - codes @ w_dec - b).square().sum()
            + 0.07 * D * torch.relu(gate / D**0.5).sum()
            + (x - frozen).square().sum()
        )

    same(weights, Gated(0.07), ("r_mag", "b_mag"), formula)


def test_what_warms_up_and_what_is_annealed() -> None:
    """Oracle: the values at steps, by hand: linear up to the weight, by equal factors down to k."""
    weights = [Relu(2.0, warmup_steps=4).at(step).coefficient for step in (0, 1, 3, 9)]
    assert weights == [0.5, 1.0, 2.0, 2.0]
    ks = [TopK(4, k_start=64, anneal_steps=4).at(step).k for step in (0, 1, 2, 3, 4, 9)]
    assert ks == [64, 32, 16, 8, 4, 4]

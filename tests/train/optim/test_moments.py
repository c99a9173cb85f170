"""Short formats for Adam's moments: bounds on what is read back, no drift, Adam's own path."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saemill.train.config import ADAM_BETAS
from saemill.train.optim.moments import BLOCK, Bfloat16Moment, EightBitMoment
from saemill.train.optim.optimizer import Adam

ALL = slice(0, 64)
RELATIVE = {"bf16": 2**-7, "first": 2 ** (24 / 127) - 1, "second": 2 ** (48 / 255) - 1}


def kept(kind: str, leaf: torch.Tensor) -> Bfloat16Moment | EightBitMoment:
    return Bfloat16Moment(leaf) if kind == "bf16" else EightBitMoment(leaf, signed=kind == "first")


@settings(max_examples=60)
@given(st.sampled_from(list(RELATIVE)), st.floats(-60, 30), st.integers(0, 99), st.integers(1, 9))
def test_what_is_read_back_is_within_a_code_of_what_was_written(
    kind: str, log2: float, seed: int, step: int
) -> None:
    """Oracle: the spacing of the format, for magnitudes within 2^-20 of the block's largest; zeros stay."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(64, 2 * BLOCK + 40, generator=generator)
    value = torch.where(value.abs() < 2**-12, 2**-12, value) * 2**log2
    value[:, BLOCK : 2 * BLOCK] *= 2**-50  # what one scale per row would lose
    value = value if kind == "first" else value.abs()
    value[3] = 0
    value[5, ::2] = 0
    value[7, BLOCK:] = 0
    moment = kept(kind, value)
    moment.write(ALL, value, step)
    error = (moment.read(ALL) - value).abs()
    assert bool((error <= value.abs() * RELATIVE[kind] * 1.001).all())


@pytest.mark.parametrize("kind", ["bf16", "second"])
def test_a_slow_average_does_not_stand_still(kind: str) -> None:
    """Oracle: the same decay in float64. Rounded to the nearest it would stay at 1."""
    value = torch.ones(64, 400)
    moment = kept(kind, value)
    moment.write(ALL, value, 0)
    for step in range(1, 1001):
        moment.write(ALL, moment.read(ALL) * 0.999, step)
    assert float(moment.read(ALL).mean()) == pytest.approx(0.999**1000, rel=0.06)


@pytest.mark.parametrize("betas", [(0.9, 0.999), ADAM_BETAS])
@pytest.mark.parametrize(("state", "tolerance"), [("bf16", 0.02), ("8bit", 0.12)])
def test_adam_with_short_moments_stays_near_adam(
    state: str, tolerance: float, betas: tuple[float, float]
) -> None:
    """Oracle: torch.optim.Adam on the same gradients; the paths' distance against their length."""
    torch.manual_seed(0)
    start = torch.randn(64, 50)
    exact, short = torch.nn.Parameter(start.clone()), start.clone()
    oracle = torch.optim.Adam([exact], lr=1e-3, eps=1e-10, betas=betas)
    mine = Adam({"w": short}, state, betas)
    scales = torch.logspace(-6, 0, 50)
    for _ in range(60):
        grad = (torch.randn(64, 50) + 0.5) * scales
        exact.grad = grad.clone()
        oracle.step()
        mine.begin_step(1e-3)
        mine.update("w", slice(0, 40), grad[:40], 1e-3)
        mine.update("w", slice(40, 64), grad[40:], 1e-3)
    moved = (exact.detach() - start).norm()
    assert float((short - exact.detach()).norm() / moved) < tolerance


@pytest.mark.parametrize(("state", "bytes_per_weight"), [("fp32", 8), ("bf16", 4), ("8bit", 2)])
def test_moments_take_the_bytes_they_are_said_to(state: str, bytes_per_weight: int) -> None:
    """Oracle: the tensors' own sizes, without the 8 bytes of scales per row and 256 columns."""
    adam = Adam({"w": torch.zeros(100, 1000)}, state)
    n_bytes = sum(tensor.nbytes for tensor in adam.tensors()["w"])
    assert 0 <= n_bytes - bytes_per_weight * 100_000 <= 4 * 800

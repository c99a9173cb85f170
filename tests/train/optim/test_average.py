"""The moving average of weights."""

import pytest
import torch

from saemill.train.optim.average import WeightAverage


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_the_average_is_the_weighted_mean_of_all_steps(decay: float) -> None:
    """Oracle: Σ decay^(n − i) w_i / Σ decay^(n − i) in float64, after each of 50 steps; the first is w_1."""
    generator = torch.Generator().manual_seed(0)
    history = torch.randn(50, 6, 4, generator=generator, dtype=torch.float64)
    weights = torch.zeros(6, 4)
    average = WeightAverage({"w": weights}, decay)
    for n in range(1, 51):
        weights.copy_(history[n - 1])
        average.add(n)
        shares = decay ** torch.arange(n - 1, -1, -1, dtype=torch.float64)
        exact = (shares[:, None, None] * history[:n]).sum(0) / shares.sum()
        torch.testing.assert_close(average.values["w"].double(), exact, rtol=1e-4, atol=1e-6)
    average = WeightAverage({"w": weights}, decay)
    average.add(1)
    assert torch.equal(average.values["w"], weights)

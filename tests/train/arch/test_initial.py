"""Where training starts."""

import torch

from saemill.train.arch import initial


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

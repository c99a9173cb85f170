"""What the statistics warn of: dimensions that the stored type cannot hold, rows far from all others."""

import numpy as np
import pytest
import torch

from saemill.common.stores.statistics import (
    Moments,
    Statistics,
    far_warning,
    rounding_shares,
    unheld,
    unheld_warning,
)

TYPES = (torch.bfloat16, torch.float16, torch.float32)


def statistics_of(x_TD: torch.Tensor) -> Statistics:
    moments = Moments(x_TD.shape[1])
    moments.add(x_TD)
    return moments.statistics()


def planted(dtype: torch.dtype, scale: float, offsets_in_steps: list[float]) -> torch.Tensor:
    """Normal columns around `scale` whose deviations are so many steps of the type there. float64."""
    step = torch.finfo(dtype).eps * scale  # between scale and 2 · scale, scale being a power of two
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(20_000, len(offsets_in_steps), generator=generator, dtype=torch.float64)
    return x_TD * torch.tensor(offsets_in_steps, dtype=torch.float64) * step + 1.5 * scale


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scale", [2.0**-10, 1.0, 2.0**10])
def test_the_share_is_what_rounding_makes(dtype: torch.dtype, scale: float) -> None:
    """Oracle: the measured variance of the error of real rounding over the measured stored variance."""
    x_TD = planted(dtype, scale, [0.5, 1, 2, 4, 8])
    stored_TD = x_TD.to(dtype)
    error_D = (stored_TD.double() - x_TD).var(0, correction=0)
    expected_D = error_D / stored_TD.double().var(0, correction=0)
    torch.testing.assert_close(
        rounding_shares(statistics_of(stored_TD), dtype), expected_D, rtol=0.03, atol=0
    )


@pytest.mark.parametrize("dtype", TYPES)
def test_planted_dimensions_are_named_and_no_others(dtype: torch.dtype) -> None:
    """Oracle: which columns were planted; of some the stored variance is 0, of others far too large."""
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(5_000, 12, generator=generator, dtype=torch.float64)
    x_TD[:, 2] += 1.0 / torch.finfo(dtype).eps  # a deviation of about a step
    step = torch.finfo(dtype).eps * 4  # from 4 to 8
    x_TD[:, 5] = 4 + 0.01 * step * x_TD[:, 5] + 10.3 * step  # all on one number: nothing is left
    x_TD[:, 7] = 4 + 0.01 * step * x_TD[:, 7] + 10.5 * step  # on two numbers: much more than there was
    x_TD[:, 9] += 0.02 / torch.finfo(dtype).eps  # held well: 50 steps
    x_TD[:, 11] = 0.0
    stored_TD = x_TD.to(dtype)
    found = statistics_of(stored_TD)
    assert found.variance_D[5] == 0
    assert found.variance_D[7] > 100 * x_TD[:, 7].var()
    assert unheld(found, dtype) == [2, 5, 7]
    told = unheld_warning("a", found, dtype)
    assert told is not None
    assert "3 dimensions of 12 (2, 5, 7)" in told
    assert "(up to 100%)" in told
    assert "or some are constant" in told
    assert unheld(statistics_of(stored_TD[:1]), dtype) == []


def test_what_is_held_is_not_told() -> None:
    """Oracle: normal columns whose means are up to ten deviations away, in the coarsest type."""
    x_TD = torch.randn(5_000, 8, generator=torch.Generator().manual_seed(2)) + torch.arange(-4, 4) * 2.5
    for scale in (1e-25, 1.0, 1e18):
        assert unheld_warning("a", statistics_of((x_TD * scale).bfloat16()), torch.bfloat16) is None


def test_rows_that_are_much_longer_are_told() -> None:
    """Oracle: how many rows were planted, and numpy's median and largest distance."""
    generator = np.random.default_rng(0)
    x_TD = generator.standard_normal((4_000, 16))
    assert far_warning("a", statistics_of(torch.from_numpy(x_TD)), "token") is None
    x_TD[::400] *= 100
    distances_T = np.linalg.norm(x_TD - x_TD.mean(0), axis=1)
    found = statistics_of(torch.from_numpy(x_TD))
    ratio = distances_T.max() / np.median(distances_T)
    assert found.share_beyond(10) == 10 / 4_000
    assert found.largest_distance / found.median_distance == pytest.approx(ratio, rel=0.2)
    told = far_warning("a", found, "passage")
    assert told is not None
    assert told.startswith("a: 0.25% of the passages are more than 10 times as far")
    assert "--normalize" in told

"""Sums over tokens in compiled loops, each against torch."""

import pytest
import torch
from reconstructions import random_sae, reconstruct

from saemill.assess.errors import errors
from saemill.assess.loops import rows
from saemill.assess.reconstruction import Firing
from saemill.common.sae.sae import Encoded
from saemill.common.stores.activations import ActivationStore


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_rows_and_reconstructions(dtype: torch.dtype, scale: float) -> None:
    """Oracle: the definitions in float64, at scales whose squares no float32 holds."""
    x, r = (drawn(9, 37, seed=seed).mul(scale).to(dtype) for seed in (0, 1))
    found = errors(x, r)
    xd, rd = x.double(), r.double()
    expected = ((rd - xd).square(), xd.square(), rd.square(), xd * rd)
    for values, of_each in zip(found, expected, strict=True):
        torch.testing.assert_close(values, of_each.sum(1), rtol=1e-12, atol=0)


def test_firings_are_counted_by_latent() -> None:
    """Oracle: sums over a dense matrix of activations; zeros and NaN are no firing, of either sign are."""
    acts, latents = drawn(50, 4), torch.stack([torch.randperm(11)[:4] for _ in range(50)])
    acts[::3, 1], acts[5, 2] = 0, torch.nan
    drivers = drawn(50, 2, seed=3).double()
    firing = Firing.none(11)
    for some in (slice(0, 20), slice(20, 50)):
        firing.add(Encoded(acts[some], latents[some]), drivers[some])
    dense = torch.zeros(50, 11, dtype=torch.float64).scatter_(1, latents, acts.nan_to_num().double())
    assert torch.equal(firing.count_F, (dense != 0).sum(0))
    torch.testing.assert_close(firing.sum_F, dense.sum(0))
    torch.testing.assert_close(firing.min_F.double(), dense.amin(0).clamp(max=0))
    torch.testing.assert_close(firing.max_F.double(), dense.amax(0).clamp(min=0))
    torch.testing.assert_close(firing.drivers.squares_F, dense.square().sum(0))
    torch.testing.assert_close(firing.drivers.products_FC, dense.T @ drivers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_around_a_point_and_means(dtype: torch.dtype) -> None:
    """Oracle: torch, group by group; rows of no group count nowhere."""
    x, centre = (drawn(60, 7) + 3).to(dtype), drawn(7, seed=1).double()
    group = torch.arange(60) % 4 - 1
    squares = torch.empty(60, dtype=torch.float64)
    rows.squared_distances(x, centre, squares)
    torch.testing.assert_close(squares, (x.double() - centre).square().sum(1))
    mean, around = torch.zeros(3, 7, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    rows.around_means(x, centre, group, torch.full((3,), 15), mean, around)
    low, high = torch.full((7,), torch.inf).double(), torch.full((7,), -torch.inf).double()
    rows.stretch(x, group, low, high)
    for g in range(3):
        own = x[group == g].double()
        torch.testing.assert_close(mean[g], own.mean(0) - centre)
        torch.testing.assert_close(around[g], (own - own.mean(0)).square().sum())
    grouped = x[group >= 0].double()
    assert torch.equal(low, grouped.amin(0))
    assert torch.equal(high, grouped.amax(0))


def test_saes_of_several_widths_share_memory_but_no_figures(store: ActivationStore) -> None:
    """Oracle: each reconstructed alone."""
    saes = {f"f{f}": random_sae(f, k=3, f=f) for f in (24, 9, 40)}
    together = reconstruct(store, saes)
    for name, sae in saes.items():
        alone = reconstruct(store, {name: sae})
        assert (together.sums.column(f"{name}/sse") == alone.sums.column(f"{name}/sse")).all()
        assert torch.equal(together.firing[name].count_F, alone.firing[name].count_F)

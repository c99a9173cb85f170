"""How similar decoder rows are: against a loop over pairs, and rows whose cosines are known."""

import math

import pytest
import torch

from saemill.assess.cosines import Cosines, cosine_figures, cosines, random_cosines


def figures(rows_FD: torch.Tensor) -> dict[str, float | None]:
    found = cosine_figures(cosines(rows_FD), random_cosines(rows_FD))
    return {name: figure["value"] for name, figure in found.items()}


def test_cosines_are_those_of_all_pairs() -> None:
    """Oracle: the whole matrix of cosines, which is cut into blocks where there are so many rows."""
    rows = torch.randn(1500, 6, generator=torch.Generator().manual_seed(0))
    unit = (rows / rows.norm(dim=1, keepdim=True)).double()
    cosine = unit @ unit.T
    others = cosine[~torch.eye(1500, dtype=torch.bool)].view(1500, 1499)
    found = figures(rows)
    assert found["max_decoder_cosine"] == pytest.approx(float(others.amax(1).mean()), rel=1e-5)
    assert found["c_dec"] == pytest.approx(float(others.abs().mean()), rel=1e-5)
    assert found["antipodal_fraction"] == float((others.amin(1) < -0.9).double().mean())
    assert found["duplicate_fraction"] == float((others.amax(1) > 0.95).double().mean())
    of_rows = cosines(rows)
    assert isinstance(of_rows, Cosines)
    torch.testing.assert_close(of_rows.opposite_N, cosine.argmin(1))


def test_rows_whose_cosines_are_known() -> None:
    """Oracle: equal rows have cosine 1, orthogonal ones 0; each of ±e has one antipode, and of its pairs one
    in 2n − 1 has |cosine| 1; of one row there is no figure."""
    assert figures(torch.ones(3, 6))["max_decoder_cosine"] == pytest.approx(1)
    assert figures(torch.ones(3, 6))["duplicate_fraction"] == 1
    assert figures(torch.eye(6))["max_decoder_cosine"] == pytest.approx(0)
    assert figures(torch.eye(6))["c_dec"] == pytest.approx(0)
    both = figures(torch.cat([torch.eye(6), -torch.eye(6)]))
    assert (both["antipodal_fraction"], both["duplicate_fraction"]) == (1, 0)
    assert both["c_dec"] == pytest.approx(1 / 11)
    assert cosine_figures(cosines(torch.eye(6)[:1]), random_cosines(torch.eye(6)[:1]))["c_dec"] == {
        "value": None, "reason": "1 live latent: a cosine needs two"
    }  # fmt: skip


def test_c_dec_of_random_directions_is_that_of_a_sphere() -> None:
    """Oracle: E|cos| of two random directions in D dimensions, Γ(D/2) / (√π Γ((D + 1)/2))."""
    d = 32
    expected = math.exp(math.lgamma(d / 2) - math.lgamma((d + 1) / 2)) / math.sqrt(math.pi)
    assert figures(torch.eye(32).repeat(40, 1))["c_dec_random"] == pytest.approx(expected, rel=0.01)


def test_rows_without_direction_are_left_out() -> None:
    """Oracle: the cosines of the other rows; tiny rows count like large ones."""
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    scales = torch.tensor([1e-25, 1e-8, 1, 1e8, 1e18, 1])[:, None]
    whole = figures(rows)
    with_zeros = figures(torch.cat([rows * scales, torch.zeros(2, 4)]))
    for name in ("max_decoder_cosine", "c_dec"):
        assert with_zeros[name] == pytest.approx(whole[name], rel=1e-5)
    bad = torch.full((3, 4), math.nan)
    assert cosines(bad) == "decoder rows are not finite"

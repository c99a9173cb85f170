"""The exact top-k against torch's own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saemill.common.sae.topk import topk


@settings(max_examples=100)
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


@pytest.mark.parametrize("f", [5, 40, 3000])
@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_topk_shows_what_is_not_finite(f: int, odd: float) -> None:
    """Oracle: the entry itself, larger than the others, which are as in torch.topk."""
    pre = torch.randn(3, f, generator=torch.Generator().manual_seed(f))
    pre[1, f // 2] = odd
    values, indices = topk(pre, 4)
    place = (indices[1] == f // 2).nonzero()
    assert len(place) == 1
    assert not values[1, place].isfinite()
    others = values[1][indices[1] != f // 2].sort().values
    pre[1, f // 2] = -1
    assert torch.equal(others, pre[1].topk(3).values.relu().sort().values)

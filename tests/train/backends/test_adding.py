"""Sums by place, on the GPU if there is one."""

import torch
from steps import GPU

from saemill.train.backends.adding import add_rows, sum_by_place, without_zeros


def test_sums_by_place_repeat_bit_by_bit() -> None:
    """Oracle: float64 index_add; the same call again. Places with very many numbers, and without any."""
    n, generator = 50, torch.Generator().manual_seed(0)
    at = torch.randint(0, 40, (20_000,), generator=generator).clamp_(max=30).to(GPU)
    numbers = torch.randn(len(at), generator=generator).to(GPU)
    expected = torch.zeros(n, dtype=torch.float64).index_add_(0, at.cpu(), numbers.double().cpu())
    found = [sum_by_place(numbers, at, n) for _ in range(3)]
    torch.testing.assert_close(found[0].cpu().double(), expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(again, found[0]) for again in found)


def test_rows_are_added_where_they_belong() -> None:
    """Oracle: a loop over the rows."""
    at, rows = torch.tensor([2, 0, 2, 2], device=GPU), torch.arange(12.0, device=GPU).view(4, 3)
    expected = torch.ones(4, 3, device=GPU)
    for place, row in zip(at.tolist(), rows, strict=True):
        expected[place] += row
    assert torch.equal(add_rows(torch.ones(4, 3, device=GPU), at, rows), expected)


def test_zeros_share_no_place() -> None:
    """Oracle: sums of the first places are as before, and no other has more than its share of the zeros."""
    n, numbers = 8, torch.tensor([0.0, 3, 0, 0, -2, 0, 0, 0, 0, 0, 0, 0], device=GPU)
    at = torch.zeros(len(numbers), dtype=torch.int64, device=GPU)
    at[4] = 5
    spread = without_zeros(numbers, at, n)
    sums = torch.zeros(2 * n, device=GPU).index_add_(0, spread, numbers)
    assert sums[:n].tolist() == [3, 0, 0, 0, 0, -2, 0, 0]
    assert int(torch.bincount(spread[numbers == 0]).max()) == 2
    assert int(spread[numbers == 0].min()) >= n

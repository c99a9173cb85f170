"""Norms of rows, and what their counts tell: the median, and how many are beyond a bound."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from saemill.common.stores.norms import N_BINS, NormSketch, norms_from, norms_of

WITHIN = 2.0**-8
"""Half a step of bfloat16, as a share of the norm."""


def rows_of(seed: int, n: int, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Rows whose norms span four orders of magnitude, some of them 0."""
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(n, 5)) * 10.0 ** generator.uniform(-2, 2, (n, 1)) * scale
    rows[generator.random(n) < 0.05] = 0
    return torch.from_numpy(rows).to(dtype)


def exact(x_TD: torch.Tensor) -> NDArray[np.float64]:
    norms: NDArray[np.float64] = np.linalg.norm(x_TD.double().numpy(), axis=1)
    return norms


@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 1200),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    kind=st.sampled_from([torch.bfloat16, torch.float32]),
)
@hypothesis_settings(max_examples=60)
def test_norms_and_median_are_within_a_250th(seed: int, n: int, scale: float, kind: torch.dtype) -> None:
    """Oracle: numpy's norms in float64 of the same stored rows, and the middle one of them, sorted."""
    x_TD = rows_of(seed, n, scale, kind)
    wanted = exact(x_TD)
    bits = norms_of(x_TD)
    np.testing.assert_allclose(norms_from(bits), wanted, rtol=WITHIN * 1.0001, atol=0)
    sketch = NormSketch()
    sketch.add(bits)
    assert sketch.n_rows == n
    assert sketch.median == pytest.approx(np.sort(wanted)[(n - 1) // 2], rel=WITHIN * 1.0001)
    for factor in (2, 10):
        limit = factor * sketch.median
        surely, maybe = wanted > limit * (1 + WITHIN), wanted > limit * (1 - WITHIN)
        assert surely.sum() <= sketch.n_beyond(limit) <= maybe.sum()
        assert sketch.n_beyond(limit) == (norms_from(bits) > limit).sum()


@given(
    bits=st.lists(st.integers(0, N_BINS - 1), max_size=200),
    cuts=st.lists(st.integers(0, 200), max_size=5),
    order=st.randoms(use_true_random=False),
)
@hypothesis_settings(max_examples=60)
def test_sketches_of_parts_merge_in_any_order(bits: list[int], cuts: list[int], order: object) -> None:
    """Oracle: the sketch of all rows at once; written as JSON and read in between."""
    every = np.array(bits, np.uint16)
    parts = np.split(every, sorted(min(cut, len(every)) for cut in cuts))
    order.shuffle(parts)  # type: ignore[attr-defined]
    merged, whole = NormSketch(), NormSketch()
    whole.add(every)
    for part in parts:
        sketch = NormSketch()
        sketch.add(part)
        read = json.loads(json.dumps(sketch.counts))
        merged.merge(NormSketch({int(bin): count for bin, count in read.items()}))
    assert merged.counts == whole.counts
    assert merged.median == whole.median


def test_what_bfloat16_cannot_hold() -> None:
    """Oracle: its largest number, by hand; and a site without a row."""
    x_TD = torch.full((2, 64), 3e38)
    assert norms_of(x_TD).tolist() == [N_BINS - 1] * 2
    assert norms_from(norms_of(x_TD))[0] == torch.finfo(torch.bfloat16).max
    assert NormSketch().median == 0

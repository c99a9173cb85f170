"""Statistics of what is cached: those of the training positions, under any mask, part by part."""

import itertools
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caching import CTX_LEN, cache
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from saemill.common.errors import ConfigError, StoreError
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.statistics import Moments, Statistics
from saemill.common.stores.tokens import TokenStore

pytestmark = pytest.mark.usefixtures("one_thread")


def kept(tokens: TokenStore, first_positions: int, left_out: set[int]) -> NDArray[np.bool_]:
    """Oracle: the training positions, token by token. bool [n_tokens]."""
    rows = tokens.rows(0, tokens.n_rows)
    return np.array(
        [
            not tokens.held_out_R[row] and position >= first_positions and int(token) not in left_out
            for row in range(tokens.n_rows)
            for position, token in enumerate(rows[row])
        ]
    )


def assert_moments(found: Statistics, rows: NDArray[np.float64]) -> None:
    """Compare with numpy's two passes in float64."""
    assert found.n_tokens == len(rows)
    np.testing.assert_allclose(found.mean_D.numpy(), rows.mean(0), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(found.variance_D.numpy(), rows.var(0), rtol=1e-9)
    np.testing.assert_allclose(found.mean_squared_norm, (rows**2).sum(1).mean(), rtol=1e-11)
    np.testing.assert_allclose(found.total_variance, rows.var(0).sum(), rtol=1e-9)


@pytest.mark.parametrize("site", ["layers.0", "layers.1"])
def test_statistics_are_those_of_the_training_positions(
    site: str, made: ActivationStore, tokens: TokenStore, truth: dict[str, Tensor]
) -> None:
    """Oracle: numpy in float64 over the stored values, first positions, separators and held-out rows out."""
    keep = kept(tokens, 1, {tokens.tokenizer.separator_id})
    assert 0.5 < keep.mean() < 0.95
    assert_moments(made.site(site).statistics, truth[site].bfloat16().double().numpy()[keep])


@pytest.mark.parametrize("mask", [
    MaskConfig(special_tokens=False, first_positions=0),
    MaskConfig(first_positions=3, token_ids=(17, 300)),
])  # fmt: skip
def test_statistics_under_another_mask(
    mask: MaskConfig, made: ActivationStore, tokens: TokenStore, truth: dict[str, Tensor]
) -> None:
    """Oracle: numpy over the positions of that mask, counted token by token."""
    left_out = {*mask.token_ids, *([tokens.tokenizer.separator_id] if mask.special_tokens else [])}
    keep = kept(tokens, mask.first_positions, left_out)
    found = made.site("layers.1").statistics_over(partial(made.keep, mask=mask, held_out=False))
    assert_moments(found, truth["layers.1"].bfloat16().double().numpy()[keep])
    assert found.n_tokens != made.site("layers.1").statistics.n_tokens


def test_the_stores_own_mask_is_a_setting(
    tokens: TokenStore, neox: str, truth: dict[str, Tensor], tmp_path: Path
) -> None:
    """Oracle: numpy over that mask's positions; the rows on disk are the same under any mask."""
    mask = MaskConfig(special_tokens=False, first_positions=4, token_ids=(5,))
    store = cache(tokens, neox, tmp_path / "acts", mask=mask)
    assert ActivationStore(store.path).mask == mask
    keep = kept(tokens, 4, {5})
    site = store.site("layers.1")
    assert_moments(site.statistics, truth["layers.1"].bfloat16().double().numpy()[keep])
    assert torch.equal(site.read(0, 4800), truth["layers.1"].to(torch.bfloat16))


def test_nothing_to_count_is_refused(made: ActivationStore) -> None:
    """Oracle: a mask of whole rows leaves no position; nor does one of every id."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConfigError, match=f"less than the {CTX_LEN} tokens of a row, got {CTX_LEN}"):
            made.site("layers.0").statistics_over(
                partial(made.keep, mask=MaskConfig(first_positions=CTX_LEN), held_out=False)
            )
        every_id = tuple(range(made.tokens.tokenizer.vocab_size))
        with pytest.raises(StoreError, match="every position is masked or held out"):
            made.site("layers.0").statistics_over(
                partial(made.keep, mask=MaskConfig(token_ids=every_id), held_out=False)
            )


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"first_positions": CTX_LEN}, f"less than the {CTX_LEN} tokens of a row, got {CTX_LEN}"),
        ({"token_ids": (9, 8192, 9999)}, r"in 0\.\.8191, the ids of the tokenizer, got 8192, 9999"),
        ({"token_ids": tuple(range(8192))}, "leave no position of these tokens to train on"),
    ],
)
def test_a_mask_that_cannot_be_meant_is_refused_before_the_pass(
    mask: dict[str, Any], message: str, tokens: TokenStore, neox: str, made: ActivationStore, tmp_path: Path
) -> None:
    """Oracle: rows of 32 tokens, 8,192 ids; nothing is written, and a store that is there is not read."""
    with pytest.raises(ConfigError, match=message):
        cache(tokens, neox, tmp_path / "acts", mask=MaskConfig(**mask))
    assert not (tmp_path / "acts").exists()
    with pytest.raises(ConfigError, match=r"0 or more, .*got -1"):
        MaskConfig(token_ids=(-1, 5))
    if "leave" not in message:
        with pytest.raises(ConfigError, match=message):
            made.keep(0, MaskConfig(**mask), held_out=False)


def test_a_shard_without_training_positions_adds_nothing(
    tokens: TokenStore, neox: str, truth: dict[str, Tensor], tmp_path: Path
) -> None:
    """Oracle: shards of one row, of which held-out ones have none; numpy without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = cache(tokens, neox, tmp_path / "acts", shard_tokens=CTX_LEN, max_tokens=40 * CTX_LEN)
    assert store.tokens.held_out_R[:40].any()
    keep = kept(tokens, 1, {tokens.tokenizer.separator_id})[: 40 * CTX_LEN]
    values = store.read("layers.1", 0, store.n_tokens).double().numpy()
    assert_moments(store.site("layers.1").statistics, values[keep])


@given(
    seed=st.integers(0, 2**32 - 1),
    cuts=st.lists(st.integers(0, 500), max_size=6),
    sigmas=st.sampled_from([0.0, 1.0, 100.0, 1e4]),
    n=st.integers(1, 500),
)
@hypothesis_settings(max_examples=60)
def test_moments_of_parts_are_those_of_the_whole(seed: int, cuts: list[int], sigmas: float, n: int) -> None:
    """Oracle: numpy's two passes in float64 over all rows, the mean many sigma from zero."""
    rows = np.random.default_rng(seed).normal(size=(n, 3)) + sigmas * np.array([1.0, -1.0, 0.5])
    edges = sorted({0, n, *(min(cut, n) for cut in cuts)})
    whole, half = Moments(3), Moments(3)
    for i, (start, stop) in enumerate(itertools.pairwise(edges)):
        target = whole if i % 2 else half
        target.add(torch.from_numpy(rows[start:stop]))
    whole.merge(half.n, half.mean_D, half.deviations_D, half.distances)
    whole.merge(0, np.full(3, np.nan), np.full(3, np.nan), {})
    found = whole.statistics()
    assert found.n_tokens == n
    np.testing.assert_allclose(found.mean_D.numpy(), rows.mean(0), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(found.variance_D.numpy(), rows.var(0), rtol=1e-7, atol=1e-20)
    np.testing.assert_allclose(found.mean_squared_norm, (rows**2).sum(1).mean(), rtol=1e-12)


def test_moments_of_many_bf16_rows_with_a_mean_of_100_sigma() -> None:
    """Oracle: numpy in float64; sums in fp32, or squares less the squared mean in it, would be far off."""
    rows = (torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0)) + 100).to(torch.bfloat16)
    moments = Moments(4)
    moments.add(rows)
    assert_moments(moments.statistics(), rows.double().numpy())


def test_distances_tell_of_rows_far_from_the_others() -> None:
    """Oracle: numpy's norms of the same rows about their mean."""
    rows = np.random.default_rng(0).normal(size=(20_000, 64))
    rows[:20] *= 100
    moments = Moments(64)
    moments.add(torch.from_numpy(rows))
    found = moments.statistics()
    distances = np.linalg.norm(rows - rows.mean(0), axis=1)
    assert found.median_distance == pytest.approx(np.median(distances), rel=0.1)
    assert found.largest_distance == pytest.approx(distances.max(), rel=0.1)
    assert found.share_beyond(10) == 20 / 20_000
    assert found.share_beyond(1000) == 0

"""Rows as judges number them, codes divided among files, intervals: index arithmetic."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stores import make_store

from saemill.common.errors import ConfigError
from saemill.common.ranges import parsed
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.mask import MaskConfig
from saemill.latents.codes import Codes
from saemill.latents.firing import Firing
from saemill.latents.rows import Entries, Rows


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """40 rows of 12 tokens in shards of 5 rows; an activation tells its address."""
    return make_store(tmp_path_factory.mktemp("rows"), n_rows=40, ctx_len=12, d=2, shard_tokens=60)


@settings(max_examples=40)
@given(
    ctx=st.sampled_from([None, 1, 3, 4, 12]), held_out=st.booleans(), max_tokens=st.integers(1, 600),
    first=st.integers(0, 3), limit=st.none() | st.integers(1, 300),
)  # fmt: skip
def test_places_are_those_of_the_tokens(
    store: ActivationStore, ctx: int | None, held_out: bool, max_tokens: int, first: int, limit: int | None
) -> None:
    """Oracle: a loop over the store's rows; activations that hold their own address."""
    mask = MaskConfig(first_positions=first)
    rows = Rows(store, mask, max_tokens, ctx, held_out)
    chosen = [r for r in range(40) if store.text.held_out_R[r] or not held_out][: max(1, max_tokens // 12)]
    ids = store.tokens.rows(0, 40)
    assert rows.n_rows * rows.ctx == rows.n_tokens == 12 * len(chosen)
    assert np.array_equal(rows.ids(0, rows.n_rows).reshape(-1, 12), ids[chosen])
    middle = rows.n_rows // 2
    assert np.array_equal(rows.ids(middle, middle + 1)[0], ids[chosen].reshape(-1, rows.ctx)[middle])
    wanted = [
        (place, row * 12 + pos)
        for place, (row, pos) in enumerate((row, pos) for row in chosen for pos in range(12))
        if pos >= first and ids[row, pos] != 0
    ][:limit]
    chunks = list(rows.chunks("a", limit))
    found = [
        (place, int(x[0] * 256 + x[1]))
        for chunk in chunks
        for place, x in zip(chunk.places_T.tolist(), chunk.x_TD, strict=True)
    ]
    assert found == wanted


def test_rows_that_cannot_be_cut(store: ActivationStore) -> None:
    """Oracle: the message."""
    with pytest.raises(ConfigError, match="ctx must divide the 12 tokens of the store's rows, got 5"):
        Rows(store, MaskConfig(), 100, 5, False)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 30)), unique=True),
    st.sets(st.integers(0, 30), min_size=1),
    st.integers(1, 8),
)
def test_each_part_has_its_latents_codes(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[int, int]], wanted: set[int], n: int
) -> None:
    """Oracle: Python's own sorting and filtering."""
    latents = np.array(sorted(wanted))
    codes = Codes(tmp_path_factory.mktemp("codes") / "c", latents, latents[::n])
    for chunk in (sorted(p for p in pairs if p[0] < 50), sorted(p for p in pairs if p[0] >= 50)):
        place, latent = (
            (np.array(column, np.int64) for column in zip(*chunk, strict=True)) if chunk else ([], [])
        )
        codes.add(Entries(np.array(place), np.array(latent, np.int64), np.array(latent, np.float32) + 0.5))
    for part in range(len(codes.firsts)):
        own = latents[part * n : (part + 1) * n].tolist()
        taken = codes.take(part)
        assert list(zip(taken.place_N.tolist(), taken.latent_N.tolist(), strict=True)) == sorted(
            p for p in pairs if p[1] in own
        )
        assert taken.act_N.tolist() == [latent + 0.5 for latent in taken.latent_N]
    assert not list(Path(codes.folder).iterdir())


@settings(max_examples=60)
@example([1.0, 2.0, 3.0, 4.0, 5.0], 1)
@given(st.lists(st.floats(2**-13, 8, width=32), min_size=1, max_size=60), st.integers(1, 9))
def test_intervals_have_every_activation_once(acts: list[float], ctx: int) -> None:
    """Oracle: shares that add up to the density; samples from their interval, no two of one row."""
    place_N = np.arange(len(acts)) * 2
    firing = Firing(3, place_N, np.array(acts), ctx, 10 * len(acts))
    groups = list(firing.intervals())
    assert sum(group.share for group in groups) == pytest.approx(0.1)
    for group in [firing.strongest(), *groups]:
        rows = (place_N[group.chosen] // ctx).tolist()
        assert len(set(rows)) == len(rows)
    for group in groups:
        assert all(group.low < firing.act_N[at] <= group.high for at in group.chosen)
    strongest = firing.act_N[firing.strongest().chosen]
    best_of_rows = [
        max(a for p, a in zip(place_N, acts, strict=True) if p // ctx == r) for r in set(place_N // ctx)
    ]
    assert strongest.tolist() == sorted(best_of_rows, reverse=True)[:20]
    row = int(place_N[-1] // ctx)
    wanted = torch.zeros(ctx)
    for place, act in zip(place_N, acts, strict=True):
        if place // ctx == row:
            wanted[place % ctx] = act
    assert np.allclose(firing.in_row(row), wanted)


@pytest.mark.parametrize(
    ("text", "wanted"), [("7", range(7, 8)), ("0-99", range(100)), (" 3-3", range(3, 4))]
)
def test_latents_are_numbers_and_ranges(text: str, wanted: range) -> None:
    """Oracle: Python's ranges."""
    assert parsed(text) == wanted

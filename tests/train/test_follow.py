"""Runs that follow a store: the same stream, however and whenever its shards come."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from growing import Growing
from stores import make_store
from training import config, files, killed_at

from saemill.common.errors import ConfigError, StoreError
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.followed import FollowedStore
from saemill.train.config import TrainConfig
from saemill.train.run import run
from saemill.train.stream.followed_rows import FollowedRows
from saemill.train.stream.following import open_following
from saemill.train.stream.loader import Loader

FOLLOW: dict[str, Any] = {"follow": True, "follow_tokens": 4096, "buffer_tokens": 1024, "max_tokens": None}
"""Groups of two shards of the store, windows of four blocks."""


@pytest.fixture(scope="module")
def addressed(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Synthetic activations of which dimension 0 and 1 tell the address, in five shards."""
    return make_store(tmp_path_factory.mktemp("loader"), n_rows=150, ctx_len=32, d=6, shard_tokens=1000)


def stream(store: ActivationStore, group_shards: int = 2, **changes: Any) -> Loader:
    settings = {"batch_tokens": 100, "buffer_tokens": 1024, "seed": 5, "units": None} | changes
    followed = FollowedStore(store.path, group_shards * store.shard_tokens)
    return open_following(followed, ["a", "b"], store.mask, **settings)


def addresses(loader: Loader) -> np.ndarray[Any, Any]:
    """Addresses of the whole stream, in its order."""
    rows = loader.stretch(0, loader.epoch_tokens)["a"]
    return (rows[:, 0] * 256 + rows[:, 1]).int().numpy()


def test_the_stream_is_group_after_group_of_shards(addressed: ActivationStore) -> None:
    """Oracle: the store's mask, shard by shard; values tell their address."""
    found = addresses(stream(addressed))
    start, size = 0, addressed.shard_tokens
    for first in (0, 2, 4):
        shards = range(first, min(first + 2, addressed.n_shards))
        wanted = [
            np.flatnonzero(addressed.keep_addresses(i, addressed.mask, held_out=False)) + i * size
            for i in shards
        ]
        stop = start + sum(map(len, wanted))
        assert np.array_equal(np.sort(found[start:stop]), np.concatenate(wanted))
        assert not np.array_equal(found[start:stop], np.concatenate(wanted))
        start = stop
    assert start == len(found)
    assert not np.array_equal(found, addresses(stream(addressed, seed=6)))
    assert found[:6].tolist() == PINNED


PINNED = [1448, 1199, 811, 1804, 973, 1151]


def test_a_long_row_gives_its_place_to_another_of_its_window(addressed: ActivationStore) -> None:
    """Oracle: the stream without the filter: it differs at the places of rows beyond the limit alone, and has
    rows of the same window there."""
    plain, filtered = stream(addressed), stream(addressed, norm_over_median=1.2)
    before, after = addresses(plain), addresses(filtered)
    assert isinstance(filtered.rows, FollowedRows)
    limits = filtered.rows.units.limits
    norms = {site: addressed.read(site, 0, addressed.n_tokens).norm(dim=1).numpy() for site in limits}
    first = filtered.rows.kept.per_block[: 2 * filtered.rows.kept.blocks_per_shard].sum()
    for site, limit in limits.items():
        assert limit == pytest.approx(1.2 * np.median(norms[site][before[:first]]), rel=0.01)
    may_be, is_long = (
        np.logical_or.reduce([norms[site] > limit * rounding for site, limit in limits.items()])
        for rounding in (0.996, 1.004)
    )
    changed = before != after
    assert changed.any()
    assert may_be[before[changed]].all()
    assert not is_long[before[~changed]].any()
    assert not is_long[after].any()
    assert filtered.n_left_out(filtered.epoch_tokens) == changed.sum()
    lengths = [piece.stop for piece in plain.order.pieces(0, plain.epoch_tokens)]
    ends = np.cumsum(lengths)[:-1]
    for rows, others in zip(np.split(before, ends), np.split(after, ends), strict=True):
        assert set(others) <= set(rows)


@pytest.mark.parametrize("order", [None, [3, 1, 2, 0]], ids=["ascending", "mixed"])
def test_a_growing_store_gives_the_saes_of_the_finished_one(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: list[int] | None
) -> None:
    """Oracle: the same follower on the finished store, bit by bit, with measurements on held-out text; a
    killed one goes on. Afterwards the store has no trace of the run, once it is finished."""
    changes = FOLLOW | {"eval_every": 10, "eval_tokens": 200, "save_every": 5}
    run(config(store, tmp_path / "whole", **changes))
    growing = Growing(store, tmp_path / "acts", order)
    following = TrainConfig(**_settings(config(store, tmp_path / "cut", **changes)) | {"acts": growing.path})
    growing.grows_when_waited_for(monkeypatch)
    for step in (3, 17):
        killed_at(step, following, monkeypatch)
    run(following)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert (tmp_path / "cut" / "units.json").exists()


def _settings(settings: TrainConfig) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in settings.__dataclass_fields__}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": 2, "max_tokens": None}, r"^epochs 2: follow goes through the store once"),
        ({"max_tokens": 10**6}, r"max_tokens"),
        ({"site": ("*",)}, r"with follow each site must be named in full"),
        ({"loss": "kl"}, r"^follow has no stream of whole rows"),
        ({"follow": False}, r"^follow_tokens has no effect without follow"),
    ],
    ids=str,
)
def test_what_a_follower_cannot_do_is_refused(
    store: ActivationStore, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    """Oracle: the message; no folder is made."""
    with pytest.raises((ConfigError, StoreError), match=said):
        run(config(store, tmp_path / "out", **FOLLOW | changes))
    assert not (tmp_path / "out").exists()

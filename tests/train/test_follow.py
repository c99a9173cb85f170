"""Runs that follow a store: the same stream, however and whenever its shards come."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crashes import file_hashes
from growing import Growing
from stores import make_store
from training import config, files, killed_at

from saemill.common import records
from saemill.common.errors import ConfigError, Interrupted, StoreError
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.followed import FollowedStore
from saemill.common.stores.followers import Consumed, Follower, followers_of
from saemill.common.stores.mask import TrainingMask
from saemill.train.following import Following
from saemill.train.needed import counted_by_shard, needed_of
from saemill.train.record import checkpoint
from saemill.train.record.inspect import problems
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
    for shards in ((0,), (1, 2), (3, 4)):
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


PINNED = [947, 72, 811, 578, 973, 920]


def test_a_long_row_gives_its_place_to_another_of_its_window(addressed: ActivationStore) -> None:
    """Oracle: the stream without the filter: it differs at the places of rows beyond the limit alone, and has
    rows of the same window there."""
    plain, filtered = stream(addressed), stream(addressed, norm_over_median=1.2)
    before, after = addresses(plain), addresses(filtered)
    assert isinstance(filtered.rows, FollowedRows)
    limits = filtered.rows.units.limits
    norms = {site: addressed.read(site, 0, addressed.n_tokens).norm(dim=1).numpy() for site in limits}
    first = filtered.rows.kept.per_block[: filtered.rows.kept.blocks_per_shard].sum()
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
    following = replace(config(store, tmp_path / "cut", **changes), acts=growing.path)
    growing.grows_when_waited_for(monkeypatch)
    for step in (3, 17):
        killed_at(step, following, monkeypatch)
    run(following)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert (tmp_path / "cut" / "units.json").exists()


def test_a_run_goes_on_when_its_first_shards_are_gone(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the uninterrupted run, bit by bit; the mask is not the store's, so that units need the rows."""
    changes = FOLLOW | {"mask": TrainingMask(first_positions=3), "save_every": 1}
    run(config(store, tmp_path / "whole", **changes))
    growing = Growing(store, tmp_path / "acts")
    following = replace(config(store, tmp_path / "cut", **changes), acts=growing.path)
    growing.grows_when_waited_for(monkeypatch)
    killed_at(20, following, monkeypatch)
    assert not growing.grow()
    for shard in (0, 1):
        (growing.path / "a" / "c" / str(shard) / "0").unlink()
    run(following)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_signal_while_it_waits_ends_it_with_what_it_has(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the finished store's follower, bit by bit; the signal comes before the first group is
    there, and before the second."""
    run(config(store, tmp_path / "whole", **FOLLOW))
    growing = Growing(store, tmp_path / "acts")
    following = replace(config(store, tmp_path / "cut", **FOLLOW), acts=growing.path)

    def wait(self: Following) -> None:
        self.stop.set()

    with monkeypatch.context() as patch:
        patch.setattr(Following, "wait", wait)
        with pytest.raises(Interrupted, match="while waiting for shards"):
            run(following)
        assert not (tmp_path / "cut" / "checkpoint.json").exists()
        for _ in range(3):
            growing.grow()
        with pytest.raises(Interrupted, match=r"stopped by a signal after step \d+; .* continues from the"):
            run(following)
        assert (tmp_path / "cut" / "checkpoint.json").exists()
    growing.grows_when_waited_for(monkeypatch)
    run(following)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_run_tells_the_store_what_it_needs(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the records by hand: 4 shards in groups of 2, of which the first holds the tokens to measure
    on; and a checkpoint where the run comes to the second group, once shards may be removed."""
    growing, told = Growing(store, tmp_path / "acts"), []
    changes = FOLLOW | {"eval_every": 5, "eval_tokens": 50, "save_every": 100}
    following = replace(config(store, tmp_path / "run", **changes), acts=growing.path)
    identity = store.settings.identity
    records.write(growing.path / "consumed.json", Consumed(store=identity, sites=("a",)))
    write = records.write

    def watched(path: Path, record: records.Record) -> None:
        if isinstance(record, Follower):
            saved = checkpoint.read(tmp_path / "run")
            step = None if saved is None else saved.step
            told.append((record.start, record.stop, record.n_kept, record.at_once, step))
        write(path, record)

    monkeypatch.setattr(records, "write", watched)
    growing.grows_when_waited_for(monkeypatch)
    run(following)
    n_first = sum(store.keep(shard, store.mask, held_out=False).sum() for shard in (0, 1))
    assert told == [(0, 4, 1, 4, None), (2, 4, 1, 4, -(-n_first // 256)), (4, 4, 0, 4, None)]
    growing.finish()
    run(following)
    assert list((growing.path / "followers").iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"eval_every": 0},
        {"eval_every": 5, "eval_tokens": 50},
        {"eval_every": 5, "eval_tokens": 900, "follow_tokens": 512},
        {"eval_every": 5, "eval_tokens": 900, "follow_tokens": 512, "batch_size": 1024},
        {"eval_every": 5},
        {},
    ],
)
def test_what_a_run_needs_is_known_before_there_is_a_store(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the record that the run itself writes when it begins, with shards of 512 tokens: what it needs
    to measure on, as much as it asks for or all there is, or nothing where it does not come to that, and
    batches that reach into several groups."""
    store = make_store(tmp_path / "whole", n_rows=256, ctx_len=32, d=16, shard_tokens=512)
    growing = Growing(store, tmp_path / "acts")
    following = replace(config(store, tmp_path / "run", **FOLLOW | changes), acts=growing.path)
    mask = following.mask.positions(store.mask)
    by_shard = counted_by_shard(store.tokens, store.tokens.n_rows, store.shard_tokens, mask)
    kept, together = needed_of(following, *by_shard, store.shard_tokens)
    growing.grows_when_waited_for(monkeypatch)
    killed_at(1, following, monkeypatch)
    (told,) = followers_of(growing.path, store.settings.identity).values()
    assert kept == told.n_kept
    assert together == min(told.n_kept + told.at_once, store.n_shards)
    assert bool(kept) == (changes.get("eval_every", 0) > 0)


def test_what_is_gone_is_refused_before_anything_is_lost(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the files of a run that goes on and is not trained anew when its first shards are gone; damage
    of its units, and of what the store says of it, is named."""
    growing = Growing(store, tmp_path / "acts")
    while growing.grow():
        pass
    following = replace(config(store, tmp_path / "run", **FOLLOW), acts=growing.path, save_every=1)
    killed_at(20, following, monkeypatch)
    consumed = Consumed(store=store.settings.identity, sites=("a",), first=0, stop=2)
    records.write(growing.path / "consumed.json", consumed)
    before = file_hashes(tmp_path / "run")
    with pytest.raises(StoreError, match=r"'a' of .* is consumed: its shards 0 to 1 were removed"):
        run(replace(following, resume=False))
    assert file_hashes(tmp_path / "run") == before
    (tmp_path / "run" / "units.json").write_text("{}")
    assert any("units.json" in line for line in problems(tmp_path / "run"))
    with pytest.raises(StoreError, match=r"units\.json.*--no-resume"):
        run(following)


def test_a_run_that_comes_too_late_leaves_no_record(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the refusal where shards that are read later are gone, though those of the first group are
    there; and that the store waits for nobody then, also where they go between two looks."""
    growing = Growing(store, tmp_path / "acts")
    while growing.grow():
        pass
    gone = Consumed(store=store.settings.identity, sites=("a",), first=2, stop=3)
    records.write(growing.path / "consumed.json", gone)
    following = replace(config(store, tmp_path / "run", **FOLLOW), acts=growing.path)
    with pytest.raises(StoreError, match=r"'a' of .* is consumed: its shard 2 was removed"):
        run(following)
    records.write(growing.path / "consumed.json", gone.model_copy(update={"first": 0, "stop": 0}))
    register = Following._register

    def late(self: Following) -> None:
        register(self)
        records.write(growing.path / "consumed.json", gone)

    monkeypatch.setattr(Following, "_register", late)
    with pytest.raises(StoreError, match=r"its shard 2 was removed"):
        run(following)
    assert list((growing.path / "followers").iterdir()) == []


def test_a_batch_may_reach_into_several_groups(addressed: ActivationStore) -> None:
    """Oracle: the shards that the groups of every batch lie in, by the stream's own positions, one by one."""
    for batch_tokens in (1, 100, 900, 1700, 5000):
        order = stream(addressed, group_shards=1, batch_tokens=batch_tokens).order
        most = 0
        for position in range(order.n_tokens):
            first = order.group_of(position)
            last = order.group_of(min(position + batch_tokens, order.n_tokens) - 1)
            last = max(last, min(first + 1, len(order.store.groups) - 1))
            most = max(most, order.shards_of(last).stop - order.shards_of(first).start)
        assert order.at_once(batch_tokens) == most
    assert order.at_once(5000) == addressed.n_shards


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

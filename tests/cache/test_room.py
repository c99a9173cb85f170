"""Room on the disk: what may be written, what is removed, and for whom the store waits."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from growing import Growing
from hypothesis import given
from hypothesis import strategies as st
from stores import make_store

from saemill.cache import room as rooms
from saemill.cache.claims.worker import Worker
from saemill.cache.placing import OnDisk
from saemill.cache.repair import damaged, mend
from saemill.cache.room import Room, fits, make_whole
from saemill.cache.sharing import Sharing
from saemill.cache.writer import SiteWriter
from saemill.common import records
from saemill.common.errors import ConfigError, StoreError
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.followers import Consumed, Follower, follower_path, read_consumed
from saemill.common.stores.site_records import Site

N_SHARDS = 8


@given(data=st.data(), n_shards=st.integers(1, 6), n_total=st.integers(1, 20), n_workers=st.integers(1, 4))
def test_no_order_of_workers_overfills_the_disk(
    data: st.DataObject, n_shards: int, n_total: int, n_workers: int
) -> None:
    """Oracle: a count of the shards on the disk and in the making, after every event of workers and of a
    reader that goes on in order; all are written in the end."""
    there: set[int] = set()
    making: set[int] = set()
    written: set[int] = set()
    while len(written) < n_total:
        lacking = [shard for shard in range(n_total) if shard not in written]
        free = [shard for shard in lacking if shard not in making and fits(shard, lacking, there, n_shards)]
        events = ["start"] * bool(free and len(making) < n_workers)
        events += ["end"] * bool(making) + ["read"] * bool(there)
        event = data.draw(st.sampled_from(events))
        if event == "start":
            making.add(free[0])
        elif event == "end":
            shard = data.draw(st.sampled_from(sorted(making)))
            making.remove(shard)
            there.add(shard)
            written.add(shard)
        else:
            there.remove(min(there))
        assert len(there | making) <= n_shards


@pytest.fixture
def growing(tmp_path: Path) -> Growing:
    """A store of eight shards, of which none is there."""
    store = make_store(tmp_path / "whole", n_rows=64, ctx_len=16, d=4, shard_tokens=128)
    assert store.n_shards == N_SHARDS
    return Growing(store, tmp_path / "acts")


@contextmanager
def open_room(growing: Growing, n_shards: int, sites: tuple[str, ...] = ("a", "b")) -> Iterator[Room]:
    store = ActivationStore(growing.path)
    with Worker(OnDisk(growing.path), threading.Event()) as worker:
        writers = [SiteWriter(store, Site(name, 4), worker) for name in sites]
        yield Room(store, writers, worker, n_shards * sum(writer.array.raw_bytes for writer in writers))


def register(growing: Growing, name: str, **changes: int) -> Path:
    """The record of a run, as it writes it."""
    path = follower_path(growing.path, growing.path.parent / name)
    fields = {"start": 0, "stop": N_SHARDS, "n_kept": 0, "at_once": 2} | changes
    run = str((growing.path.parent / name).absolute())
    path.parent.mkdir(exist_ok=True)
    records.write(path, Follower(store=ActivationStore(growing.path).settings.identity, run=run, **fields))
    return path


def lacking(growing: Growing) -> list[int]:
    return [i for i in range(N_SHARDS) if not (growing.path / "a" / "commits" / f"{i}.json").exists()]


def there(growing: Growing, site: str = "a") -> list[int]:
    return sorted(int(file.parent.name) for file in growing.path.glob(f"{site}/c/*/0"))


def consumed(growing: Growing) -> Consumed:
    found = read_consumed(growing.path, ActivationStore(growing.path).settings.identity)
    assert found is not None
    return found


def test_what_all_runs_have_read_is_removed_and_nothing_else(growing: Growing) -> None:
    """Oracle: the files at both sites, as the slower of two runs goes on; what one keeps stays; a late run
    that needs more holds all."""
    with open_room(growing, 4) as room:
        for _ in range(4):
            assert room.has(lacking(growing)[0], lacking(growing))
            growing.grow()
        assert not room.has(4, lacking(growing))
        assert "waiting for a run that reads them" in room.why
        register(growing, "slow", n_kept=1)
        register(growing, "quick", start=3)
        assert not room.has(4, lacking(growing))
        assert "slow, which needs those from 0 on, though there is no such folder here" in room.why
        register(growing, "slow", start=2, n_kept=1)
        assert room.has(4, lacking(growing))
        assert there(growing) == there(growing, "b") == [0, 2, 3]
        assert consumed(growing).shards == range(1, 2)
        growing.grow()
        register(growing, "slow", start=N_SHARDS)
        assert room.has(5, lacking(growing))
        assert there(growing) == [3, 4]
        assert room.wanted([5, 6]) == [5, 6]
        register(growing, "quick", start=N_SHARDS)
        assert room.wanted([5, 6]) == []
        assert room.stays_open


def test_shards_in_the_making_take_room(growing: Growing) -> None:
    """Oracle: the room: two shards, of which neither is written when a third is asked for."""
    with open_room(growing, 2) as room:
        sharing = Sharing(room.store, room.writers, room.worker, room)
        sharing.look(lambda n_tokens: None)
        claimed = sharing.claimed(lambda n_tokens: None)
        assert [share.shard for share in claimed] == [0, 1]


def test_the_advice_for_a_run_that_is_gone_helps(growing: Growing) -> None:
    """Oracle: the record that the message names is removed; then the other run is the slowest."""
    with open_room(growing, 2) as room:
        register(growing, "gone")
        register(growing, "here", start=2)
        growing.grow()
        growing.grow()
        assert not room.has(2, lacking(growing))
        Path(room.why.rpartition("remove ")[2]).unlink()
        assert room.has(2, lacking(growing))
        assert there(growing) == []


def test_a_crash_while_shards_are_removed_leaves_no_shard_uncounted(
    growing: Growing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the record of what is removed, written before the first file goes; the next process removes the
    others. Where the record was damaged since, it is found again."""
    register(growing, "run", start=3)
    with open_room(growing, 3) as room:
        for _ in range(3):
            growing.grow()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rmdir", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                room.has(3, lacking(growing))
        assert consumed(growing).shards == range(3)
        assert there(growing) == [1, 2]
    with open_room(growing, 3):
        assert there(growing) == there(growing, "b") == []
    (growing.path / "consumed.json").write_text("{}")
    with open_room(growing, 3):
        assert consumed(growing).shards == range(3)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_run_that_begins_while_shards_are_removed_keeps_them(
    growing: Growing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the files; the run's record comes just after the store has looked for records."""
    register(growing, "run", start=2)
    with open_room(growing, 2) as room:
        growing.grow()
        growing.grow()
        real = rooms.put

        def put(*arguments: object) -> None:
            real(*arguments)  # type: ignore[arg-type]
            register(growing, "late")

        monkeypatch.setattr(rooms, "put", put)
        assert not room.has(2, lacking(growing))
        assert there(growing) == [0, 1]
        assert not consumed(growing).shards


def test_a_kill_before_the_second_look_keeps_what_a_run_needs(
    growing: Growing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the files after a kill between the record and the second look, when a run has come in between;
    what is removed by then stays so."""
    register(growing, "run", start=2)
    with open_room(growing, 2) as room:
        growing.grow()
        growing.grow()
        with monkeypatch.context() as patch:
            patch.setattr(Room, "_remove", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                room.has(2, lacking(growing))
    assert consumed(growing).shards == range(2)
    late = register(growing, "late", start=1)
    with open_room(growing, 2):
        assert consumed(growing).shards == range(1)
        assert there(growing) == there(growing, "b") == [1]
    late.unlink()
    with open_room(growing, 2) as room:
        growing.grow()
        assert room.has(3, lacking(growing))
        assert consumed(growing).shards == range(2)


def test_workers_on_two_sites_share_one_record(growing: Growing) -> None:
    """Oracle: the files of each site; the record of the worker that came first has the other's site too."""
    register(growing, "run", start=2)
    with open_room(growing, 2, ("a",)) as first, open_room(growing, 2, ("b",)) as second:
        assert consumed(growing).sites == ("a", "b")
        growing.grow()
        growing.grow()
        assert first.has(2, lacking(growing))
        assert (there(growing), there(growing, "b")) == ([], [0, 1])
        second.has(2, lacking(growing))
        assert there(growing, "b") == []
        assert second.has(2, lacking(growing))


def test_what_another_worker_removes_meanwhile_is_no_damage(growing: Growing) -> None:
    """Oracle: the records of shards, after a worker has looked for damage before and mends after another one
    removes them."""
    register(growing, "run", start=2)
    with open_room(growing, 2) as first, open_room(growing, 2) as second:
        growing.grow()
        growing.grow()
        assert first.has(2, lacking(growing))
        bad = [damaged(writer) for writer in second.writers]
        assert all({0, 1} <= set(shards) for shards in bad)
        with second.worker.hold("store"):
            second.refresh()
            for writer, shards in zip(second.writers, bad, strict=True):
                mend(writer, shards)
        assert lacking(growing) == [*range(2, N_SHARDS)]


def test_less_room_than_runs_need_is_refused_with_what_they_need(growing: Growing) -> None:
    """Oracle: the message's advice, taken; what one run keeps and what another needs at once add up."""
    register(growing, "one", n_kept=2)
    register(growing, "other", at_once=4)
    with pytest.raises(
        ConfigError, match=r"needs 4 shards at once, beside the first 2 .* --max-disk (\S+) or"
    ):
        open_room(growing, 5).__enter__()
    with open_room(growing, 6):
        pass


def test_a_site_is_whole_again_when_all_is_computed_again(growing: Growing) -> None:
    """Oracle: messages and records: a removed site is refused by name, also beside others, until the record
    is taken back, which needs that nobody else is at work."""
    register(growing, "run", start=4)
    with open_room(growing, 4) as room:
        for _ in range(4):
            growing.grow()
        room.has(4, lacking(growing))
        with Worker(OnDisk(growing.path), threading.Event()), pytest.raises(StoreError, match="stop them"):
            make_whole(room.store, ["a", "b"], room.worker)
        with pytest.raises(StoreError, match=r"'a' of .* is consumed: its shards 0 to 3 were removed"):
            room.store.site("a")
        make_whole(room.store, ["b"], room.worker)
        assert consumed(growing).sites == ("a",)
        make_whole(room.store, ["a"], room.worker)
        assert not (growing.path / "consumed.json").exists()

"""Stores that are written to a bucket: the same files as on a disk, whatever fails on the way."""

import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from caching import CTX_LEN, SHARD, cache, changed_model
from crashes import file_hashes
from launching import ENVIRONMENT
from object_store import S3
from stores import make_store
from waiting import wait_until

from saemill.cache.claims.owner import Owner
from saemill.cache.claims.worker import Lost, Worker
from saemill.cache.config import CacheConfig
from saemill.cache.placing import InBucket
from saemill.cache.spare import Spare
from saemill.cache.writer import SiteWriter
from saemill.common import durable
from saemill.common.errors import ConfigError, DataError, DiskError, StoreError
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.site_records import Site
from saemill.common.stores.tokens import TokenStore
from saemill.plan.run import plan
from saemill.show import problems

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS: dict[str, Any] = {"layers": (0, 1), "max_tokens": 4 * SHARD}


@pytest.fixture(scope="module")
def whole(tokens: TokenStore, neox: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store on a disk, two sites of four shards each."""
    return cache(tokens, neox, tmp_path_factory.mktemp("whole") / "acts", **OPTIONS).path


def in_bucket(s3: S3, prefix: str, folder: Path) -> dict[str, str]:
    """Hashes of the objects below a prefix, by name."""
    s3.fetch(prefix, folder)
    return file_hashes(folder)


@pytest.mark.parametrize("form", [{}, {"dtype": "int8", "compression": "lz4"}], ids=["bf16", "int8"])
def test_a_bucket_holds_what_a_disk_would(
    s3: S3, form: dict[str, str], tokens: TokenStore, neox: str, whole: Path, tmp_path: Path
) -> None:
    """Oracle: the store on a disk, object by object, a site added later; then no request that writes."""
    expected = file_hashes(whole)
    if form:
        expected = file_hashes(cache(tokens, neox, tmp_path / "disk", **OPTIONS, **form).path)
    address, name = Path(f"s3://bucket/{len(form)}/acts"), f"{len(form)}/acts"
    tokens_there = Path(s3.put(tokens.path, f"{len(form)}/tokens"))
    cache(tokens_there, neox, address, **OPTIONS | {"layers": (0,)}, **form)
    store = cache(tokens_there, neox, address, **OPTIONS, **form)
    assert store.sites == ["layers.0", "layers.1"]
    assert in_bucket(s3, name, tmp_path / "fetched") == expected
    assert problems(address) == []
    writes: list[str] = []
    s3.watch = lambda method, path, headers: (
        writes.append(path) if method in ("PUT", "DELETE") and "/claims/" not in path else None
    )
    cache(tokens_there, neox, address, **OPTIONS, **form)
    assert writes == []
    assert list((tmp_path / "cache" / "saemill" / "unfinished").glob("*/*")) == []


def test_writes_that_fail_for_a_while_are_tried_again(
    s3: S3, tokens: TokenStore, neox: str, whole: Path, tmp_path: Path
) -> None:
    """Oracle: the store on a disk. Bodies are cut, lost and sent for nothing; servers are busy; answers are
    lost after the object was written, so that the second attempt finds it there."""
    n_puts = n_cut = 0
    writes = False

    def lose(method: str, path: str, body: bytes) -> bytes | None:
        nonlocal n_puts, n_cut, writes
        if "/claims/" in path:  # of another thread, which would take the one good answer of five
            return body
        writes = method == "PUT"
        if not writes:
            return body
        n_puts += 1
        if n_puts % 5 == 1:
            n_cut += 1
            return body[:-1]
        return None if n_puts % 5 == 2 else body

    def fault(path: str, answer: Any) -> Any:
        fails = writes and "/claims/" not in path
        return {3: (503, b"busy"), 4: None}.get(n_puts % 5, answer) if fails else answer

    s3.lose, s3.fault = lose, fault
    cache(tokens, neox, Path("s3://bucket/faulty/acts"), **OPTIONS)
    s3.calm()
    assert in_bucket(s3, "faulty/acts", tmp_path / "fetched") == file_hashes(whole)
    assert n_cut > 10


def test_a_bucket_that_fails_for_good_at_any_moment_is_gone_on_with(
    s3: S3, tokens: TokenStore, neox: str, whole: Path, tmp_path: Path
) -> None:
    """Oracle: the message, and the store on a disk after the same call, for a failure from any write on."""
    n_puts = 0

    def count(method: str, path: str, body: bytes) -> bytes | None:
        nonlocal n_puts
        n_puts += method == "PUT" and "/claims/" not in path
        return None if method == "PUT" and n_puts > moment else body

    moment = 10**9
    s3.lose = count
    cache(tokens, neox, Path("s3://bucket/whole/acts"), **OPTIONS)
    total, expected = n_puts, file_hashes(whole)
    assert total == len(expected) + 2, "records of the sites are written again when their roles are known"
    for moment in (0, 5, total - 10, total - 1):
        n_puts, address = 0, Path(f"s3://bucket/broken-{moment}/acts")
        s3.lose = count
        with pytest.raises(DiskError, match=f"s3://bucket/broken-{moment}/acts/.* cannot be written after 6"):
            cache(tokens, neox, address, **OPTIONS)
        s3.calm()
        cache(tokens, neox, address, **OPTIONS)
        assert in_bucket(s3, f"broken-{moment}/acts", tmp_path / str(moment)) == expected


def command(tokens: TokenStore, neox: str, address: str) -> list[str]:
    return [
        sys.executable, "-m", "saemill", "cache", str(tokens.path), "--model", neox, "--layers", "0,1",
        "--shard-tokens", str(8 * CTX_LEN), "-o", address,
    ]  # fmt: skip


def test_killed_and_many_workers_write_the_same_store(
    s3: S3, tokens: TokenStore, neox: str, tmp_path: Path
) -> None:
    """Oracle: the store on a disk, each object of which is sent once. One process is killed as it writes;
    then two go on with cache folders of their own, as on other machines, with the bucket alone in common."""
    expected = file_hashes(
        cache(tokens, neox, tmp_path / "disk", layers=(0, 1), shard_tokens=8 * CTX_LEN, batch_size=16).path
    )
    sent: list[str] = []
    s3.watch = lambda method, path, headers: (
        sent.append(path) if method == "PUT" and ("/commits/" in path or "/c/" in path) else None
    )
    address = "s3://bucket/killed/acts"
    environment = ENVIRONMENT | s3.environment | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    first = subprocess.Popen(command(tokens, neox, address), stdout=subprocess.DEVNULL, env=environment)
    wait_until(lambda: len(sent) >= 17, first)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    n_before = len(sent)
    caches = [tmp_path / "another", tmp_path / "elsewhere"]
    workers = [
        subprocess.Popen(
            command(tokens, neox, address), stdout=subprocess.PIPE, text=True,
            env=environment | {"XDG_CACHE_HOME": str(folder)},
        )
        for folder in caches
    ]  # fmt: skip
    for worker in workers:
        stdout, _ = worker.communicate()
        assert worker.returncode == 0
        assert f"{address}: layers.0, layers.1 complete; " in stdout
        assert " of them by other workers" in stdout
    again = sent[n_before:]
    assert len(again) == len({*again}) >= 40
    assert len(sent) - len({*sent}) <= 2, "the killed process may have sent a shard without its record"
    assert in_bucket(s3, "killed/acts", tmp_path / "fetched") == expected


@pytest.mark.parametrize("same", [False, True], ids=["other bytes", "same bytes"])
def test_a_worker_that_wakes_up_late_spoils_nothing(
    same: bool, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a shard's record holds the hash of its object, or there is none and no manifest, when a worker
    is stopped before any of its requests, and one that takes it for dead writes the shard meanwhile."""
    made = make_store(tmp_path / "made", 48, 16, 8, 256)
    for name in ("manifest.json", "commits/1.json", "c/1/0"):
        (made.path / "a" / name).unlink()
    values = torch.randn(256, 8)
    for moment in range(40):
        name = f"late-{same}-{moment}"
        address, steps = s3.put(made.path, name), 0

        def step(method: str, path: str, body: bytes, moment: int = moment, address: str = address) -> bytes:
            nonlocal steps
            steps += 1
            if steps == moment + 1:
                s3.lose = lambda method, path, body: body
                with monkeypatch.context() as other:
                    other.setenv("XDG_CACHE_HOME", str(tmp_path / f"other-{moment}"))
                    other.setattr(Owner, "is_gone", lambda self: True)
                    write_shard(address, values if same else values + 1)
            return body

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"late-{moment}"))
        with suppress(Lost, StoreError):
            write_shard(address, values, lambda step=step: setattr(s3, "lose", step), s3.calm)
        s3.calm()
        s3.fetch(name, tmp_path / name)
        commit = tmp_path / name / "a" / "commits" / "1.json"
        if commit.exists():
            data = tmp_path / name / "a" / "c" / "1" / "0"
            assert durable.hash_file(data) == durable.read_json(commit)["xxh3"]
        assert commit.exists() or not (tmp_path / name / "a" / "manifest.json").exists()
        if steps <= moment:
            assert moment >= 4
            assert commit.exists()
            return
    raise AssertionError("the writing never ended")


def write_shard(
    address: str, values: torch.Tensor, begin: Any = lambda: None, end: Any = lambda: None
) -> None:
    """Write shard 1 of site `a` and finish the site, between the calls of two functions."""
    place = InBucket(address)
    with Worker(place, threading.Event()) as worker, worker.hold("store"):
        writer = SiteWriter(place.opened(), Site("a", 8), worker)
        claim = worker.claim("shard-1")
        assert claim
        begin()
        writer.write(1, values, claim, Spare())
        writer.finish()
        end()


def test_what_a_bucket_cannot_have_is_refused(s3: S3, tokens: TokenStore, neox: str, tmp_path: Path) -> None:
    """Oracle: the refusals, which name the address, before anything is written."""
    s3.put_file("other/notes.txt", b"x")
    with pytest.raises(StoreError, match=r"s3://bucket/other holds other files \(notes.txt\); choose a new"):
        cache(tokens, neox, Path("s3://bucket/other"), **OPTIONS)
    with pytest.raises(ConfigError, match="max_disk has no effect: s3://bucket/acts is on no disk, and"):
        CacheConfig(tokens=tokens.path, model=neox, out=Path("s3://bucket/acts"), layers=(1,), max_disk="1GB")
    address = Path("s3://bucket/settled/acts")
    cache(tokens, neox, address, **OPTIONS)
    with pytest.raises(ConfigError, match=r"s3://bucket/settled/acts was made with other settings:\n  dtype"):
        cache(tokens, neox, address, dtype="fp32", **OPTIONS)


def test_too_little_room_for_shards_on_their_way_is_refused(
    s3: S3, tokens: TokenStore, neox: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Oracle: a shard of 512 tokens of 32 values of 2 bytes, beside the records and the tokens, of which
    the outlook tells; what the mirror has already counts. Nothing is written where it is refused, neither
    here nor there."""
    shard, address = SHARD * 32 * 2, Path("s3://bucket/tight/acts")
    settings = OPTIONS | {"shard_tokens": SHARD, "device": "cpu"}
    config = CacheConfig(tokens=tokens.path, model=neox, out=address, **settings)
    (outlook,) = [planned.outlook for planned in plan({"cache": config}, measures=False)]
    rest = outlook.disk["records"] + outlook.disk["copy of the tokens"]
    told = (
        f"{(shard + rest) / 2**20:,.1f} MiB at once on the disk here, in {tmp_path / 'cache' / 'saemill'}, "
    )
    assert told in capsys.readouterr().out
    free = shard + rest - 1000  # the mirror has a record of its own
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=free))
    with pytest.raises(ConfigError, match=r"are needed in .*, .* are free: shards of s3://bucket/tight/acts"):
        cache(tokens, neox, address, **settings)
    with pytest.raises(ConfigError, match="choose another disk by XDG_CACHE_HOME"):
        plan({"cache": config}, measures=False)
    with pytest.raises(ConfigError, match="choose another disk by XDG_CACHE_HOME"):
        InBucket("s3://bucket/tight/acts").check_room(0, free + 1, "")
    assert in_bucket(s3, "tight/acts", tmp_path / "fetched") == {}
    free = shard + rest
    cache(tokens, neox, address, **settings)
    free = shard + rest // 4  # of what is estimated, some may be less
    cache(tokens, neox, address, **settings)


def test_a_damaged_bucket_is_mended(
    s3: S3, tokens: TokenStore, neox: str, whole: Path, tmp_path: Path
) -> None:
    """Oracle: the store on a disk, after objects of each kind were changed, cut and removed."""
    address = s3.put(whole, "mended")
    shard = (whole / "layers.0/c/3/0").read_bytes()
    s3.put_file("mended/layers.0/c/3/0", bytes([shard[0] ^ 1]) + shard[1:])
    s3.put_file("mended/layers.0/c/1/0", shard[:-1])
    for name in ("layers.1/c/3/0", "layers.0/commits/2.json", "layers.1/manifest.json", "zarr.json"):
        s3.delete(f"mended/{name}")
    s3.put_file("mended/tokens/segments.parquet", b"none")
    with pytest.raises(StoreError):
        ActivationStore(address).site("layers.0")
    cache(tokens, neox, Path(address), **OPTIONS)
    assert in_bucket(s3, "mended", tmp_path / "fetched") == file_hashes(whole)


def test_a_store_that_is_given_up_is_removed_by_the_last(
    s3: S3, tokens: TokenStore, neox: str, tmp_path: Path
) -> None:
    """Oracle: the objects, after a model that computes NaN was given up: all while another worker is there,
    then none."""
    weight = "gpt_neox.layers.1.mlp.dense_4h_to_h.weight"
    model = changed_model(neox, tmp_path / "model", weight, lambda w: w * torch.nan)
    address = "s3://bucket/given-up/acts"
    place = InBucket(address)
    with Worker(place, threading.Event()), pytest.raises(DataError, match="NaN or infinite"):
        cache(tokens, model, Path(address), **OPTIONS | {"layers": (1,)})
    assert {"zarr.json", "tokens/manifest.json"} <= in_bucket(s3, "given-up/acts", tmp_path / "there").keys()
    with pytest.raises(DataError, match="NaN or infinite"):
        cache(tokens, model, Path(address), **OPTIONS | {"layers": (1,)})
    assert in_bucket(s3, "given-up/acts", tmp_path / "after") == {}

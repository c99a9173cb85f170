"""The local cache of a store in a bucket: what is read once is not asked for again, within its bound."""

import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from keeping import fill
from object_store import S3
from stores import make_store

from saemill.assess.config import AssessConfig
from saemill.assess.run import run as assess
from saemill.common.errors import ConfigError, StoreError
from saemill.common.stores import assessments
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.local_cache import HASH_BYTES, LocalCache
from saemill.compare.activations import Stores
from saemill.train.config import TrainConfig
from saemill.train.run import run as train

N_TOKENS, D = 400 * 16, 8
BLOCK_BYTES = 256 * D * 2


def local_store(folder: Path, form: tuple[str, str | None] = ("bf16", None)) -> ActivationStore:
    values = torch.randn(N_TOKENS, D, generator=torch.Generator().manual_seed(1))
    return make_store(folder, n_rows=400, ctx_len=16, d=D, shard_tokens=1024, values_TD=values, form=form)


def trained(acts: Path | str, out: Path, **settings: object) -> bytes:
    config = TrainConfig(
        acts=Path(acts), out=out, site=("a",), k=(2,), num_latents=(16,), batch_size=256, epochs=3,
        device="cpu", **settings,  # type: ignore[arg-type]
    )  # fmt: skip
    (folder,) = train(config)
    return (folder / "sae.safetensors").read_bytes()


def kept_bytes(cache: Path) -> int:
    return sum(f.stat().st_size for f in (cache / "saemill" / "blocks").glob("*/*/*"))


@pytest.mark.parametrize("form", [("bf16", None), ("int8", "zstd")])
def test_later_epochs_read_nothing_over_the_network(
    s3: S3, tmp_path: Path, form: tuple[str, str | None]
) -> None:
    """Oracle: the SAE trained from the disk, byte by byte; the requests for shards, each range once."""
    local = local_store(tmp_path / "acts", form)
    address = s3.put(local.path, f"epochs-{form[0]}")
    asked: list[tuple[str, str]] = []
    s3.watch = lambda method, path, headers: asked.append((path, headers.get("range", "")))
    expected = trained(local.path, tmp_path / "disk")
    assert trained(address, tmp_path / "first") == expected
    shards = [each for each in asked if "/a/c/" in each[0]]
    assert len(shards) >= 25
    assert len(shards) == len(set(shards))
    asked.clear()
    assert trained(address, tmp_path / "second") == expected
    assert [path for path, _ in asked if "/a/c/" in path] == []


def test_an_assessment_and_a_comparison_read_each_block_once(s3: S3, tmp_path: Path) -> None:
    """Oracle: the assessment of the store on a disk; the requests for shards, none after the first command;
    the refusals of the setting where no store is in a bucket."""
    local = local_store(tmp_path / "acts")
    trained(local.path, tmp_path / "run")
    address = Path(s3.put(local.path, "assessed"))
    asked: list[str] = []
    s3.watch = lambda method, path, headers: asked.append(f"{path} {headers.get('range')}")

    def assessed(acts: Path, name: str, **settings: Any) -> Any:
        config = AssessConfig(
            run=tmp_path / "run", acts=acts, with_model=False, out=tmp_path / name, device="cpu", **settings
        )
        assess(config)
        return assessments.load(tmp_path / name).variants

    expected = assessed(local.path, "disk")
    assert assessed(address, "first") == expected
    shards = [each for each in asked if "/a/c/" in each]
    assert len(shards) == len(set(shards)) > 0
    asked.clear()
    assert assessed(address, "second", local_cache="1GB") == expected
    assert [each for each in asked if "/a/c/" in each] == []
    with pytest.raises(ConfigError, match=r"local_cache has no effect: .*acts is on a disk; leave it out"):
        assessed(local.path, "refused", local_cache="1GB")
    assert Stores((local.path, address), 1000, "1GB").stores[1].mirror is not None
    with pytest.raises(ConfigError, match=r"local_cache has no effect: .*acts is on a disk; leave it out"):
        Stores((local.path,), 1000, "1GB")


def test_no_more_is_kept_than_is_allowed(s3: S3, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the bytes of the files, the SAE from the disk, and the requests where none are kept."""
    local = local_store(tmp_path / "acts")
    address = s3.put(local.path, "bounded")
    expected = trained(local.path, tmp_path / "disk")
    bound = 7 * (BLOCK_BYTES + HASH_BYTES) + 100
    assert trained(address, tmp_path / "some", local_cache=str(bound)) == expected
    assert kept_bytes(tmp_path / "cache") == 7 * (BLOCK_BYTES + HASH_BYTES)
    assert capsys.readouterr().out.count("is full") == 1
    before = s3.n_requests
    assert trained(address, tmp_path / "none", local_cache="0") == expected
    assert s3.n_requests - before >= 3 * 25


def test_a_damaged_range_is_read_again(s3: S3, tmp_path: Path) -> None:
    """Oracle: the store on the disk, for each way in which a kept file can be damaged."""
    local = local_store(tmp_path / "acts")
    remote = ActivationStore(s3.put(local.path, "rotten"))
    assert remote.cache_locally(10**9)
    damages: list[Callable[[bytes], bytes]] = [
        lambda b: b[:-1], lambda b: b"", lambda b: bytes(len(b)), lambda b: bytes([b[0] ^ 1]) + b[1:],
    ]  # fmt: skip
    expected = local.read("a", 0, 1024)
    for damage in damages:
        assert torch.equal(remote.read("a", 0, 1024), expected)
        files = list((tmp_path / "cache" / "saemill" / "blocks").glob("*/*/*"))
        assert len(files) == 4
        for file in files:
            file.write_bytes(damage(file.read_bytes()))
    before = s3.n_requests
    assert torch.equal(remote.read("a", 0, 1024), expected)
    assert s3.n_requests - before == 4


def test_a_cache_that_cannot_be_read_is_left(
    s3: S3, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the store on the disk; a folder in the place of each kept file is told of once."""
    local = local_store(tmp_path / "acts")
    remote = ActivationStore(s3.put(local.path, "unreadable"))
    assert remote.cache_locally(10**9)
    expected = local.read("a", 0, 1024)
    remote.read("a", 0, 1024)
    for file in (tmp_path / "cache" / "saemill" / "blocks").glob("*/*/*"):
        file.unlink()
        file.mkdir()
    for _ in range(2):
        assert torch.equal(remote.read("a", 0, 1024), expected)
    assert capsys.readouterr().out.count("are read from where it lies") == 1


@pytest.mark.parametrize("form", [("bf16", None), ("bf16", "zstd")])
def test_wrong_bytes_that_came_are_not_kept(s3: S3, tmp_path: Path, form: tuple[str, str | None]) -> None:
    """Oracle: the store on the disk, by the same command again, after an answer that was wrong once."""
    local = local_store(tmp_path / "acts", form)
    address = s3.put(local.path, f"wrong-{form[1]}")
    remote = ActivationStore(address)
    remote.cache_locally(10**9)
    s3.fault = lambda path, answer: (answer[0], answer[1][:-1] + bytes([answer[1][-1] ^ 1]))
    with pytest.raises(StoreError, match=r"block \d (differs|is damaged)"):
        remote.read("a", 0, 1024)
    s3.calm()
    again = ActivationStore(address)
    again.cache_locally(10**9)
    assert torch.equal(again.read("a", 0, 1024), local.read("a", 0, 1024))


def test_a_cache_that_is_cleared_away_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: what is read, before and after all of it was removed under a process that reads it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    content = np.arange(100, dtype=np.uint8)
    cache = LocalCache("s3://cleared", ["object"], 10**6)
    cache.keep("object", 0, content)
    shutil.rmtree(tmp_path / "saemill")
    assert cache.read("object", 0, 100) is None
    cache.keep("object", 0, content)
    kept = cache.read("object", 0, 100)
    assert kept is not None
    assert (kept == content).all()


def test_what_has_changed_is_not_taken_from_the_cache(s3: S3, tmp_path: Path) -> None:
    """Oracle: the other store, in the place of the first, whose ranges are gone."""
    first = local_store(tmp_path / "first")
    other = make_store(tmp_path / "other", n_rows=400, ctx_len=16, d=D, shard_tokens=1024)
    remote = ActivationStore(s3.put(first.path, "changing"))
    remote.cache_locally(10**9)
    remote.read("a", 0, 1024)
    remote = ActivationStore(s3.put(other.path, "changing"))
    remote.cache_locally(10**9)
    assert kept_bytes(tmp_path / "cache") == 0
    assert torch.equal(remote.read("a", 0, 1024), other.read("a", 0, 1024))


def test_stores_that_nobody_reads_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: which ranges are there: those of a store that is read stay, of the others the oldest goes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    content = np.arange(1000, dtype=np.uint16).view(np.uint8)
    n_bytes = 2 * (len(content) + HASH_BYTES)

    def opened(address: str) -> LocalCache:
        return LocalCache(address, ["object"], n_bytes)

    held = opened("s3://held")
    held.keep("object", 0, content)
    for number, address in enumerate(("s3://old", "s3://new")):
        cache = opened(address)
        cache.keep("object", 0, content)
        assert (cache.read("object", 0, len(content)) == content).all(), "the one before made room"
        os.utime(cache.folder, (number, number))
        del cache
    assert (held.read("object", 0, len(content)) == content).all()
    assert opened("s3://old").read("object", 0, len(content)) is None
    assert opened("s3://new").read("object", 0, len(content)) is not None
    held.keep("object", 1, content)
    assert held.read("object", 1, len(content) + 1) is not None
    held.keep("object", 2, content)
    assert held.read("object", 2, len(content) + 2) is None, "there is no room, and all is being read"


def test_processes_share_one_bound(tmp_path: Path) -> None:
    """Oracle: the bytes of the files, which two processes write at once; each as it was written. What a kill
    leaves half written is cleared away, and counted no more."""
    bound = 120 * (500 + HASH_BYTES)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=fill, args=(str(tmp_path), bound, seed)) for seed in (1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    files = list((tmp_path / "saemill" / "blocks").glob("*/*/*"))
    assert len(files) == 120
    for file in files:
        start = int(file.name.partition("-")[0])
        assert file.read_bytes()[:-HASH_BYTES] == bytes([start % 251]) * 500
    used = tmp_path / "saemill" / "blocks" / "used"
    used.write_text("")
    files[0].with_name("0-9.partial").write_bytes(b"x")
    files[0].unlink()
    fill(str(tmp_path), bound, 3)
    assert int(used.read_text()) == kept_bytes(tmp_path) == bound


def test_a_cache_that_would_have_no_effect_is_refused(tmp_path: Path) -> None:
    """Oracle: the refusals."""
    local = local_store(tmp_path / "acts")
    with pytest.raises(ConfigError, match=r"local_cache has no effect: .*acts is on a disk; leave it out"):
        trained(local.path, tmp_path / "run", local_cache="1GB")
    with pytest.raises(ConfigError, match="local_cache must be a size, as 200GB"):
        trained(local.path, tmp_path / "run", local_cache="much")

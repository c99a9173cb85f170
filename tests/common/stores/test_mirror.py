"""Stores in an object store: what is read of them, and what is not taken for it."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from object_store import S3, Answer
from stores import make_store

from saemill.common.errors import ConfigError, DiskError, MissingError, StoreError
from saemill.common.stores import mirror
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.tokens import TokenStore
from saemill.hub.push import push
from saemill.pipeline.stages import check_input
from saemill.show import describe, problems
from saemill.slurm import progress
from saemill.train.config import TrainConfig
from saemill.train.run import run as train

N_TOKENS, D = 400 * 16, 8


def local_store(folder: Path, form: tuple[str, str | None] = ("bf16", None)) -> ActivationStore:
    values = torch.randn(N_TOKENS, D, generator=torch.Generator().manual_seed(1))
    return make_store(folder, n_rows=400, ctx_len=16, d=D, shard_tokens=1024, values_TD=values, form=form)


@pytest.mark.parametrize("form", [("bf16", None), ("fp32", "zstd"), ("int8", "lz4")])
def test_an_object_store_holds_what_the_disk_did(
    s3: S3, tmp_path: Path, form: tuple[str, str | None]
) -> None:
    """Oracle: the same store on the disk, activation by activation, norm by norm; every hash."""
    local = local_store(tmp_path / "acts", form)
    address = s3.put(local.path, f"{form[0]}/acts")
    remote = ActivationStore(address)
    assert remote.fingerprint == local.fingerprint
    assert remote.sites == local.sites
    assert torch.equal(remote.read("a", 0, N_TOKENS), local.read("a", 0, N_TOKENS))
    assert np.array_equal(remote.array("b").norms(3), local.array("b").norms(3))
    assert problems(Path(address)) == []
    shards = [path for path in remote.path.rglob("0") if "tokens" not in path.parts]
    assert not shards, "shards stay where they are"


def test_training_is_the_same(s3: S3, tmp_path: Path) -> None:
    """Oracle: the SAE that the store on the disk gives, byte for byte; the run names the address."""
    local = local_store(tmp_path / "acts")
    address = s3.put(local.path, "trained")
    saes = []
    for number, acts in enumerate((str(local.path), address)):
        config = TrainConfig(
            acts=Path(acts), out=tmp_path / f"run-{number}", site=("a",), k=(2,), num_latents=(16,),
            batch_size=256, device="cpu",
        )  # fmt: skip
        (folder,) = train(config)
        saes.append((folder / "sae.safetensors").read_bytes())
    assert saes[0] == saes[1]
    assert f'"{address}"' in (tmp_path / "run-1" / "finished.json").read_text()
    assert describe(Path(address)).startswith(f"activation store {address}\n")


def test_reads_that_fail_for_a_while_are_tried_again(s3: S3, tmp_path: Path) -> None:
    """Oracle: the store on the disk; failures are those of a busy server, a lost connection, a short body."""
    local = local_store(tmp_path / "acts")
    remote = ActivationStore(s3.put(local.path, "failing"))
    calls: list[str] = []

    def now_and_then(path: str, answer: Answer) -> Answer | None:
        calls.append(path)
        s3.cut_at = 7 if len(calls) % 4 == 3 else None
        return {1: (503, b"busy"), 2: None}.get(len(calls) % 4, answer)

    s3.fault = now_and_then
    assert torch.equal(remote.read("a", 0, 700), local.read("a", 0, 700))
    assert len(calls) > 8


def test_what_stays_unreachable_is_an_error(s3: S3, tmp_path: Path) -> None:
    """Oracle: the messages, and the number of attempts."""
    address = s3.put(local_store(tmp_path / "acts").path, "lost")
    remote = ActivationStore(address)
    before = s3.n_requests
    s3.fault = lambda path, answer: (500, b"")
    with pytest.raises(
        DiskError, match=f"{address}/a/c/0/0 cannot be read after 6 attempts: .*; run the same"
    ):
        remote.read("a", 0, 1)
    assert s3.n_requests - before == 6
    s3.fault = lambda path, answer: (403, b"<Error><Code>AccessDenied</Code></Error>")
    with pytest.raises(ConfigError, match=r"may not be read: .*; give credentials that may"):
        remote.read("a", 0, 1)


def test_wrong_bytes_are_never_taken(s3: S3, tmp_path: Path) -> None:
    """Oracle: the hash of the block, the address in the message."""
    address = s3.put(local_store(tmp_path / "acts").path, "flipped")
    remote = ActivationStore(address)
    s3.fault = lambda path, answer: (answer[0], bytes([answer[1][0] ^ 1]) + answer[1][1:])
    with pytest.raises(
        StoreError, match=rf"{address}/a/c/0/0: block \d differs from its hash. `saemill verify {address}`"
    ):
        remote.read("a", 0, 1)


def test_objects_that_are_missing_or_short_are_named(s3: S3, tmp_path: Path) -> None:
    """Oracle: the messages on opening, as of a disk."""
    local = local_store(tmp_path / "acts")
    address = s3.put(local.path, "short")
    shard = (local.path / "a/c/1/0").read_bytes()
    s3.put_file("short/a/c/1/0", shard[:-2])
    with pytest.raises(StoreError, match=rf"{address}/a/c/1/0: file has {len(shard) - 2:,} bytes, expected"):
        ActivationStore(address).site("a")
    for name in ("manifest.json", "commits/3.json"):
        s3.delete(f"short/a/{name}")
    assert f"a: unfinished, {local.n_shards - 1} of {local.n_shards} shards" in describe(Path(address))
    assert [line for line in problems(Path(address)) if "a shard 1: file has" in line]
    s3.put_file("short/a/manifest.json", (local.path / "a/manifest.json").read_bytes())
    s3.delete("short/a/c/1/0")
    with pytest.raises(StoreError, match=f"{address}/a/c/1/0: file is missing"):
        ActivationStore(address).site("a")
    assert [line for line in problems(Path(address)) if "a shard 1: file is missing" in line]
    with pytest.raises(MissingError, match="s3://bucket/nowhere holds no store; name the folder"):
        ActivationStore("s3://bucket/nowhere")
    with pytest.raises(MissingError, match="s3://nobucket/acts: there is no such bucket; make it first"):
        ActivationStore("s3://nobucket/acts")


def test_tokens_are_read_at_an_address(s3: S3, tmp_path: Path) -> None:
    """Oracle: the same tokens on the disk; what lacks there is named."""
    local = local_store(tmp_path / "acts").tokens
    address = s3.put(local.path, "tokens")
    remote = TokenStore(address)
    assert (remote.fingerprint, remote.named) == (local.fingerprint, address)
    assert np.array_equal(remote.rows(0, 400), local.rows(0, 400))
    assert np.array_equal(remote.held_out_R, local.held_out_R)
    assert describe(Path(address)).startswith(f"token store {address}\n")
    assert problems(Path(address)) == []
    before = s3.n_requests
    assert TokenStore(address).fingerprint == local.fingerprint
    assert s3.n_requests - before == 1, "the list alone"
    s3.delete("tokens/segments.parquet")
    assert any(f"{address}/segments.parquet: file is missing" in line for line in problems(Path(address)))
    with pytest.raises(StoreError, match=r"segments.parquet: file is missing"):
        TokenStore(address)


def test_verify_fetches_a_mirror_anew(s3: S3, tmp_path: Path) -> None:
    """Oracle: the store on the disk. Files of the mirror are damaged, and none in the bucket."""
    local = local_store(tmp_path / "acts")
    address = s3.put(local.path, "acts")
    remote = ActivationStore(address)
    remote.array("a").norms(0)
    for name in ("tokens/tokens/c/0/0", "a/manifest.json", "a/commits/0.json"):
        content = bytearray((remote.path / name).read_bytes())
        content[50] ^= 1
        (remote.path / name).write_bytes(content)
    with pytest.raises(StoreError, match=r"manifest\.json is damaged"):
        ActivationStore(address).array("a")
    assert problems(Path(address)) == []
    again = ActivationStore(address)
    assert torch.equal(again.read("a", 0, 100), local.read("a", 0, 100))
    assert np.array_equal(again.array("a").norms(0), local.array("a").norms(0))


def test_a_mirror_follows_its_address(s3: S3, tmp_path: Path) -> None:
    """Oracle: the sites that are there each time; what did not change is not fetched again."""
    local = local_store(tmp_path / "acts")
    address = s3.put(local.path, "followed")
    assert ActivationStore(address).sites == ["a", "b"]
    before = s3.n_requests
    assert ActivationStore(address).sites == ["a", "b"]
    assert s3.n_requests - before == 1, "the list alone"
    s3.delete("followed/b/manifest.json")
    assert ActivationStore(address).sites == ["a"]
    s3.put_file("followed/b/manifest.json", (local.path / "b/manifest.json").read_bytes())
    store = ActivationStore(address)
    assert store.sites == ["a", "b"]
    (store.path / mirror.OBJECTS).write_text("{")
    assert torch.equal(ActivationStore(address).read("b", 0, 9), local.read("b", 0, 9))


def test_an_object_that_changes_under_a_reader(s3: S3, tmp_path: Path) -> None:
    """Oracle: the refusal of a block and of a record that are not those listed; then the store as it was."""
    local = local_store(tmp_path / "acts")
    address = s3.put(local.path, "changing")
    remote = ActivationStore(address)
    commit = (local.path / "a/commits/0.json").read_bytes()
    for key in ("changing/a/c/0/0", "changing/a/commits/0.json"):
        s3.put_file(key, b"x" * 10_000)
    with pytest.raises(StoreError, match=f"{address}/a/c/0/0 has changed since it was listed; run the same"):
        remote.read("a", 0, 1)
    with pytest.raises(StoreError, match=f"{address}/a/commits/0.json has changed since it was listed"):
        remote.array("a").norms(0)
    s3.put_file("changing/a/c/0/0", (local.path / "a/c/0/0").read_bytes())
    s3.put_file("changing/a/commits/0.json", commit)
    again = ActivationStore(address)
    assert np.array_equal(again.array("a").norms(0), local.array("a").norms(0))
    (again.path / "sites/c.json").write_text("left by a process that was killed")
    assert ActivationStore(address).sites == ["a", "b"]
    assert not (again.path / "sites/c.json").exists()


def test_every_command_takes_an_address_or_says_why_not(s3: S3, tmp_path: Path) -> None:
    """Oracle: what the commands do with the store on the disk, or the refusal."""
    address = s3.put(local_store(tmp_path / "acts").path, "commanded")
    check_input("train", TrainConfig(acts=Path(address), out=tmp_path / "run"))
    assert [line for line in progress._cached(Path(address)) if line.startswith("a: ")]
    with pytest.raises(ConfigError, match=f"{address} is no folder here, and a folder is what is pushed"):
        push(Path(address), "user/repo", dry_run=True)


def test_nothing_else_is_written_to_an_address(tmp_path: Path) -> None:
    """Oracle: the refusal, before any work; and no folder that is called s3."""
    local = local_store(tmp_path / "acts")
    with pytest.raises(ConfigError, match="out is s3://bucket/run, and only stores are written there"):
        train(TrainConfig(acts=local.path, out=Path("s3://bucket/run"), site=("a",), k=(2,), device="cpu"))
    assert not Path("s3:").exists()


def test_what_another_process_is_fetching_is_left_alone(s3: S3, tmp_path: Path) -> None:
    """Oracle: the store on the disk, though the mirror is brought up to date at each request for an object
    of it, as by another process; and the age of what a kill has left."""
    local = local_store(tmp_path / "acts")
    address = s3.put(local.path, "shared")
    remote = ActivationStore(address)
    left = mirror.folder_of(address).with_name(f"{mirror.folder_of(address).name}.partial") / "left"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))

    def meanwhile(method: str, path: str, headers: dict[str, str]) -> None:
        if path.endswith("/commits/2.json"):
            ActivationStore(address)

    s3.watch = meanwhile
    assert np.array_equal(remote.array("a").norms(2), local.array("a").norms(2))
    assert not list(left.parent.iterdir())

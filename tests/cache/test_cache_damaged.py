"""A store whose run was killed, or whose files are damaged, is finished and mended to the same bytes."""

import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caching import CTX_LEN, N_ROWS, SHARD, cache, marks, with_zarr
from crashes import Crash, bury, check_crashes, crash_at, file_hashes
from launching import ENVIRONMENT
from torch import Tensor
from waiting import wait_until

from saemill.cache import run as cache_run
from saemill.common.errors import StoreError
from saemill.common.stores.activations import SHUFFLE_KEY, ActivationStore
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.permutation import permutation
from saemill.common.stores.tokens import TokenStore
from saemill.show import problems

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_killed_run_goes_on_to_the_same_bytes(tokens: TokenStore, neox: str, tmp_path: Path) -> None:
    """Oracle: the store of a run that nobody killed, file by file."""
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    options = {"layers": (0, 2), "shard_tokens": 2 * CTX_LEN, "batch_size": 16}
    cache(tokens, neox, whole, **options)
    command = [
        sys.executable, "-m", "saemill", "cache", str(tokens.path), "--model", neox, "--layers", "0,2",
        "--shard-tokens", str(2 * CTX_LEN), "-o", str(torn),
    ]  # fmt: skip
    generator = random.Random(0)
    reached = 0
    for goal in (0, generator.randint(1, 60), generator.randint(80, 120)):
        reached = kill_at(command, torn, goal)
        assert not (torn / "layers.2" / "manifest.json").exists()
    assert 80 <= reached < 150
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert "complete; " in done.stdout
    assert file_hashes(torn) == file_hashes(whole)
    assert problems(torn) == []


def kill_at(command: list[str], out: Path, n_commits: int) -> int:
    """Run a command and kill it once so many shards are committed; how many there are then."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    wait_until(lambda: out.exists() and len(list(out.glob("*/commits/*.json"))) >= n_commits, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return len(list(out.glob("*/commits/*.json")))


def test_a_crash_at_any_step_leaves_a_store_that_is_finished_later(
    tokens: TokenStore, neox: str, tmp_path: Path
) -> None:
    """Oracle: the store of a run without a crash, file by file, for a crash before each disk operation."""
    options = {"layers": (0, 2), "max_tokens": 3 * CTX_LEN, "shard_tokens": 2 * CTX_LEN}
    check_crashes(lambda out: cache(tokens, neox, out, **options), tmp_path)


def test_left_over_pieces_do_no_harm(
    copied: Path,
    made: ActivationStore,
    tokens: TokenStore,
    neox: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Oracle: the finished store; pieces as a kill leaves them, before, during and after a rename."""
    for site in ("layers.0", "layers.1"):
        (copied / site / "manifest.json").unlink()
        for shard in (2, 5, 9):
            (copied / site / "commits" / f"{shard}.json").unlink()
        whole = (copied / site / "c" / "2" / "0").read_bytes()
        (copied / site / "c" / "2" / "0").write_bytes(whole[: len(whole) // 2])
        (copied / site / "c" / "5" / "0").unlink()
        (copied / site / "c" / "9" / "0").write_bytes(bytes(len(whole)))
    dead = "worker-0123456789abcdef"
    (copied / "claims" / f"{dead}.partial-2").mkdir(parents=True)
    (copied / "claims" / f"{dead}.partial-0").write_text('{"shard": 2, "n_to')
    (copied / "claims" / f".{dead}.partial-1.partial").write_bytes(bytes(100))
    kept_marks = {
        name: mark
        for name, mark in marks(copied).items()
        if "/c/" in name and name.split("/")[2] not in ("2", "5", "9")
    }
    with pytest.raises(StoreError, match="unfinished"):
        ActivationStore(copied).site("layers.0")
    capsys.readouterr()
    cache(tokens, neox, copied, layers=(0, 1))
    assert "layers.1: 7 of 10 shards are there, continuing with shard 2" in capsys.readouterr().out
    assert file_hashes(copied) == file_hashes(made.path)
    assert marks(copied).items() >= kept_marks.items()


def test_only_what_is_lacking_is_computed(
    copied: Path, tokens: TokenStore, neox: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the token ids that the model is given: those of the two shards that lack, in order."""
    for site, shard in (("layers.0", 7), ("layers.1", 4)):
        (copied / site / "c" / str(shard) / "0").unlink()
    seen: list[tuple[Tensor, list[str]]] = []
    capture = cache_run.LanguageModel.capture

    def watched(model: Any, ids_RS: Tensor, sites: list[str], attention_RS: Tensor | None) -> Any:
        seen.append((ids_RS, sites))
        return capture(model, ids_RS, sites, attention_RS)

    monkeypatch.setattr(cache_run.LanguageModel, "capture", watched)
    monkeypatch.setattr(cache_run.names, "warnings", lambda *_: [])  # which looks at a few tokens first
    cache(tokens, neox, copied, layers=(0, 1))
    rows = tokens.rows(0, N_ROWS).astype(np.int64)
    expected = np.concatenate([rows[4 * 16 : 5 * 16], rows[7 * 16 : 8 * 16]])
    assert np.array_equal(torch.cat([ids for ids, _ in seen]).numpy(), expected)
    assert [sites for _, sites in seen] == [["layers.1"]] * 4 + [["layers.0"]] * 4


@pytest.mark.parametrize("begun", ["tokens", "claims/worker-0123456789abcdef.partial-0.partial"])
def test_a_folder_that_was_just_begun_is_gone_on_with(
    begun: str, made: ActivationStore, tokens: TokenStore, neox: str, tmp_path: Path
) -> None:
    """Oracle: the finished store; the tokens are copied or half copied, not yet described."""
    shutil.copytree(made.path / "tokens", tmp_path / "acts" / begun)
    if begun != "tokens":
        (tmp_path / "acts" / begun / "manifest.json").unlink()
    cache(tokens, neox, tmp_path / "acts", layers=(0, 1))
    assert file_hashes(tmp_path / "acts") == file_hashes(made.path)


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[100] ^= 0x10
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: Path) -> None:
    file.write_bytes(b"")


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "bit flip": (flip_bit, "content differs from its hash"),
    "truncated": (truncate, "file has 32,767 bytes, expected 32,768"),
    "empty": (empty, "file has 0 bytes, expected 32,768"),
    "missing": (Path.unlink, "file is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_refused_and_mended(
    kind: str, copied: Path, made: ActivationStore, tokens: TokenStore, neox: str
) -> None:
    """Oracle: the shards that were damaged; the whole store's bytes; the other files' inodes and times."""
    damage, problem = DAMAGE[kind]
    for shard in (3, 9):
        damage(copied / "layers.1" / "c" / str(shard) / "0")
    found = problems(copied)
    assert found[:2] == [f"layers.1 shard 3: {problem}", f"layers.1 shard 9: {problem}"]
    assert len(found) == 3
    assert f"`saemill verify {copied} --repair`" in found[2]
    assert "saemill cache" in found[2]
    with pytest.raises(StoreError, match=r"layers\.1/c/3/0: ") as error:
        ActivationStore(copied).read("layers.1", 0, 4800)
    assert "saemill cache" in str(error.value)
    if kind != "bit flip":
        with pytest.raises(StoreError, match="2 of 10 shards"):
            ActivationStore(copied).site("layers.1")
    assert torch.equal(ActivationStore(copied).read("layers.0", 0, 4800), made.read("layers.0", 0, 4800))
    bad = [f"layers.1/c/{shard}/0" for shard in (3, 9)]
    before = {name: mark for name, mark in marks(copied).items() if "/c/" in name and name not in bad}
    cache(tokens, neox, copied, layers=(0, 1))
    assert file_hashes(copied) == file_hashes(made.path)
    assert marks(copied).items() >= before.items()
    assert problems(copied) == []


def test_a_block_is_checked_whenever_it_is_read(copied: Path, made: ActivationStore) -> None:
    """Oracle: the one block of 256 rows whose bit was turned; other blocks read as before."""
    file = copied / "layers.0" / "c" / "4" / "0"
    content = bytearray(file.read_bytes())
    content[300 * 64] ^= 1
    file.write_bytes(content)
    site, whole = ActivationStore(copied).site("layers.0"), made.site("layers.0")
    assert np.array_equal(site.block(4, 0), whole.block(4, 0))
    with pytest.raises(StoreError, match=r"c/4/0: block 1 differs from its hash"):
        site.block(4, 1)
    address = 4 * SHARD + int(permutation(SHARD, SHUFFLE_KEY, 4)[300])
    with pytest.raises(StoreError, match="saemill verify"):
        site.read(address, address + 1)
    with pytest.raises(StoreError, match="block 1"):
        site.statistics_over(partial(made.keep, mask=MaskConfig(first_positions=2), held_out=False))


def test_a_file_that_goes_missing_later_is_no_zeros(copied: Path) -> None:
    """Oracle: zarr itself reads zeros there; the store, opened before, raises."""
    site = ActivationStore(copied).site("layers.0")
    (copied / "layers.0" / "c" / "6" / "0").unlink()
    assert not with_zarr(copied / "layers.0")[6 * SHARD : 7 * SHARD].any()
    with pytest.raises(StoreError, match="c/6/0: file is missing"):
        site.read(6 * SHARD, 6 * SHARD + 1)


def test_damage_in_the_padding_of_the_last_shard_is_found_too(
    copied: Path, made: ActivationStore, tokens: TokenStore, neox: str
) -> None:
    """Oracle: a byte after the last of the 192 rows, which no reader sees but a hash of the file does."""
    with (copied / "layers.0" / "c" / "9" / "0").open("rb+") as file:
        file.seek(200 * 64)
        file.write(b"x")
    assert problems(copied)[0] == "layers.0 shard 9: content differs from its hash"
    cache(tokens, neox, copied, layers=(0,))
    assert file_hashes(copied) == file_hashes(made.path)


def test_a_crash_while_mending_forgets_no_damaged_shard(
    copied: Path, made: ActivationStore, tokens: TokenStore, neox: str
) -> None:
    """Oracle: the whole store; a second damaged shard of the right size is still known to be damaged."""
    for n_steps in range(4):
        for shard in (3, 5):
            flip_bit(copied / "layers.1" / "c" / str(shard) / "0")
        with pytest.MonkeyPatch.context() as patch:
            crash_at(n_steps, patch)
            with pytest.raises(Crash):
                cache(tokens, neox, copied, layers=(1,))
        bury(copied)
        cache(tokens, neox, copied, layers=(1,))
        assert file_hashes(copied) == file_hashes(made.path), f"after a crash at step {n_steps}"


def test_a_missing_array_description_is_named_and_mended(
    copied: Path, made: ActivationStore, tokens: TokenStore, neox: str
) -> None:
    """Oracle: the file that was removed, without which the site cannot be read."""
    (copied / "layers.0" / "zarr.json").unlink()
    with pytest.raises(StoreError, match=r"layers\.0/zarr\.json: file is missing"):
        ActivationStore(copied).read("layers.0", 0, 1)
    assert any("layers.0" in line and "zarr.json" in line for line in problems(copied))
    cache(tokens, neox, copied, layers=(0,))
    assert file_hashes(copied) == file_hashes(made.path)


@pytest.mark.parametrize("damage", [flip_bit, truncate, Path.unlink])
@pytest.mark.parametrize("name", ["tokens/c/0/0", "segments.parquet"])
def test_damage_in_the_stores_tokens_is_named_and_mended(
    name: str,
    damage: Callable[[Path], None],
    copied: Path,
    made: ActivationStore,
    tokens: TokenStore,
    neox: str,
) -> None:
    """Oracle: the damaged file, and the whole store; the shards of activations are not touched."""
    damage(copied / "tokens" / name)
    before = {file: mark for file, mark in marks(copied).items() if file.startswith("layers")}
    found = problems(copied)
    assert f"tokens/{name}: " in found[0]
    assert "saemill cache" in found[-1]
    cache(tokens, neox, copied, layers=(1,))
    assert file_hashes(copied) == file_hashes(made.path)
    assert marks(copied).items() >= before.items()

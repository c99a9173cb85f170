"""Caching and training at once: killed on either side, and what the store is afterwards."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import call
from crashes import file_hashes
from launching import ENVIRONMENT
from training import files
from waiting import LIMIT_SECONDS, wait_until

from saemill.common import records
from saemill.common.errors import ConfigError, StoreError
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.followers import Follower, followers_of


@pytest.fixture(scope="module")
def settings(tiny_models: dict[str, str], tokenizer_folder: str, corpus: Path) -> list[str]:
    """A store of 13 shards; groups of two."""
    return [
        tiny_models["neox"], str(corpus), "--tokenizer", tokenizer_folder, "--layers", "1", "--ctx-len", "32",
        "--max-tokens", "6400", "--held-out-fraction", "0.3", "--k", "4", "--num-latents", "64",
        "--batch-size", "256", "--save-every", "5", "--set", "train.log_every=3",
        "--set", "train.buffer_tokens=512", "--set", "train.precision=fp32",
        "--set", "cache.shard_tokens=512", "--set", "assess.n_latents=0", "--set", "assess.model_tokens=500",
        "--follow", "--follow-tokens", "1024",
    ]  # fmt: skip


def start(settings: list[str], *more: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "saemill", "run", *settings, *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT
    )


def children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def records_of(acts: Path) -> dict[Path, Follower]:
    return (
        followers_of(acts, ActivationStore(acts).settings.identity) if (acts / "followers").exists() else {}
    )


def figures(run: Path) -> list[Any]:
    variants = json.loads((run / "final_assessment.json").read_text())["variants"]
    return [[variant["name"], variant["metrics"]] for variant in variants]


def test_killed_on_either_side_it_ends_as_if_it_had_not_been(settings: list[str], tmp_path: Path) -> None:
    """Oracle: the same run over a store that stays whole, uninterrupted: SAEs, log and assessment, the latter
    though the model has to compute held-out activations again."""
    acts, run = tmp_path / "acts", tmp_path / "run"
    call("run", *settings, "--save-dir", tmp_path / "whole")
    (whole,) = (tmp_path / "whole" / "runs").glob("*/")
    (whole_acts,) = (tmp_path / "whole" / "acts").glob("*/")
    shard_bytes = (whole_acts / "layers.1" / "c" / "0" / "0").stat().st_size
    bounded = [
        *("--max-disk", str(5 * shard_bytes), "--delete-consumed", "--save-dir", str(tmp_path / "bounded")),
        *("--set", f"cache.out={acts}", "--set", f"train.out={run}"),
    ]
    process = start(settings, *bounded)
    wait_until(lambda: any(found.run == str(run) for found in records_of(acts).values()), process)
    held = _held_back(acts, run)
    wait_until(lambda: _starts(acts)[str(run)] > _starts(acts)["/held"], process)
    (trainee,) = children(process.pid)
    process.kill()
    process.communicate()
    wait_until(lambda: not Path(f"/proc/{trainee}").exists())

    process = start(settings, *bounded)
    wait_until(lambda: children(process.pid), process)
    subprocess.run(["kill", "-9", str(children(process.pid)[0])], check=True)
    said = process.communicate(timeout=LIMIT_SECONDS)[0]
    assert process.returncode == 2, said
    assert "training was killed by SIGKILL; caching was stopped with it" in said

    held.unlink()
    call("run", *settings, *bounded)
    assert files(run) == files(whole)
    assert figures(run) == figures(whole)
    assert len(list(acts.glob("layers.1/c/*/0"))) <= 5
    _whole_is_refused(acts, run, tmp_path)
    assert file_hashes(acts / "layers.1") == file_hashes(whole_acts / "layers.1")
    call("run", *settings, *bounded)


def _starts(acts: Path) -> dict[str, int]:
    return {found.run: found.start for found in records_of(acts).values()}


def _held_back(acts: Path, run: Path) -> Path:
    """The record of a run that never goes on, so that nothing ends before it is taken away."""
    path = acts / "followers" / f"{'0' * 16}.json"
    identity, start = ActivationStore(acts).settings.identity, _starts(acts)[str(run)]
    records.write(path, Follower(store=identity, run="/held", start=start, stop=13, n_kept=0, at_once=4))
    return path


def _whole_is_refused(acts: Path, run: Path, tmp_path: Path) -> None:
    """Every command that reads all of a store says why it cannot; the advice helps."""
    (tokens,) = (tmp_path / "bounded" / "tokens").glob("*/")
    refused = (
        r"site 'layers\.1' of .* is consumed: its shards 0 to \d+ were removed .* without --delete-consumed"
    )
    for command in (
        ["train", acts, "-o", tmp_path / "other"],
        ["train", acts, "--site", "layers.1", "--follow", "--batch-size", 256, "-o", tmp_path / "other"],
        ["export-latents", run, "--format", "delphi", "-o", tmp_path / "latents"],
        ["push", acts, "user/acts"],
    ):
        with pytest.raises(StoreError, match=refused):
            call(*command)
    with pytest.raises(ConfigError, match="leave out --no-model"):
        call("assess", run, "--no-model")
    with pytest.raises((AssertionError, StoreError), match="is consumed"):
        call("verify", acts)
    model = ActivationStore(acts).settings.model
    assert "were removed when all runs had read them" in call("show", acts)
    assert "are computed again" in call("cache", tokens, "--model", model, "--layers", "1", "-o", acts)
    call("verify", acts)
    call("train", acts, "-o", tmp_path / "other", "--k", 4, "--num-latents", 64, "--batch-size", 256)


def test_too_little_room_is_refused_before_anything_is_cached(settings: list[str], tmp_path: Path) -> None:
    """Oracle: the message, and the folder: tokens are all there is; what it asks for is enough."""
    save = ["--save-dir", str(tmp_path), "--delete-consumed"]
    with pytest.raises(
        ConfigError, match=r"needs two groups of shards at once.* is written, (\S+); give"
    ) as told:
        call("run", *settings, *save, "--max-disk", "3KB")
    with pytest.raises(
        ConfigError, match=r"all shards are kept, (\S+); give as much or more, or add --delete"
    ):
        call("run", *settings, *save[:2], "--max-disk", "3KB")
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]
    size = str(told.value).split("is written, ")[1].split(";")[0]
    assert "train meanwhile" in call("run", *settings, *save, "--max-disk", size)


def test_room_for_what_is_measured_on_is_asked_for_before_anything_is_cached(
    settings: list[str], tmp_path: Path
) -> None:
    """Oracle: room for two groups of two shards alone is refused, by the plan too; what the refusal asks for
    is enough for a run that measures, whose first shards are there at its end; of a store of 13 shards."""
    save = ["--save-dir", str(tmp_path), "--delete-consumed"]
    measured = [*settings, *save, "--set", "train.eval_every=6", "--set", "train.eval_tokens=400"]
    shard_bytes = 512 * 32 * 2
    too_little = ["--max-disk", str(4 * shard_bytes)]
    told_before = call("plan", *measured, *too_little, "--no-probe")
    assert re.search(r"training needs about .* at once, the first \d shards of it to the end", told_before)
    match = (
        r"the first (\d) shards to its end, to measure on, and two groups .* is written, (\S+); give as much"
    )
    with pytest.raises(ConfigError, match=match) as told:
        call("run", *measured, *too_little)
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]
    with pytest.raises(ConfigError, match=match):
        call("plan", *measured, *too_little, "--no-probe")
    found = re.search(match, str(told.value))
    assert found
    n_kept, size = int(found[1]), found[2]
    told_after = call("plan", *measured, "--max-disk", size, "--no-probe")
    whole = (n_kept + 4) * shard_bytes / 2**20
    assert f"needs {whole:.1f} MiB of them at once, the first {n_kept} shards of it to the end" in told_after
    call("run", *measured, "--max-disk", size)
    (acts,) = (tmp_path / "acts").iterdir()
    there = {int(path.parent.name) for path in acts.glob("layers.1/c/*/0")}
    assert there >= {*range(n_kept)}
    assert len(there) <= n_kept + 4


def test_removing_what_is_read_needs_a_reader(settings: list[str], tmp_path: Path) -> None:
    """Oracle: the message, for one process after the other as for jobs; nothing is made."""
    alone = [word for word in settings if not word.startswith("--follow") and word != "1024"]
    removing = ["--save-dir", str(tmp_path / "out"), "--delete-consumed", "--max-disk", "1MB"]
    with pytest.raises(ConfigError, match=r"begins when caching has ended; add --follow"):
        call("run", *alone, *removing)
    (tmp_path / "cache.yaml").write_text("tokenize: {dataset: d}\ncache: {model: m, layers: [1]}\n")
    with pytest.raises(ConfigError, match=r"^run\.follow has no effect without the section train"):
        call("run", tmp_path / "cache.yaml", "--follow")
    file = tmp_path / "all.yaml"
    file.write_text(
        "tokenize: {dataset: d, tokenizer: t, out: t}\n"
        "cache: {model: m, layers: [1], out: a, max_disk: 1MB, delete_consumed: true}\n"
        "train: {site: layers.1, out: r}\n"
        "slurm: {time: '1:00:00'}\n"
    )
    with pytest.raises(ConfigError, match="leave it out, as jobs of stages wait for one another"):
        call("submit", file, "--dry-run")
    assert not (tmp_path / "out").exists()


def test_a_failure_of_one_ends_the_other(settings: list[str], tmp_path: Path) -> None:
    """Oracle: the message and exit code; training finds the run's folder in the hands of another."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    process = start(settings, "--save-dir", str(tmp_path / "out"), "--set", f"train.out={run}")
    said = process.communicate(timeout=LIMIT_SECONDS)[0]
    assert process.returncode == 2, said
    assert "holds other files" in said
    assert "training failed, as it says above; caching was stopped with it" in said

"""Dry runs: what they leave as it was, and what they refuse."""

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from command_line import call
from pipeline import Pipeline

from saemill.cache.config import CacheConfig
from saemill.common.errors import ConfigError
from saemill.common.world import World
from saemill.plan import device
from saemill.plan.planner import checked
from saemill.train import outlook

FEW = ("--no-probe", "--dry-run")


def content(folder: Path) -> dict[str, str]:
    """Every file and folder below a folder, with a hash of what it holds and when it was written."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    } | {f"{path} at": str(path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.fixture
def work(made: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run and its stores; every command begins here."""
    shutil.copytree(made.out.parent, tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def words(work: Path, tiny_models: dict[str, str], tokenizer_folder: str, corpus: Path) -> dict[str, str]:
    (work / "matrix.yaml").write_text(
        yaml.safe_dump(
            {
                "matrix": {
                    "out": "study",
                    "targets": {
                        "a": {"model": tiny_models["neox"], "tokenizer": tokenizer_folder, "layers": [1]}
                    },
                    "sources": {"b": {"dataset": str(corpus)}},
                },
                "tokenize": {"ctx_len": 32, "max_tokens": 6400},
                "train": {"num_latents": [64], "k": [4], "batch_size": 256},
            }
        )
    )
    return {
        "CORPUS": str(corpus), "TOKENIZER": tokenizer_folder, "MODEL": tiny_models["neox"],
        "FLAGS": "--ctx-len 32 --max-tokens 6400 --layers 1 --k 4 --num-latents 64 --batch-size 256 "
        f"--tokenizer {tokenizer_folder}",
    }  # fmt: skip


COMMANDS = {
    "tokenize": "tokenize CORPUS --tokenizer TOKENIZER --ctx-len 32 --max-tokens 6400 -o new",
    "tokenize again": "tokenize CORPUS --tokenizer TOKENIZER --ctx-len 32 -o there/tokens "
    "--held-out-fraction 0.3",
    "cache": "cache there/tokens --model MODEL --layers 0,1 -o there/acts",
    "cache anew": "cache there/tokens --model MODEL --layers 2 -o deep/acts",
    "train": "train there/acts --k 4 --num-latents 64 --batch-size 256 -o new/run",
    "train again": "train there/acts --site layers.1 --k 2,16 --num-latents 128 --batch-size 256 --lr 3e-3 "
    "--epochs 3 --device cpu -o there/run",
    "assess": "assess there/run --acts there/acts",
    "run": "run MODEL CORPUS FLAGS",
    "matrix": "matrix matrix.yaml",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_changes(command: str, work: Path, words: dict[str, str]) -> None:
    """Oracle: a hash of every file, and the time of every file and folder, before and after."""
    line = COMMANDS[command]
    for word, meant in words.items():
        line = line.replace(word, meant)
    before = content(work)
    told = call(*line.split(), *FEW)
    assert content(work) == before
    assert "in all: " in told or "everything is there already" in told


def test_a_plan_is_a_dry_run(work: Path, words: dict[str, str]) -> None:
    """Oracle: the other command, but for the memory that this process holds meanwhile."""
    line = f"{words['MODEL']} {words['CORPUS']} {words['FLAGS']} --no-probe".split()
    plan, dry = (call(*command, *line).splitlines() for command in (("plan",), ("run", "--dry-run")))
    alike = [(a, b) for a, b in zip(plan, dry, strict=True) if "memory" not in a]
    assert len(alike) > 8
    assert all(a == b for a, b in alike)


def test_what_cannot_be_made_is_refused_as_in_a_real_run(work: Path, words: dict[str, str]) -> None:
    """Oracle: the real commands' own errors."""
    for line in ("cache there/tokens --model MODEL --layers 9 -o x", "train there/acts --k 999 -o x"):
        command = line.replace("MODEL", words["MODEL"]).split()
        with pytest.raises(ConfigError) as real:
            call(*command)
        with pytest.raises(ConfigError) as planned:
            call(*command, *FEW)
        assert str(real.value) == str(planned.value)
    assert not (work / "x").exists()


def test_advice_on_a_full_disk_works(
    work: Path, words: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the advice followed, on a disk of room for two of the shards of 512 tokens of one site, beside
    the records and the copy of the tokens, of which the outlook tells."""
    line = f"cache there/tokens --model {words['MODEL']} --layers 0 --shard-tokens 512 -o x".split()
    config = CacheConfig(
        tokens=Path("there/tokens"), model=words["MODEL"], out=Path("x"), layers=(0,), shard_tokens=512
    )
    disk = checked("cache", config).disk
    beside = disk["records"] + disk["copy of the tokens"]
    free = beside + 2 * 512 * 32 * 2
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=free))
    with pytest.raises(ConfigError, match=r"are free; .*: --max-tokens 1024 would fit"):
        call(*line, *FEW)
    call(*line, *FEW, "--max-tokens", "1024")
    free -= beside
    with pytest.raises(ConfigError, match="are needed"):
        call(*line, *FEW, "--max-tokens", "1024")


def test_advice_on_too_little_memory_works(
    work: Path, words: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the advice followed, on a machine that lacks 100 KiB beside what the process holds."""
    held = 10**9
    monkeypatch.setattr(outlook, "process_bytes", lambda: held)
    line = ["train", "there/acts", "--k", "4", "--num-latents", "64", "--batch-size", "256", "-o", "x"]
    told = call(*line, *FEW)
    assert "windows of the stream" in told
    monkeypatch.setattr(outlook, "machine_bytes", lambda: held + 10**6)
    with pytest.raises(ConfigError, match=r"this machine has .*; say --buffer-tokens (\d+)") as refused:
        call(*line, *FEW)
    buffer = str(refused.value).split("--buffer-tokens ")[1].split()[0]
    call(*line, *FEW, "--buffer-tokens", buffer)


def test_a_gpu_of_another_machine(work: Path, words: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: 4 + 8 bytes per weight and 2 for each copy, by hand; no figure of time."""
    monkeypatch.setattr(device.torch.cuda, "is_available", lambda: False)
    line = "train there/acts --k 4 --num-latents 64 --batch-size 256 --device cuda --kernels triton -o x"
    told = call(*line.split(), "--dry-run")
    assert "1 variant on cuda" in told
    n_weights = 64 * 32 * 2
    n_bytes = (n_weights + 64 + 32) * 12 + n_weights * 2 + 9 * 64
    assert f"1 × topk of 64 latents: {n_bytes / 2**20:,.1f} MiB each" in told
    assert "GPU memory: " in told
    assert "time: not measured: no GPU is here" in told


@pytest.mark.parametrize(
    ("line", "environment", "message"),
    [
        ("train there/acts -o x --no-probe", {}, "no-probe has no effect without --dry-run"),
        ("train there/acts -o x --dry-run", {"size": 2}, "a plan is made by one process"),
        (
            "run MODEL CORPUS --layers 1 --tokenizer TOKENIZER --dry-run --no-probe",
            {},
            "leave out --no-probe, or say --max-tokens",
        ),
    ],
)
def test_refused(
    line: str, environment: dict[str, Any], message: str, work: Path, words: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Oracle: by hand."""
    for word, meant in words.items():
        line = line.replace(word, meant)
    if environment:
        world = World(0, 2, 0, 2, {})
        monkeypatch.setattr(World, "here", classmethod(lambda cls, *_: world))
    with pytest.raises(ConfigError, match=message):
        call(*line.split())

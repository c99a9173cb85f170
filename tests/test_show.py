"""`saemill show` and `saemill verify` on every kind of folder, and how the command line tells errors."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from assessments import write_assessment
from saes import make_threshold_sae, make_transcoder
from typer.testing import CliRunner, Result

from saemill import Sae, cli
from saemill.cache.config import CacheConfig
from saemill.cache.run import run as cache
from saemill.common import records
from saemill.common.errors import StoreError
from saemill.common.sae.parts import SaeConfig
from saemill.common.stores import runs
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.tokens import TokenStore
from saemill.show import problems
from saemill.tokenize.config import TokenizeConfig
from saemill.tokenize.run import run as tokenize


@pytest.fixture(scope="module")
def tokens(corpus: Path, tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """40 rows of 32 tokens."""
    out = tmp_path_factory.mktemp("show") / "tokens"
    config = TokenizeConfig(
        dataset=str(corpus), tokenizer=tokenizer_folder, out=out, ctx_len=32, max_tokens=40 * 32
    )
    return tokenize(config)


@pytest.fixture(scope="module")
def acts(tokens: TokenStore, tiny_models: dict[str, str]) -> ActivationStore:
    """Two sites in three shards each."""
    out = tokens.path.with_name("acts")
    config = CacheConfig(
        tokens=tokens.path, model=tiny_models["neox"], out=out, layers=(0, 1), shard_tokens=512
    )
    return cache(config)


@pytest.fixture
def copied(acts: ActivationStore, tmp_path: Path) -> Path:
    return Path(shutil.copytree(acts.path, tmp_path / "acts"))


def saemill(*arguments: Any) -> Result:
    return CliRunner().invoke(cli.app, list(map(str, arguments)))


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[50] ^= 1
    file.write_bytes(content)


def test_show_tells_a_token_store(tokens: TokenStore, corpus: Path, tokenizer_folder: str) -> None:
    """Oracle: the settings it was made with, and its manifest."""
    result = saemill("show", tokens.path)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == f"token store {tokens.path}"
    held_out = int(tokens.held_out_R.sum())
    assert lines[1] == f"  1,280 tokens: 40 rows of 32, {held_out} of them held out"
    n_documents = len({int(n) for n in tokens.document_of(range(1280))})
    assert lines[2] == f"  {n_documents} documents of {corpus}"
    assert lines[3] == f"  tokenizer {tokenizer_folder} (8,192 ids)"
    assert lines[4] == f"  fingerprint {tokens.fingerprint}"


def test_show_tells_an_activation_store(acts: ActivationStore, tiny_models: dict[str, str]) -> None:
    """Oracle: the settings it was made with, and the statistics read from the store."""
    result = saemill("show", acts.path)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == f"activation store {acts.path}"
    assert lines[1] == f"  model {tiny_models['neox']}, computed in float32, stored as bf16"
    assert lines[2] == "  1,280 tokens: 40 rows of 32, 3 shards of 512 tokens per site"
    assert lines[3] == f"  fingerprint {acts.fingerprint}"
    assert [line.split(":")[0] for line in lines[4:]] == ["  layers.0", "  layers.1"]
    statistics = acts.site("layers.1").statistics
    assert lines[5].startswith("  layers.1: D 32, 0.1 MiB, ")
    assert f"mean squared norm {statistics.mean_squared_norm:.4g}, " in lines[5]
    assert f"variance {statistics.total_variance:.4g} over {statistics.n_tokens:,} training" in lines[5]


def test_show_tells_what_is_unfinished(copied: Path) -> None:
    """Oracle: the manifest and one of three commits taken away."""
    (copied / "layers.0" / "manifest.json").unlink()
    (copied / "layers.0" / "commits" / "1.json").unlink()
    result = saemill("show", copied)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[4].startswith("  layers.1: D 32")
    assert result.stdout.splitlines()[5] == "  layers.0: unfinished, 2 of 3 shards"


def test_show_tells_a_run(tmp_path: Path) -> None:
    """Oracle: the records that a run leaves, written by hand, as it goes on."""
    identity = runs.Identity(settings={}, acts_fingerprint="a", config="0" * 16)
    records.write(tmp_path / runs.IDENTITY, identity)
    assert saemill("show", tmp_path).stdout == f"run {tmp_path}: unfinished, no checkpoint yet\n"
    (tmp_path / "checkpoint.json").touch()
    assert saemill("show", tmp_path).stdout == f"run {tmp_path}: unfinished, a checkpoint to go on from\n"
    finished = runs.Finished(
        run=identity.run,
        variants=("a", "b"),
        cfgs={"a": "0" * 16, "b": "1" * 16},
        acts="acts",
        steps=1000,
        tokens=4096,
        seconds=7.4,
        peak_rss_bytes=1,
        diverged={"b": 12},
        stopped={},
        mask=MaskConfig(),
        files=(),
    )
    records.write(tmp_path / runs.FINISHED, finished)
    head = f"run {tmp_path}: 2 SAEs, 4,096 tokens in 1,000 steps, 7 s\n"
    assert saemill("show", tmp_path).stdout == f"{head}  a  not assessed\n  b  diverged at step 12\n"
    write_assessment(tmp_path, {"a": "good"})
    assert saemill("show", tmp_path).stdout == f"{head}  a  good\n  b  diverged at step 12\n"
    assert "final_assessment.json is of other SAEs than" in saemill("verify", tmp_path).stdout


def test_an_sae_is_told_and_verified(tmp_path: Path) -> None:
    """Oracle: the SAE that was saved; one bit of its weights is turned."""
    config = SaeConfig(d_in=8, num_latents=16, k=2, provenance={"site": "layers.1", "model": "m"})
    w_FD = torch.randn(16, 8)
    Sae(config, w_FD, torch.zeros(16), w_FD.clone(), torch.zeros(8)).save(tmp_path)
    assert saemill("show", tmp_path).stdout == f"SAE {tmp_path}: k 2, 16 latents, D 8, layers.1 of m\n"
    make_threshold_sae("matryoshka").save(tmp_path / "other")
    assert saemill("show", tmp_path / "other").stdout == (
        f"SAE {tmp_path / 'other'}: matryoshka, 40 latents, prefixes 10, 20, 40, D 12, layers.1\n"
    )
    make_transcoder(e=7).save(tmp_path / "of-two")
    assert saemill("show", tmp_path / "of-two").stdout == (
        f"SAE {tmp_path / 'of-two'}: transcoder, k 5, 40 latents, D 12 → 7, layers.1.norm → layers.1.mlp\n"
    )
    assert saemill("verify", tmp_path).exit_code == 0
    weights = bytearray((tmp_path / "sae.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "sae.safetensors").write_bytes(weights)
    result = saemill("verify", tmp_path)
    assert result.exit_code == 1
    assert "sae.safetensors" in result.stdout


@pytest.mark.parametrize("command", ["show", "verify"])
@pytest.mark.parametrize("kind", ["empty", "missing", "file"])
def test_a_wrong_folder_is_refused(command: str, kind: str, tmp_path: Path) -> None:
    """Oracle: a folder, a name and a file that are no store."""
    path = tmp_path if kind == "empty" else tmp_path / "x"
    if kind == "file":
        path.write_text("hello")
    result = saemill(command, path)
    assert isinstance(result.exception, StoreError)
    assert str(path) in str(result.exception)
    assert "token store" in str(result.exception)
    assert result.stdout == ""


def test_what_is_near_a_store_is_told_as_such(acts: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the paths that were meant: the folder above holds two stores, a site lies in one."""
    above = acts.path.parent
    for command in ("show", "verify"):
        message = str(saemill(command, above).exception)
        assert message.endswith(f"; did you mean {acts.path}, {above / 'tokens'}?")
        message = str(saemill(command, acts.path / "layers.0").exception)
        assert message.endswith(f": it is one site of {acts.path}; name that")
        assert str(saemill(command, tmp_path / "x").exception).endswith(": there is no such folder")


def test_verify_passes_whole_stores(tokens: TokenStore, acts: ActivationStore) -> None:
    """Oracle: stores that nobody touched."""
    for path in (tokens.path, acts.path):
        result = saemill("verify", path)
        assert result.exit_code == 0
        assert result.stdout == f"{path}: every file has its size and hash\n"


def test_verify_names_each_bad_file_of_a_token_store(tokens: TokenStore, tmp_path: Path) -> None:
    """Oracle: three files damaged in three ways, and no other."""
    path = Path(shutil.copytree(tokens.path, tmp_path / "tokens"))
    flip_bit(path / "tokens" / "c" / "0" / "0")
    (path / "held_out" / "c" / "0" / "0").write_bytes(b"123")
    (path / "segments.parquet").unlink()
    result = saemill("verify", path)
    assert result.exit_code == 1
    named = [line.removeprefix(f"{path}/") for line in result.stdout.splitlines()]
    assert sorted(line for line in named if ": " in line) == [
        "held_out/c/0/0: file has 3 bytes, expected 40",
        "segments.parquet: file is missing",
        "tokens/c/0/0: content differs from its hash",
    ]
    assert isinstance(saemill("show", path).exception, StoreError)


def test_verify_misses_a_shard_that_the_manifest_does_not_list(tokens: TokenStore, tmp_path: Path) -> None:
    """Oracle: a shard removed from the disk and from the list."""
    copy = tmp_path / "tokens"
    shutil.copytree(tokens.path, copy)
    files = tuple(file for file in tokens.manifest.files if file.path != "tokens/c/0/0")
    records.write(copy / "manifest.json", tokens.manifest.model_copy(update={"files": files}))
    (copy / "tokens" / "c" / "0" / "0").unlink()
    problem, _advice = problems(copy)
    assert str(copy / "tokens" / "c" / "0" / "0") in problem


def test_verify_names_each_bad_shard_of_an_activation_store(copied: Path) -> None:
    """Oracle: shards damaged in four ways at two sites, one of them unfinished."""
    flip_bit(copied / "layers.0" / "c" / "0" / "0")
    (copied / "layers.0" / "c" / "2" / "0").unlink()
    (copied / "layers.1" / "c" / "0" / "0").write_bytes(b"")
    (copied / "layers.1" / "c" / "1" / "0").write_bytes(bytes(32 * 1024))
    (copied / "layers.1" / "manifest.json").unlink()
    result = saemill("verify", copied)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[:-1] == [
        "layers.0 shard 0: content differs from its hash",
        "layers.0 shard 2: file is missing",
        f"{copied}/layers.1/manifest.json: file is missing, 3 of 3 shards are there",
        "layers.1 shard 0: file has 0 bytes, expected 32,768",
        "layers.1 shard 1: content differs from its hash",
    ]
    assert "saemill cache" in result.stdout.splitlines()[-1]
    assert "of 3 shards are damaged" in str(saemill("show", copied).exception)


def test_a_stores_damaged_tokens_are_told_with_the_command_that_helps(copied: Path) -> None:
    """Oracle: the file; `saemill tokenize` would not help, `saemill cache` does."""
    (copied / "tokens" / "documents.parquet").unlink()
    result = saemill("verify", copied)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[0] == f"{copied}/tokens/documents.parquet: file is missing"
    for text in (result.stdout, str(saemill("show", copied).exception)):
        assert "saemill cache" in text
        assert "saemill tokenize" not in text


@pytest.mark.parametrize("flag", ["--max_tokens", "--max-tokens"])
def test_flags_may_be_written_with_underscores(
    flag: str, tokens: TokenStore, tiny_models: dict[str, str], tmp_path: Path
) -> None:
    """Oracle: 100 tokens are 3 rows of 32, under either spelling."""
    model = tiny_models["neox"]
    result = saemill(
        "cache", tokens.path, "--model", model, "--layers", "-1", flag, "100", "-o", tmp_path / "acts"
    )
    assert result.exit_code == 0, result.exception
    assert ActivationStore(tmp_path / "acts").n_tokens == 96
    assert ActivationStore(tmp_path / "acts").sites == ["layers.2"]


def test_an_unknown_flag_is_a_usage_error() -> None:
    """Oracle: no such flag, whose near one is told."""
    result = saemill("cache", "x", "--max_tokenz", "3")
    assert result.exit_code == 2
    assert "--max-tokens" in result.output


def test_errors_are_told_without_a_traceback(tmp_path: Path) -> None:
    """Oracle: the exit code and the one line on stderr of a real process."""
    command = [sys.executable, "-m", "saemill", "show", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (f"error: {tmp_path} is no token store, activation store, run, SAE or diff\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["cache", "no-tokens", "--model", "m", "--layers", "0", "-o", "o"],
            "make one with `saemill tokenize`",
        ),
        (["cache", "no-tokens", "--layers", "0", "-o", "o"], "cache.model must be given"),
        (["cache", "no-tokens", "--model", "m", "-o", "o"], "name what to cache"),
        (
            ["cache", "t", "--model", "m", "-o", "o", "--layers", "a"],
            "cache.layers[0] must be a whole number (4096, 512k, 2M, 1e6), got 'a'",
        ),
        (
            ["verify", "no-store"],
            "no-store is no token store, activation store, run, SAE or diff: there is no such",
        ),
    ],
)
def test_main_exits_with_2_and_the_message(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Oracle: exit code 2, the message on stderr alone, no traceback, nothing written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["saemill", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    output = capsys.readouterr()
    assert stopped.value.code == 2
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert message.lower() in output.err.lower()
    assert "Traceback" not in output.err
    assert list(tmp_path.iterdir()) == []

"""Training runs: resumed equals uninterrupted, grids, outputs."""

import gzip
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import call
from launching import ENVIRONMENT
from training import config, files, killed_at, structured_store
from waiting import wait_until

from saemill.common.errors import ConfigError
from saemill.common.sae.sae import Sae
from saemill.common.stores.activations import ActivationStore
from saemill.train.config import TrainConfig
from saemill.train.profile import PROFILED_STEPS
from saemill.train.run import run
from saemill.train.sweep.variants import auto_lr, resolve


@pytest.mark.parametrize(
    "changes",
    [
        {"kernels": "torch"},
        {"kernels": "numba"},
        {"kernels": "numba", "precision": "bf16"},
        {
            "architecture": ("abs-topk", "batchtopk", "matryoshka", "groupmax", "jumprelu", "relu", "gated"),
            "target_l0": (4.0,),
        },
        {"k": (4,), "nested_k": (1, 2), "k_anneal_steps": 12},
    ],
    ids=str,
)
def test_a_run_killed_and_resumed_equals_an_uninterrupted_one(
    changes: dict[str, Any], store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the same run without a stop, bit by bit: weights and metrics."""
    run(config(store, tmp_path / "whole", **changes))
    for step in (9, 17):
        killed_at(step, config(store, tmp_path / "cut", **changes), monkeypatch)
    run(config(store, tmp_path / "cut", **changes))
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert not (tmp_path / "cut" / "checkpoint.json").exists()


def test_a_run_on_int8_is_that_on_the_values_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: a run on fp32 rows that are what is read of the codes, bit by bit; that on the codes is killed
    and goes on."""
    packed = structured_store(tmp_path / "packed", form=("int8", "lz4"))
    a_TD, b_TD = (packed.read(site, 0, packed.n_tokens) for site in "ab")
    plain = structured_store(tmp_path / "plain", values_TD=a_TD, b_TD=b_TD)
    run(config(plain, tmp_path / "whole"))
    killed_at(9, config(packed, tmp_path / "cut"), monkeypatch)
    run(config(packed, tmp_path / "cut"))
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_kernels_differ_by_rounding_alone(
    store: ActivationStore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: the same run in torch: every variant's FVU within 0.1%. The plan says what makes the steps, and
    what would be faster; what cannot run here is refused before the folder is made."""
    run(config(store, tmp_path / "torch", kernels="torch"))
    assert "by torch;" in capsys.readouterr().out
    monkeypatch.setattr("saemill.train.backends.choose.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="numba, which is not installed"):
        run(config(store, tmp_path / "none", kernels="numba"))
    monkeypatch.undo()
    run(config(store, tmp_path / "numba"))
    assert "by numba;" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="triton run on a GPU"):
        run(config(store, tmp_path / "none", kernels="triton"))
    assert not (tmp_path / "none").exists()
    theirs, ours = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])["variants"]
        for name in ("torch", "numba")
    )
    for name, expected in theirs.items():
        assert ours[name]["fvu"] == pytest.approx(expected["fvu"], rel=1e-3)


def command(store: ActivationStore, out: Path) -> list[str]:
    return [
        "train", str(store.path), "--site", "a", "-o", str(out), "--k", "2,8", "--num_latents", "48",
        "--lr", "3e-3", "--batch-size", "64", "--max-tokens", "40k", "--save-every", "10",
        "--precision", "fp32", "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """An uninterrupted run by the command."""
    out = tmp_path_factory.mktemp("whole") / "run"
    call(*command(store, out))
    return out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGKILL, -9)])
def test_signals(
    store: ActivationStore, whole: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """Oracle: an uninterrupted run by the same command; SIGTERM saves and exits with 75."""
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "saemill", *command(store, out)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    wait_until(lambda: (out / "checkpoint.json").exists(), process)
    process.send_signal(number)
    _, stderr = process.communicate()
    assert process.returncode == code, stderr
    assert not (out / "finished.json").exists()
    if number == signal.SIGTERM:
        assert "same command continues" in stderr
        assert "Traceback" not in stderr
    assert "continuing after step" in call(*command(store, out))
    assert files(out) == files(whole)
    assert "finished already" in call(*command(store, out))


def test_training_learns_and_more_latents_help(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the mean predictor has FVU 1; a larger k must reconstruct better."""
    run(config(store, tmp_path / "r", max_tokens=256 * 120, k=(1, 4), num_latents=(64,)))
    last = json.loads((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()[-1])
    fvu = {name: m["fvu"] for name, m in last["variants"].items()}
    assert fvu["a-k4-f64-s0-lr0.003"] < 0.35 < fvu["a-k1-f64-s0-lr0.003"] < 0.9


def test_metrics_agree_with_the_saved_sae(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: FVU of the saved SAE computed from its definition over the training tokens."""
    run(config(store, tmp_path / "r", max_tokens=256 * 60, k=(4,), num_latents=(64,)))
    last = json.loads((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()[-1])
    sae = Sae.load(tmp_path / "r" / "a-k4-f64-s0-lr0.003")
    keep = [store.keep_addresses(i, store.mask, held_out=False) for i in range(store.n_shards)]
    x = store.read("a", 0, store.n_tokens)[torch.from_numpy(np.concatenate(keep))]
    with torch.no_grad():
        error = (sae(x).reconstruction - x).square().sum() / (x - x.mean(0)).square().sum()
    assert float(error) == pytest.approx(last["variants"]["a-k4-f64-s0-lr0.003"]["fvu"], rel=0.1)
    norms = torch.linalg.vector_norm(sae.W_dec, dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    told = {name: sae.config.provenance[name] for name in ("site", "dataset", "ctx_len", "prepend_bos")}
    assert told == {"site": "a", "dataset": "test", "ctx_len": store.ctx_len, "prepend_bos": False}
    assert sae.config.provenance["left_out"] == {"first_positions": 1, "token_ids": [0]}


def test_two_sites_and_explicit_variants_equal_single_runs(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: one-variant runs with the same settings, bit by bit."""
    listed = (
        {"site": "a", "k": 3, "num_latents": 48},
        {"site": "b", "k": 5, "expansion_factor": 3, "seed": 2},
    )
    common: dict[str, Any] = {"k": (8,), "num_latents": (), "expansion_factor": (4,)}
    folders = run(config(store, tmp_path / "both", variants=listed, site=("a", "b"), **common))
    singles = [
        run(config(store, tmp_path / f"one{i}", variants=(entry,), site=(), **common))[0]
        for i, entry in enumerate(listed)
    ]
    for both, single in zip(folders, singles, strict=True):
        assert (both / "sae.safetensors").read_bytes() == (single / "sae.safetensors").read_bytes()


def test_grid_and_names() -> None:
    """Oracle: the product of the lists, counted by hand."""
    axes = {"site": ("a",), "k": (1, 2), "expansion_factor": (2, 4), "num_latents": (), "lr": ("auto", 1e-3)}
    common = {"optimizer": "adam", "k_aux": None}
    variants = resolve(common, axes | {"seed": (0, 1)}, (), {"a": 64}, 100)
    assert len(variants) == 16
    assert {v.num_latents for v in variants} == {128, 256}
    assert variants[0].name == "a-k1-f128-s0"
    assert variants[0].lr == pytest.approx(auto_lr(128, 64, 100)) == pytest.approx(0.16 / 64**0.5)
    assert variants[0].k_aux == 32
    with pytest.raises(ConfigError, match="not both"):
        resolve(common, axes | {"num_latents": (5,)}, (), {"a": 64}, 100)
    with pytest.raises(ConfigError, match="unknown setting"):
        resolve(common, {"site": ("a",), "k": (1,), "num_latents": (8,)}, ({"kk": 3},), {"a": 64}, 100)
    with pytest.raises(ConfigError, match="listed one by one; give one k"):
        resolve(common, axes, ({"lr": 1e-3, "num_latents": 8},), {"a": 64}, 100)
    with pytest.raises(ConfigError, match="the run has several"):
        resolve(common, {"site": ("a", "b"), "num_latents": (8,)}, ({"k": 3},), {"a": 64, "b": 64}, 100)
    with pytest.raises(ConfigError, match="two variants"):
        resolve(common, {"site": ("a",), "k": (1, 1), "num_latents": (8,)}, (), {"a": 64}, 100)


def test_gradient_accumulation_equals_the_large_batch(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: one batch of the same tokens, bit by bit."""
    one = run(config(store, tmp_path / "one", batch_size=512, num_latents=(48,), k=(4,)))
    two = run(config(store, tmp_path / "two", batch_size=256, grad_acc_steps=2, num_latents=(48,), k=(4,)))
    a, b = Sae.load(one[0]), Sae.load(two[0])
    assert torch.equal(a.W_dec, b.W_dec)
    assert torch.equal(a.W_enc, b.W_enc)


def test_a_diverged_variant_is_reported(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the healthy variant trained without it, bit by bit."""
    wild = {"k": 4, "num_latents": 48, "optimizer": "sgd", "lr": 1e30}
    healthy = {"k": 4, "num_latents": 48, "seed": 1}
    one: dict[str, Any] = {"k": (4,), "num_latents": ()}
    folders = run(config(store, tmp_path / "r", variants=(wild, healthy), **one))
    (alone,) = run(config(store, tmp_path / "alone", variants=(healthy,), **one))
    finished = json.loads((tmp_path / "r" / "finished.json").read_text())
    assert list(finished["diverged"]) == [folders[0].name]
    assert (folders[1] / "sae.safetensors").read_bytes() == (alone / "sae.safetensors").read_bytes()
    last = json.loads((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["variants"][folders[0].name]["fvu"] is None


def test_variants_in_a_file(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the same variants given from Python, bit by bit; counts may be written as in flags."""
    file = tmp_path / "c.yaml"
    file.write_text(
        f"""
train:
  acts: {store.path}
  site: [a]
  batch_size: 256
  max_tokens: 6k
  precision: fp32
  adam_betas: 0.9,0.999
  variants:
    - {{k: 3, num_latents: 0.048k, lr: 1.0e-3}}
    - {{k: 4, expansion_factor: 3, seed: 1, auxk_alpha: 0, optimizer: sgd, lr: 0.1}}
"""
    )
    call("train", "--config", file, "-o", tmp_path / "r")
    listed = (
        {"k": 3, "num_latents": 48, "lr": 1e-3},
        {"k": 4, "num_latents": 48, "seed": 1, "auxk_alpha": 0.0, "optimizer": "sgd", "lr": 0.1},
    )
    settings: dict[str, Any] = {"acts": store.path, "site": ("a",), "batch_size": 256, "precision": "fp32"}
    settings["adam_betas"] = (0.9, 0.999)
    run(TrainConfig(out=tmp_path / "s", max_tokens=6000, variants=listed, **settings))
    assert files(tmp_path / "r") == files(tmp_path / "s")
    call("train", "--config", tmp_path / "r" / "config.yaml", "-o", tmp_path / "t")
    assert files(tmp_path / "t") == files(tmp_path / "r")


def test_config_yaml_reads_back(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: a second run from the first one's config.yaml, bit by bit."""
    run(config(store, tmp_path / "r"))
    text = (tmp_path / "r" / "config.yaml").read_text()
    (tmp_path / "again.yaml").write_text(text)
    call("train", store.path, "--config", tmp_path / "again.yaml", "-o", tmp_path / "s")
    assert files(tmp_path / "s") == files(tmp_path / "r")


def test_profile_writes_a_trace_and_a_table_and_changes_nothing(
    store: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the same run without it; the trace's own marks, and the table's sum."""
    plain = run(config(store, tmp_path / "plain", k=(4,), num_latents=(32,)))
    capsys.readouterr()
    profiled = run(config(store, tmp_path / "profiled", k=(4,), num_latents=(32,), profile=True))
    assert torch.equal(Sae.load(plain[0]).W_dec, Sae.load(profiled[0]).W_dec)
    with gzip.open(tmp_path / "profiled" / "profile.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    for part in ("wait for data", "copy", "encode", "top-k", "decode", "sort", "backward", "optimizer"):
        assert names.count(f"saemill: {part}") >= PROFILED_STEPS
    lines = capsys.readouterr().out.splitlines()
    top = next(i for i, line in enumerate(lines) if line.startswith("one step, mean of"))
    step_ms = float(lines[top].split()[-2])
    rows = [line for line in lines[top + 1 :] if " ms " in line]
    assert sum(float(row[20:28]) for row in rows) == pytest.approx(step_ms, abs=0.1 * len(rows))


def test_auto_lr_meets_the_published_rate_at_its_scale() -> None:
    """Oracle: Gao et al. 2024: 2e-4 at 2^14 latents on GPT-2 (D 768), 8e9 tokens in batches of 2^17."""
    assert auto_lr(2**14, 768, 8 * 10**9 // 2**17) == pytest.approx(2e-4, rel=0.1)
    assert auto_lr(2**8, 64, 8) == auto_lr(2**8, 64, 1) == 0.02, "bounded where steps and latents are few"
    assert auto_lr(2**16, 768, 1000) == pytest.approx(auto_lr(2**14, 768, 1000) / 2)


@pytest.mark.parametrize("state", ["bf16", "8bit"])
def test_short_moments_survive_a_kill_bit_by_bit(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """Oracle: the same run without a stop."""
    settings: dict[str, Any] = {"k": (2,), "num_latents": (48,), "optimizer_state": state}
    run(config(store, tmp_path / "whole", **settings))
    killed_at(9, config(store, tmp_path / "cut", **settings), monkeypatch)
    run(config(store, tmp_path / "cut", **settings))
    assert files(tmp_path / "cut") == files(tmp_path / "whole")

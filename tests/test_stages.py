"""The stages as functions: what the commands of their names do, with objects in and out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call
from training import files

import saemill
from saemill.common.errors import ConfigError, StoreError
from saemill.train.config import TrainConfig

TEXT = {"ctx_len": 32, "max_tokens": 6400, "held_out_fraction": 0.2}
SAES: dict[str, Any] = {"k": [2, 4], "num_latents": 64, "batch_size": 512, "log_every": 4}


@dataclass(frozen=True)
class Work:
    """Tokens and activations that the functions made, and what they were made of."""

    tokens: saemill.TokenStore
    acts: saemill.ActivationStore
    text: Path
    model: str


@pytest.fixture(scope="module")
def work(
    tmp_path_factory: pytest.TempPathFactory,
    corpus: Path,
    tokenizer_folder: str,
    tiny_models: dict[str, str],
) -> Work:
    folder = tmp_path_factory.mktemp("stages")
    tokens = saemill.tokenize_text(corpus, folder / "tokens", tokenizer=tokenizer_folder, **TEXT)
    acts = saemill.cache_activations(tokens, folder / "acts", model=tiny_models["neox"], layers=[1])
    return Work(tokens, acts, corpus, tiny_models["neox"])


@pytest.fixture(scope="module")
def run(work: Work) -> saemill.Run:
    return saemill.train_saes(work.acts, work.acts.path.parent / "run", **SAES)


def test_the_stages_give_what_the_commands_give(work: Work, run: saemill.Run, tmp_path: Path) -> None:
    """Oracle: the files of `saemill tokenize`, `cache` and `train` with the same settings."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in TEXT.items()]
    tokenizer = ["--tokenizer", work.tokens.tokenizer.name]
    call("tokenize", work.text, *tokenizer, *options, "-o", tmp_path / "tokens")
    call("cache", tmp_path / "tokens", "--model", work.model, "--layers", 1, "-o", tmp_path / "acts")
    flags = ["--k", "2,4", "--num-latents", 64, "--batch-size", 512, "--log-every", 4]
    call("train", tmp_path / "acts", *flags, "-o", tmp_path / "run")
    assert saemill.TokenStore(tmp_path / "tokens").fingerprint == work.tokens.fingerprint
    assert saemill.ActivationStore(tmp_path / "acts").fingerprint == work.acts.fingerprint
    assert files(tmp_path / "run") == files(run.path)


def test_a_run_holds_its_saes_by_name(run: saemill.Run, work: Work) -> None:
    """Oracle: `Sae.load` of the folder; the steps and names that the settings give."""
    assert list(run) == ["layers.1-k2-f64-s0", "layers.1-k4-f64-s0"] == [*dict(run)]
    for name, sae in run.items():
        loaded = saemill.Sae.load(run.path / name)
        assert torch.equal(sae.W_dec, loaded.W_dec)
        assert sae.config == loaded.config
    with pytest.raises(KeyError, match=r"has layers"):
        run["layers.2-k2-f64-s0"]
    assert run.acts.fingerprint == work.acts.fingerprint
    assert run.metrics[-1]["step"] == run.record.steps
    assert set(run.metrics[-1]["variants"]) == set(run)


def test_a_run_refuses_a_log_that_was_changed(run: saemill.Run) -> None:
    """Oracle: the file as it was before a byte of it changed."""
    file = run.path / "metrics.jsonl"
    before = file.read_bytes()
    file.write_bytes(before.replace(b"fvu", b"fvv", 1))
    with pytest.raises(StoreError, match=r"metrics\.jsonl.*hash"):
        _ = run.metrics
    file.write_bytes(before)
    assert len(run.metrics) > 1


def test_a_finished_stage_is_found_again(work: Work, run: saemill.Run) -> None:
    """Oracle: the files, unchanged."""
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}
    again = saemill.train_saes(work.acts, run.path, **SAES)
    assert list(again) == list(run)
    assert before == {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}


def test_an_assessment_is_an_object(run: saemill.Run, work: Work) -> None:
    """Oracle: FVU of the saved SAE on the held-out rows, recomputed; what `Run.assessment` reads back."""
    given = saemill.assess_saes(run, with_model=False, n_latents=0)
    assert run.assessment == given
    name = "layers.1-k4-f64-s0"
    sae, keep = run[name], torch.from_numpy(work.acts.text.held_out_R)
    x_RSD = work.acts.read("layers.1", 0, work.acts.n_tokens).double().unflatten(0, (len(keep), -1))[keep]
    kept = work.acts.tokens.keep(0, len(keep), work.acts.mask)[keep.numpy()]
    x_TD = x_RSD[torch.from_numpy(kept)]
    error = (sae(x_TD.float()).reconstruction.double() - x_TD).square().sum()
    fvu = float(error / (x_TD - x_TD.mean(0)).square().sum())
    assert given[name].metrics["fvu"].value == pytest.approx(fvu, rel=1e-4)
    with pytest.raises(KeyError, match="there are layers"):
        given["layers.9"]


def test_settings_come_by_name_or_as_a_config(work: Work, tmp_path: Path) -> None:
    """Oracle: the message; no folder is made."""
    config = TrainConfig(acts=work.acts.path, out=tmp_path / "run", k=(2,))
    with pytest.raises(ConfigError, match=r"unknown setting train\.kk; did you mean k"):
        saemill.train_saes(work.acts, tmp_path / "run", kk=3)
    with pytest.raises(ConfigError, match=r"^lr beside a TrainConfig; put it into the config"):
        saemill.train_saes(config, lr=1e-3)
    with pytest.raises(ConfigError, match="out"):
        saemill.train_saes(work.acts)
    assert not (tmp_path / "run").exists()


def test_a_config_alone_is_taken(work: Work, run: saemill.Run, tmp_path: Path) -> None:
    """Oracle: the run by keywords."""
    config = TrainConfig(
        acts=work.acts.path, out=tmp_path / "run", k=(2, 4), num_latents=(64,), batch_size=512, log_every=4
    )
    assert files(saemill.train_saes(config).path) == files(run.path)

"""Training runs that are refused: before anything is written, or with what helps."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training import config, killed_at

from saemill.cli import main
from saemill.common import records
from saemill.common.errors import ConfigError, StoreError
from saemill.common.stores.activations import ActivationStore
from saemill.train.record.checkpoint import Checkpoint
from saemill.train.run import run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"site": ("c",)}, "not in the store; finished: a, b"),
        ({"site": ()}, "name a site"),
        ({"k": (100,)}, "k must be in"),
        ({"max_tokens": 100}, "less than one step"),
        ({"lr": (-1.0,)}, "lr must be positive"),
        ({"optimizer": "sgd", "lr": ("auto",)}, "not known for sgd; give --lr"),
        ({"epochs": 2}, "not both"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"run_name": "x"}, "no effect without log_to_wandb"),
        ({"wandb_project": "x"}, "no effect without log_to_wandb"),
        ({"wandb_entity": "x"}, "no effect without log_to_wandb"),
        ({"wandb_log_frequency": 10}, "no effect without log_to_wandb"),
        ({"wandb_artifacts": True}, "no effect without log_to_wandb"),
        ({"log_to_wandb": True, "wandb_log_frequency": 7}, "must be a multiple of log_every"),
        ({"lr_decay": "none", "lr_decay_fraction": 0.1}, "no effect with lr_decay none"),
        ({"auxk_alpha": 0.0, "k_aux": 3}, "no effect with auxk_alpha 0"),
        (
            {"architecture": ("jumprelu",), "k": (), "preact_coefficient": 3e-6, "auxk_alpha": 0.1},
            "auxk_alpha has no effect with preact_coefficient",
        ),
        (
            {"architecture": ("jumprelu",), "k": (), "preact_coefficient": 3e-6, "k_aux": 3},
            "k_aux has no effect with preact_coefficient",
        ),
        (  # relu has no AuxK
            {"architecture": ("jumprelu", "relu"), "k": (), "preact_coefficient": 3e-6, "k_aux": 3},
            "k_aux has no effect with preact_coefficient",
        ),
    ],
)
def test_refusals(store: ActivationStore, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Oracle: the message; nothing was written."""
    with pytest.raises((ConfigError, StoreError), match=message):
        run(config(store, tmp_path / "r", **changes))
    assert not (tmp_path / "r").exists()


def test_other_settings_in_the_same_place_are_refused(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the message names the key; --no-resume with the same settings trains anew."""
    run(config(store, tmp_path / "r"))
    with pytest.raises(ConfigError, match="batch_size: there 256, now 128"):
        run(config(store, tmp_path / "r", batch_size=128))
    before = (tmp_path / "r" / "finished.json").stat().st_mtime_ns
    run(config(store, tmp_path / "r"))
    assert (tmp_path / "r" / "finished.json").stat().st_mtime_ns == before
    run(config(store, tmp_path / "r", resume=False))
    assert (tmp_path / "r" / "finished.json").stat().st_mtime_ns > before


def test_an_output_below_a_file_is_refused(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the file, which stays as it was."""
    (tmp_path / "file").write_text("keep me")
    with pytest.raises(ConfigError, match=r"out must be a folder, but .*/file is a file"):
        run(config(store, tmp_path / "file" / "r"))
    assert (tmp_path / "file").read_text() == "keep me"


def test_a_damaged_checkpoint_is_told(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the message says how to go on."""
    run(config(store, tmp_path / "r"))
    (tmp_path / "r" / "finished.json").unlink()
    (tmp_path / "r" / "checkpoint.json").write_bytes(b"nonsense")
    with pytest.raises(StoreError, match="--no-resume"):
        run(config(store, tmp_path / "r"))


def test_a_checkpoint_of_other_shapes_is_told(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the sentence, where torch would spread one number over the row."""
    killed_at(9, config(store, tmp_path / "r"), monkeypatch)
    file = next((tmp_path / "r").glob("checkpoint-7/*/*.pt"))
    state = torch.load(file, weights_only=True)
    state["rows"][0] = state["rows"][0][:, :1]
    torch.save(state, file)
    record = records.read(tmp_path / "r" / "checkpoint.json", Checkpoint, "")
    name = str(file.relative_to(tmp_path / "r" / record.folder))
    now = records.File.of(tmp_path / "r" / record.folder, name)
    parts = tuple(
        part.model_copy(update={"bytes": now.bytes, "xxh3": now.xxh3}) if str(part.path) == name else part
        for part in record.parts
    )
    records.write(tmp_path / "r" / "checkpoint.json", record.model_copy(update={"parts": parts}))
    with pytest.raises(StoreError, match=r"by another version of saemill\. .* with --no-resume trains"):
        run(config(store, tmp_path / "r"))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{k: 3, num_latents: many}", "variants[0].num_latents must be a whole number"),
        ("{k: 3, expansion_factor: 2.5}", "variants[0].expansion_factor must be a whole number"),
        ("{k: 3, num_latents: 48, lr: high}", "variants[0].lr must be auto or a number, got 'high'"),
        (
            "{k: 3, num_latents: 48}, {kk: 3, num_latents: 48}",
            "unknown setting variants[1].kk; did you mean k",
        ),
        ("5", "must be a group of settings"),
        (
            "{architecture: jumprelu, num_latents: 48, preact_coefficient: high, k_aux: 3}",
            "variants[0].preact_coefficient must be a number, got 'high'",
        ),
        (
            "{k: 3, num_latents: 48}, "
            "{architecture: jumprelu, num_latents: 48, preact_coefficient: 0.1, k_aux: 3}",
            "k_aux has no effect with preact_coefficient",
        ),
    ],
)
def test_bad_variants_in_a_file(
    store: ActivationStore,
    tmp_path: Path,
    entry: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Oracle: one line that says what is wrong, no traceback."""
    (tmp_path / "c.yaml").write_text(f"train: {{site: [a], variants: [{entry}]}}")
    arguments = ["train", str(store.path), "--config", str(tmp_path / "c.yaml"), "-o", str(tmp_path / "r")]
    monkeypatch.setattr(sys, "argv", ["saemill", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    told = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in told
    assert "Traceback" not in told


def test_profile_of_too_short_a_run_is_refused(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the steps that a profile takes, and those of the run, by hand."""
    with pytest.raises(ConfigError, match="--profile needs 11 steps, 4 are left"):
        run(config(store, tmp_path / "r", profile=True, max_tokens=256 * 4))


def test_a_site_without_a_variant_is_refused(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the message, where both sites are in the store and one alone is in the list."""
    listed = ({"site": "a", "k": 2, "num_latents": 32},)
    sites = [site for site in store.sites if site != "a"]
    with pytest.raises(ConfigError, match="no variant is of site"):
        run(config(store, tmp_path / "r", site=("a", sites[0]), variants=listed, k=(2,), num_latents=(32,)))


def test_short_moments_without_adam_are_refused(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the message: SGD has no moments that could be short."""
    with pytest.raises(ConfigError, match="optimizer_state 8bit has an effect with adam only"):
        run(config(store, tmp_path / "r", optimizer="sgd", optimizer_state="8bit"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"optimizer": "sgd", "lr": (0.1,), "adam_betas": (0.9, 0.999)},
            "adam_betas have an effect with adam",
        ),
        ({"adam_betas": (0.9,)}, "adam_betas must be 2 values, got"),
        ({"adam_betas": (0.9, 1.0)}, "two numbers from 0 to below 1, got"),
    ],
)
def test_betas_that_mean_nothing_are_refused(
    store: ActivationStore, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    """Oracle: the words by hand: SGD has none, Adam has two, each below 1."""
    with pytest.raises(ConfigError, match=words):
        run(config(store, tmp_path / "r", **settings))

"""Runs whose loss is that of the model: whole runs, a fine-tune of a finished SAE, killed runs, bad input."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from caching import CTX_LEN, cache, tokenized
from training import files, killed_at

from saemill.common.errors import ConfigError
from saemill.common.stores.activations import ActivationStore
from saemill.train.config import TrainConfig
from saemill.train.run import run

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 12


@pytest.fixture(scope="module")
def store(
    corpus: Path, tokenizer_folder: str, tiny_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> ActivationStore:
    """A residual stream and an MLP's output of a GPT-NeoX of 3 blocks."""
    folder = tmp_path_factory.mktemp("in-model")
    tokens = tokenized(corpus, tokenizer_folder, folder / "tokens")
    return cache(tokens, tiny_models["neox"], folder / "acts", sites=("layers.1", "layers.1.mlp"))


def settings(store: ActivationStore, out: Path, **changes: Any) -> TrainConfig:
    """A run of a few steps, of 4 rows each."""
    base: dict[str, Any] = {
        "site": ("layers.1",), "k": (4,), "num_latents": (64,), "lr": (3e-3,), "batch_size": 4 * CTX_LEN,
        "max_tokens": 4 * CTX_LEN * STEPS, "log_every": 3, "save_every": 5, "device": "cpu", "loss": "kl",
    }  # fmt: skip
    return TrainConfig(acts=store.path, out=out, **base | changes)


def logged(out: Path) -> list[dict[str, Any]]:
    """Figures of the run's only variant, line by line."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [next(iter(line["variants"].values())) for line in lines]


def test_a_whole_run_lowers_what_it_minimises(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the first figures of the log."""
    for loss, share in (("kl", 0.9), ("ce", 0.97)):
        out = tmp_path / loss
        run(settings(store, out, loss=loss, auxk_alpha=0.0, max_tokens=4 * CTX_LEN * 40))
        figures = logged(out)
        assert figures[-1][loss] < share * figures[0][loss]
        assert figures[-1]["loss"] == pytest.approx(figures[-1][loss])


def test_losses_side_by_side_and_measured(
    store: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: each SAE alone, byte by byte; what is told of the start is what the run before ended with."""
    first = tmp_path / "first"
    run(settings(store, first, loss="fvu", eval_every=6, eval_losses_every=6, log_every=6))
    (source,) = first.glob("layers*")
    both = settings(
        store, tmp_path / "both", site=(), k=(), num_latents=(), init_from=str(source), loss="mse",
        variants=({"loss": "mse+kl", "name": "kl"}, {"loss": "fvu", "name": "fvu"}),
        eval_every=6, eval_losses_every=6, log_every=6,
    )  # fmt: skip
    capsys.readouterr()
    run(both)
    told = "".join(capsys.readouterr())
    alone = replace(both, out=tmp_path / "alone", variants=both.variants[:1])
    run(alone)
    assert files(both.out)["kl/sae.safetensors"] == files(alone.out)["kl/sae.safetensors"]
    ended = logged(first)[-1]
    assert f"kl starts at eval_fvu {ended['eval_fvu']:.4g}" in told
    assert f"eval_delta_ce {ended['eval_delta_ce']:.4g}" in told
    assert logged(alone.out)[-1].keys() >= {"kl", "eval_delta_ce"}


def test_killed_and_resumed(store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: an uninterrupted run, byte by byte; two sites, of which one needs the whole model."""
    whole = settings(store, tmp_path / "whole", site=("layers.1", "layers.1.mlp"), loss="mse+kl")
    run(whole)
    killed = replace(whole, out=tmp_path / "killed")
    killed_at(8, killed, monkeypatch)
    run(killed)
    assert files(killed.out) == files(whole.out)


def test_bad_input(store: ActivationStore, tiny_models: dict[str, str], tmp_path: Path) -> None:
    """Oracle: the messages, by hand; nothing is written before them."""
    cases: list[tuple[dict[str, Any], str]] = [
        ({"batch_size": 3 * CTX_LEN + 1, "max_tokens": None}, f"say batch_size {3 * CTX_LEN} for 3"),
        ({"data_ranks": 2}, "data_ranks 2: a loss of the model needs whole rows"),
        ({"latent_ranks": 2}, "latent_ranks 2: a loss of the model needs all latents"),
        ({"nested_k": (2,)}, "loss kl is of one reconstruction"),
        ({"loss": "ce", "architecture": ("matryoshka",)}, "loss ce is of one reconstruction"),
        ({"model": tiny_models["gpt2"]}, "is another model"),
        (
            {"loss": "fvu", "model": "x"},
            "model has no effect without eval_losses_every or a",
        ),
    ]
    for changes, message in cases:
        out = tmp_path / "out"
        with pytest.raises(ConfigError, match=message):
            run(settings(store, out, **changes))
        assert not list(out.glob("*.safetensors"))


def test_a_masked_model_is_refused(
    corpus: Path, tokenizer_folder: str, tiny_models: dict[str, str], tmp_path: Path
) -> None:
    """Oracle: the message; the cache holds no activations of masked rows."""
    tokens = tokenized(corpus, tokenizer_folder, tmp_path / "tokens")
    store = cache(tokens, tiny_models["bert"], tmp_path / "acts", layers=(1,), allow_other_tokenizer=False)
    with pytest.raises(ConfigError, match=r"mask(ed)? token"):
        run(settings(store, tmp_path / "out", site=("encoder.layer.1",)))

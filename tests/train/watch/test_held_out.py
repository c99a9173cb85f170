"""Figures on held-out text while SAEs train: what they are, and that training does not notice."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import finish, launch
from stores import make_embeddings
from training import config, files, halved, killed_at, structured_store
from watching import dense_figures, held_out, lines

from saemill.common.errors import ConfigError
from saemill.common.sae.sae import Sae
from saemill.common.stores import runs
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.mask import MaskConfig
from saemill.common.tracking import follow
from saemill.train.config import TrainConfig
from saemill.train.run import run
from saemill.train.trainer import Trainer
from saemill.train.watch.plan import Plan, plan_of

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = 300
ALL: dict[str, Any] = {
    "architecture": ("topk", "batchtopk", "matryoshka", "jumprelu", "relu", "gated"), "k": (4,),
    "num_latents": (48,), "target_l0": (4.0,), "prefixes": (6, 20), "nested_k": (1, 2),
    "max_tokens": 256 * 24, "log_every": 4, "eval_every": 8, "eval_tokens": TOKENS, "n_checkpoints": 2,
}  # fmt: skip
"""Every architecture; SAEs are kept at steps 8 and 16, where they are measured."""
BY_TOPK: dict[str, Any] = ALL | {
    "architecture": ("matryoshka",), "matryoshka_rule": "topk", "nested_k": (), "target_l0": (),
}  # fmt: skip
"""A Matryoshka SAE with a k, of which a prefix has more active latents than the whole has in it."""


@pytest.mark.parametrize("settings", [ALL, BY_TOPK], ids=["all", "matryoshka by topk"])
def test_figures_are_those_of_the_saes_that_are_saved(
    store: ActivationStore, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Oracle: the SAEs as they were written at those steps, dense and in float64, on the rows that the text
    says are held out; per prefix and per k as well. Between measurements there are none."""
    folders = run(config(store, tmp_path / "r", **settings))
    x_TD, found = held_out(store, "a", TOKENS), lines(tmp_path / "r")
    assert len(x_TD) == TOKENS
    for step, place in ((8, "steps/8"), (16, "steps/16"), (24, ".")):
        for folder in folders:
            figures, sae = found[step][folder.name], Sae.load(tmp_path / "r" / place / folder.name)
            parts: dict[str, dict[str, int]] = {"": {}}
            parts |= {f"_f{n}": {"n_latents": n} for n in sae.config.prefixes[:-1]}
            parts |= {f"_k{k}": {"k": k} for k in sae.config.ks[:-1]}
            for suffix, part in parts.items():
                names = [f"eval_{name}{suffix}" for name in ("fvu", "l0", "dead_fraction")]
                expected = dense_figures(sae, x_TD, **part)
                assert [figures[name] for name in names] == pytest.approx(expected, rel=1e-4), (step, suffix)
            assert sum(name.startswith("eval_") for name in figures) == 3 * len(parts)
            assert not [name for name in found[step - 4][folder.name] if name.startswith("eval_")]


@pytest.mark.parametrize(
    "changes",
    [{"kernels": "torch"}, {"kernels": "numba"}, {"weight_average": 0.9}, {"optimizer": "signum"}],
    ids=str,
)
def test_training_does_not_notice(store: ActivationStore, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Oracle: the same run without measurements: every byte of weights, and every other figure. Where the
    SAE is an average of the weights, that is what is measured, and kept on the way."""
    run(config(store, tmp_path / "plain", **changes, eval_every=0))
    folders = run(config(store, tmp_path / "watched", **changes, eval_every=5, n_checkpoints=3))
    plain, watched = files(tmp_path / "plain"), files(tmp_path / "watched")
    for name in plain.keys() - {"metrics"}:
        assert watched[name] == plain[name]
    for step, variants in lines(tmp_path / "plain").items():
        for name, figures in variants.items():
            found = lines(tmp_path / "watched")[step][name]
            assert {key: value for key, value in found.items() if not key.startswith("eval_")} == figures
            assert "eval_fvu" in found
    expected = dense_figures(Sae.load(folders[0]), held_out(store, "a", 8192))
    assert lines(tmp_path / "watched")[24][folders[0].name]["eval_fvu"] == pytest.approx(
        expected[0], rel=1e-4
    )


def test_a_killed_run_has_the_figures_of_an_uninterrupted_one(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the same run without a stop: the log but for times, all SAEs, those kept on the way too."""
    changes: dict[str, Any] = ALL | {"save_every": 7}
    run(config(store, tmp_path / "whole", **changes))
    for step in (9, 17):
        killed_at(step, config(store, tmp_path / "cut", **changes), monkeypatch)
    run(config(store, tmp_path / "cut", **changes))
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def _by_two(store: ActivationStore, out: Path, *more: str) -> dict[int, dict[str, Any]]:
    command = [
        "train", str(store.path), "--site", "a,b", "--k", "4", "--num-latents", "48", "--lr", "3e-3",
        "--batch-size", "256", "--max-tokens", "6k", "--set", "train.log_every=5", "--eval-every", "10",
        "--eval-tokens", str(TOKENS), "--n-checkpoints", "1", "--precision", "fp32", "--device", "cpu",
        "-o", str(out), *more,
    ]  # fmt: skip
    finish(launch(2, "-m", "saemill", *command))
    return lines(out)


@pytest.mark.parametrize("spread", [(1, 1), (2, 1), (1, 2)], ids=["dealt", "tokens split", "latents split"])
def test_two_processes_measure_each_sae_once(
    store: ActivationStore, tmp_path: Path, spread: tuple[int, int]
) -> None:
    """Oracle: the SAEs that the processes wrote, dense and in float64, each of its own site."""
    data_ranks, latent_ranks = map(str, spread)
    found = _by_two(store, tmp_path / "r", "--data-ranks", data_ranks, "--latent-ranks", latent_ranks)
    last = max(found)
    assert [step for step, variants in found.items() if "eval_fvu" in next(iter(variants.values()))] == [
        10, 20, last,
    ]  # fmt: skip
    assert len(found[last]) == 2
    for name, figures in found[last].items():
        expected = dense_figures(Sae.load(tmp_path / "r" / name), held_out(store, name[0], TOKENS))
        names = ("eval_fvu", "eval_l0", "eval_dead_fraction")
        assert [figures[key] for key in names] == pytest.approx(expected, rel=1e-4)
        assert Sae.load(tmp_path / "r" / "steps" / "latest" / name).config.k == 4


def test_what_halving_stops_ends_with_its_figures(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the SAE that was stopped at step 12, dense and in float64; the measurements' own steps are
    others."""
    run(halved(store, tmp_path / "r", eval_every=10, eval_tokens=TOKENS))
    (look,) = runs.looks(tmp_path / "r")
    found = lines(tmp_path / "r")
    assert [step for step, variants in found.items() if "eval_fvu" in next(iter(variants.values()))] == [
        10, 12, 20, 25,
    ]  # fmt: skip
    (name,) = look.stopped
    expected = dense_figures(Sae.load(tmp_path / "r" / name), held_out(store, "a", TOKENS))
    assert found[12][name]["eval_fvu"] == pytest.approx(expected[0], rel=1e-4)


def test_what_diverged_has_no_figures(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: None, in JSON that every reader takes; of weights that have just overflowed, too. The healthy
    one has its figures."""
    wild = {"k": 4, "num_latents": 48, "optimizer": "sgd", "lr": 1e30}
    healthy = {"k": 4, "num_latents": 48, "seed": 1}
    one_step = Trainer._one_step

    def overflowing(self: Trainer) -> None:
        one_step(self)
        if self.step == 20:
            self.learners[1].parameters.w_enc_FD[0, 0] = torch.inf

    monkeypatch.setattr(Trainer, "_one_step", overflowing)
    changes: dict[str, Any] = {"variants": (wild, healthy), "k": (4,), "num_latents": ()}
    run(config(store, tmp_path / "r", eval_every=10, **changes))
    assert "NaN" not in (tmp_path / "r" / "metrics.jsonl").read_text()
    found = lines(tmp_path / "r")
    first, second = found[10]
    assert found[10][first]["eval_fvu"] is None
    assert found[10][second]["eval_fvu"] > 0
    assert found[20][second]["eval_fvu"] is None


def test_the_plan_by_default(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: by hand: a 10th of the run, 500 steps at least, where a line is logged; none in a short run, of
    a store without held-out text, or with 0."""

    def plan(n_steps: int, **changes: Any) -> Plan | None:
        return plan_of(TrainConfig(acts=store.path, out=tmp_path, **changes), store, store.mask, n_steps)

    assert plan(499) is None
    assert plan(500) == Plan(500, 8192, None, 4096)
    assert plan(500, log_every=300) is None
    assert plan(90_001, log_every=7, eval_tokens=5) == Plan(9002, 5, None, 4096)
    assert plan(90_000, eval_every=0) is None
    assert plan(100, eval_losses_every=50) == Plan(50, 8192, 50, 4096)
    assert plan(100, eval_every=100) == Plan(100, 8192, None, 4096)
    with pytest.raises(ConfigError, match="the first measurement would be at step 101, and the run has 100"):
        plan(100, eval_every=101, log_every=1)
    with pytest.raises(ConfigError, match="eval_tokens has no effect"):
        plan(100, eval_tokens=7)
    masked = MaskConfig(first_positions=31, token_ids=tuple(range(8192)))
    by_default, asked = (TrainConfig(acts=store.path, out=tmp_path, **c) for c in ({}, {"eval_every": 10}))
    assert plan_of(by_default, store, masked, 1000) is None
    with pytest.raises(ConfigError, match="has no held-out tokens; leave it out"):
        plan_of(asked, store, masked, 1000)
    embeddings = ActivationStore(make_embeddings(tmp_path)[0])
    losses = TrainConfig(acts=embeddings.path, out=tmp_path, eval_losses_every=10)
    with pytest.raises(ConfigError, match="embeddings have no language model"):
        plan_of(losses, embeddings, embeddings.mask, 1000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_every": 7}, r"eval_every must be a multiple of log_every \(5 steps\), got 7"),
        ({"eval_every": 10, "eval_losses_every": 15}, r"a multiple of eval_every \(10 steps\), got 15"),
        ({"eval_losses_every": 7}, r"eval_losses_every must be a multiple of log_every \(5 steps\), got 7"),
        ({"eval_every": 0, "eval_tokens": 9}, "eval_tokens has no effect with eval_every 0"),
        ({"eval_every": 0, "eval_losses_every": 5}, "eval_losses_every has no effect with eval_every 0"),
        ({"model": "m"}, "model has no effect without eval_losses_every"),
        ({"eval_losses_tokens": 9}, "eval_losses_tokens has no effect without eval_losses_every"),
        ({"eval_every": 30}, "eval_every has no effect: the first measurement would be at step 30"),
        ({"n_checkpoints": 24}, "n_checkpoints must be fewer than the run's 24 steps, got 24"),
    ],
)
def test_refusals(store: ActivationStore, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Oracle: the message; nothing was written."""
    with pytest.raises(ConfigError, match=message):
        run(config(store, tmp_path / "r", **changes))
    assert not (tmp_path / "r").exists()


def test_they_are_shown_and_sent(
    store: ActivationStore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: metrics.jsonl: the last line of the console, and what wandb is sent beside its own steps."""
    monkeypatch.setattr("saemill.train.record.metrics.LINE_SECONDS", 0.0)
    (folder,) = run(config(store, tmp_path / "r", k=(4,), num_latents=(48,), eval_every=10))
    told, found = capsys.readouterr(), lines(tmp_path / "r")
    n_rows = int(store.text.held_out_R.sum())
    assert f"{n_rows} rows held out, to measure on every 10 steps" in told.out
    assert told.out.count("measured on ") == 1
    shown = [line for line in told.err.splitlines() if folder.name in line]
    assert "eval_fvu" not in shown[0]
    for line, step in zip(shown[1:], (10, 10, 20, 24), strict=True):
        assert f"eval_fvu {found[step][folder.name]['eval_fvu']:.4g}" in line

    class Sent:
        def __init__(self) -> None:
            self.settings, self.steps = self, list[int]()
            self.log_frequency, self.open = 15, dict[str, Any]()

        def log(self, line: dict[str, Any]) -> None:
            self.steps.append(line["step"])

    sent: Any = Sent()
    text = (tmp_path / "r" / "metrics.jsonl").read_text()
    follow.log_due(tmp_path / "r", sent, map(json.loads, text.splitlines()))
    assert sent.steps == [10, 15, 20, 24, 24]


def test_no_transformers_without_losses(tmp_path: Path) -> None:
    """Oracle: the modules of a process that has trained and measured."""
    store = structured_store(tmp_path)
    code = (
        "import sys; from saemill.cli import app; app(sys.argv[1:], standalone_mode=False); "
        "print(sorted({'transformers', 'wandb'} & set(sys.modules)))"
    )
    command = ["train", str(store.path), "--site", "a", "--k", "2", "--num-latents", "48", "--max-tokens"]
    command += ["2560", "--batch-size", "256", "--eval-every", "10", "-o", str(tmp_path / "r")]
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, check=True, env=os.environ
    )
    assert "measured on " in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"

"""Successive halving: the rules, and runs in which the worse half stops."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launching import finish, launch, launch_held
from training import config, files, killed_at
from waiting import LIMIT_SECONDS, wait_until

from saemill.cli import app
from saemill.common.errors import ConfigError, StoreError
from saemill.common.sae.sae import Sae
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.runs import Stopped
from saemill.train.run import run
from saemill.train.sweep.halving import Halving, window
from saemill.train.sweep.variant import Variant

RUN = "0123456789abcdef"


def variants_of(ks: list[int]) -> list[Variant]:
    return [Variant(name=f"v{i}", site="a", k=k, num_latents=64, lr=1.0, k_aux=1) for i, k in enumerate(ks)]


def test_the_worse_half_of_each_k_is_stopped(tmp_path: Path) -> None:
    """Oracle: by hand; of three two go on, one alone goes on, a diverged one is the worst."""
    halving = Halving(tmp_path, RUN, variants_of([4, 4, 4, 8, 16, 16]), 1000, 2, "fvu")
    assert halving.ends == [250, 500, 1000]
    scores = {"v0": 0.3, "v1": 0.1, "v2": 0.2, "v3": 9.0, "v4": None, "v5": 0.5}
    losers = halving.choose(scores)
    assert losers == {"v0": (0.3, 0.1), "v4": (None, 0.5)}
    halving.stop(250, losers, dict.fromkeys(losers, RUN))
    assert [v.name for v in halving.alive] == ["v1", "v2", "v3", "v5"]
    again = Halving(tmp_path, RUN, halving.variants, 1000, 2, "fvu")
    again.past = again.read()
    assert again.ends == [500, 1000]
    assert again.stopped["v0"] == Stopped(step=250, metric="fvu", value=0.3, best=0.1)
    assert again.choose({"v1": 0.1, "v2": 0.1, "v3": 1.0, "v5": 1.0}) == {"v2": (0.1, 0.1)}
    other = Halving(tmp_path, RUN, halving.variants, 2000, 2, "fvu")
    with pytest.raises(StoreError, match=r"halving.json does not fit the run's settings. .* --no-resume"):
        other.read()


@given(st.lists(st.integers(1, 3), min_size=2, max_size=20), st.data())
def test_every_group_keeps_its_best_and_loses_its_worst(ks: list[int], data: st.DataObject) -> None:
    """Oracle: numbers kept are ceil(n / 2), and none that was stopped is better than one that was kept."""
    variants = variants_of(ks)
    halving = Halving(Path("none"), RUN, variants, 1000, 0, "fvu")
    scores = {v.name: data.draw(st.floats(0, 1)) for v in variants}
    losers: dict[str, Any] = halving.choose(scores)
    for k in set(ks):
        group = [v.name for v in variants if v.k == k]
        kept = [scores[name] for name in group if name not in losers]
        assert len(kept) == -(-len(group) // 2)
        assert all(scores[name] >= max(kept) for name in group if name in losers)


def test_halving_without_effect_is_refused(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the message says what to change."""
    with pytest.raises(ConfigError, match="no two variants share a site and k"):
        run(config(store, tmp_path / "a", num_latents=(48,), max_tokens=256 * 40, halving=1))
    with pytest.raises(ConfigError, match="looks first at step 3 of 24, 10 are the least"):
        run(config(store, tmp_path / "b", halving=3))
    with pytest.raises(ConfigError, match="halving_metric has no effect without halving"):
        config(store, tmp_path / "c", halving_metric="fvu")


SETTINGS = {"lr": (1e-5, 1e-4, 3e-3, 1e-3), "num_latents": (48,), "max_tokens": 256 * 50, "batch_size": 256}


def test_survivors_equal_a_run_without_halving(
    store: ActivationStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: the same run without halving, bit by bit for those that go on, killed at and after a look;
    the best rates by its final metrics survive."""
    run(config(store, tmp_path / "all", **SETTINGS))
    out = tmp_path / "half"
    for step in (12, 30):
        killed_at(step, config(store, out, halving=2, **SETTINGS), monkeypatch)
    run(config(store, out, halving=2, **SETTINGS))
    finished = json.loads((out / "finished.json").read_text())
    survivors = set(finished["variants"]) - set(finished["stopped"])
    assert survivors == {"a-k2-f48-s0-lr0.003", "a-k8-f48-s0-lr0.003"}
    assert {look["step"] for look in finished["stopped"].values()} == {12, 25}
    whole, half = files(tmp_path / "all"), files(out)
    for name in survivors:
        assert half[f"{name}/sae.safetensors"] == whole[f"{name}/sae.safetensors"]
    for name, look in finished["stopped"].items():
        assert Sae.load(out / name).config.provenance["tokens_trained"] == look["step"] * 256
        lines = [json.loads(line) for line in (tmp_path / "all" / "metrics.jsonl").read_text().splitlines()]
        before = next(x["variants"][name]["fvu"] for x in lines if window(look["step"]) - 5 < x["step"])
        assert look["value"] == pytest.approx(before, rel=0.5)


@pytest.mark.usefixtures("one_thread")
def test_a_run_with_idle_processes_is_resumed(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: one process, bit by bit; stopped after a look that left a process of three without work."""
    command = [
        "train", str(store.path), "--site", "a", "--k", "2", "--num-latents", "48",
        "--lr", "1e-5,1e-4,3e-3", "--batch-size", "64", "--max-tokens", "32k", "--save-every", "20",
        "--precision", "fp32", "--device", "cpu", "--halving", "1", "--latent-ranks", "1",
    ]  # fmt: skip
    out = tmp_path / "three"
    app([*command, "-o", str(tmp_path / "one")], standalone_mode=False)
    process = launch_held(3, [*command, "-o", str(out)], "498:never")
    wait_until((out / "halving.json").exists, process)
    process.terminate()
    process.communicate(timeout=LIMIT_SECONDS)
    assert not (out / "finished.json").exists()
    finish(launch(3, "-m", "saemill", *command, "-o", str(out)))
    assert files(out) == files(tmp_path / "one")


@pytest.mark.usefixtures("one_thread")
def test_processes_share_out_what_goes_on(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: one process, bit by bit; three processes deal the variants anew after each look."""
    command = [
        "train", str(store.path), "--site", "a", "--k", "2,8",
        "--num-latents", "48", "--lr", "1e-5,1e-4,3e-3,1e-3", "--batch-size", "256", "--max-tokens", "12800",
        "--save-every", "7", "--log-every", "5", "--precision", "fp32", "--dead-after-tokens", "512",
        "--device", "cpu", "--halving", "2", "--latent-ranks", "1",
    ]  # fmt: skip
    app([*command, "-o", str(tmp_path / "one")], standalone_mode=False)
    finish(launch(3, "-m", "saemill", *command, "-o", str(tmp_path / "three")))
    assert files(tmp_path / "three") == files(tmp_path / "one")
    one, three = (json.loads((tmp_path / n / "halving.json").read_text()) for n in ("one", "three"))
    assert one == three

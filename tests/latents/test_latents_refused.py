"""What no format has a word for, and settings without effect: refused before any work, in words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from assessments import write_assessment
from stores import make_embeddings, make_store
from training import config, structured_store

from saemill.common import durable, records
from saemill.common.errors import ConfigError, SaemillError, StoreError
from saemill.common.stores import assessments
from saemill.common.stores.activations import ActivationStore
from saemill.latents.config import ExportLatentsConfig
from saemill.latents.run import run
from saemill.train.run import run as train


def settings(place: Path, format: Any = "delphi", **values: Any) -> ExportLatentsConfig:
    return ExportLatentsConfig(
        **{"run": place, "format": format, "out": place.parent / "to", "device": "cpu"} | values
    )


@pytest.mark.parametrize(
    ("format", "name", "value"),
    [
        ("saebench", "latents", ("1",)), ("saebench", "max_tokens", 5), ("saebench", "ctx", 4),
        ("saebench", "held_out", True), ("saebench", "model", "m"), ("saedashboard", "n_splits", 2),
        ("delphi", "release", "r"),
    ],
)  # fmt: skip
def test_settings_without_effect(format: str, name: str, value: Any) -> None:
    """Oracle: the message names the setting and the format."""
    with pytest.raises(ConfigError, match=f"{name} has no effect with format {format}"):
        settings(Path("r"), format, **{name: value})


@pytest.mark.parametrize("text", ["x", "3-1", "1-", "-1", "", "1-2-3", "1.5", "٣", "9" * 30])
def test_latents_that_are_none(text: str) -> None:
    """Oracle: the message."""
    with pytest.raises(ConfigError, match="latents"):
        settings(Path("r"), latents=(text,))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return structured_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def trained(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one SAE, whose store is of no model."""
    out = tmp_path_factory.mktemp("run") / "run"
    train(config(store, out, k=(2,), num_latents=(48,), max_tokens=1024))
    return out


def refused(config: ExportLatentsConfig, kind: type[SaemillError], words: str) -> None:
    with pytest.raises(kind, match=words):
        run(config)
    assert not config.out.exists()
    assert not list(config.out.parent.glob(".to*"))


def test_what_is_no_run(trained: Path, tmp_path: Path) -> None:
    """Oracle: the messages; nothing is left behind."""
    refused(settings(tmp_path / "none"), StoreError, "is no finished run")
    refused(settings(trained / "steps-of-it"), StoreError, "no SAE of the run; it has a-k2-f48-s0-lr0.003")
    refused(
        settings(trained, acts=tmp_path / "gone"), StoreError, "no longer at .*gone; say where with --acts"
    )
    refused(
        settings(trained, latents=("0-48",)),
        ConfigError,
        r"must be in 0\.\.47 of a-k2-f48-s0-lr0.003, got 48",
    )
    refused(settings(trained, ctx=5), ConfigError, "ctx must divide the 32 tokens")
    other = make_store(tmp_path, n_rows=40, ctx_len=32, d=16, shard_tokens=640, seed=4)
    refused(settings(trained, acts=other.path), StoreError, "was not trained on")
    (tmp_path / "in-use").mkdir()
    (tmp_path / "in-use" / "file").touch()
    with pytest.raises(ConfigError, match="a new or an empty folder"):
        run(settings(trained, out=tmp_path / "in-use"))


def test_sites_in_no_layer(trained: Path) -> None:
    """Oracle: the message; Neuronpedia has SAEs by their layer's number."""
    refused(settings(trained, "saedashboard"), ConfigError, "has SAEs of a layer, by its number, got a-k2")


def test_crosscoders_and_transcoders(store: ActivationStore, tmp_path: Path) -> None:
    """Oracle: the messages name the SAE and the sites."""
    small: dict[str, Any] = {"k": (2,), "num_latents": (48,), "max_tokens": 1024}
    train(config(store, tmp_path / "cross", site=("a+b",), architecture=("batchtopk",), **small))
    for format in ("delphi", "saedashboard", "saebench"):
        refused(settings(tmp_path / "cross", format), ConfigError, "a crosscoder over a and b")
    train(config(store, tmp_path / "trans", target_site=("b",), **small))
    refused(settings(tmp_path / "trans", "saebench"), ConfigError, "a transcoder from a to b")


def test_embeddings(tmp_path: Path) -> None:
    """Oracle: the message; passages have no tokens."""
    path, _ = make_embeddings(tmp_path)
    store = ActivationStore(path)
    train(
        config(
            store,
            tmp_path / "run",
            site=("embedding",),
            k=(2,),
            num_latents=(8,),
            max_tokens=80,
            batch_size=8,
        )
    )
    refused(settings(tmp_path / "run"), ConfigError, "embeddings of passages, which have neither")


def change(trained: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Write an assessment of the run by hand."""
    write_assessment(trained, {"a-k2-f48-s0-lr0.003": "healthy"})
    values = assessments.read(trained)
    values["of"] = durable.hash_file(trained / "finished.json")
    names = ("kl", "kl_zero", "loss_recovered", "ce_zero", "ce_spliced", "ce_clean", "explained_variance",
             "mse", "cosine", "norm_ratio", "l0")  # fmt: skip
    values["variants"][0]["metrics"] = {name: {"value": 1.0} for name in names}
    values["settings"] = {"max_tokens": 10}
    edit(values)
    records.write(trained / assessments.FILE, assessments.checked(values))


def test_assessments_that_lack_figures(trained: Path) -> None:
    """Oracle: the messages, each with what helps; SAEBench's schema takes no null."""
    bench = settings(trained, "saebench")
    refused(bench, StoreError, "has no final_assessment.json.*run `saemill assess")
    change(trained, lambda values: values["variants"][0]["metrics"].pop("kl_zero"))
    refused(bench, ConfigError, "of an earlier saemill: it has no kl_zero.*run `saemill assess` again")
    missing = {"value": None, "reason": "no model was run"}
    change(trained, lambda values: values["variants"][0]["metrics"].update(kl=missing, ce_zero=missing))
    refused(
        bench,
        ConfigError,
        "a number for kl_div_with_sae, ce_loss_with_ablation, and a-k2-f48-s0-lr0.003 has none: no model",
    )
    change(trained, lambda values: values.update(of="0" * 16))
    refused(bench, StoreError, "is of other SAEs than")
    change(trained, lambda values: None)
    refused(bench, StoreError, "is of 1 tokens, and .* has 10 of them; run")
    (trained / assessments.FILE).unlink()

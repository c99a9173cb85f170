"""The passes of an assessment: how often the tokens are read, and that it changes no figure."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pipeline import Pipeline

from saemill.assess import measure
from saemill.assess.config import AssessConfig
from saemill.assess.evalset import EvalSet
from saemill.assess.run import run
from saemill.common.models.model import LanguageModel
from saemill.train.config import TrainConfig
from saemill.train.run import run as train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, str], tokenizer_folder: str, corpus: Path
) -> Pipeline:
    """A run of two shapes, and beside it one of a single shape."""
    folder = tmp_path_factory.mktemp("measure")
    made = Pipeline(folder, tiny_models["neox"], tokenizer_folder, corpus, "layers.1")
    config = TrainConfig(
        acts=made.acts, out=folder / "alike", site=(made.site,), k=(4,), num_latents=(64,), batch_size=256,
        lr=(1e-3, 3e-3), device="cpu",
    )  # fmt: skip
    train(config)
    return made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How often the evaluation tokens were gone through, and the model was run to its head."""
    counts = dict.fromkeys(("chunks", "rows", "logits"), 0)
    for owner, name in ((EvalSet, "chunks"), (EvalSet, "rows"), (LanguageModel, "logits")):
        plain = getattr(owner, name)

        def counting(*arguments: Any, name: str = name, plain: Any = plain, **named: Any) -> Any:
            counts[name] += 1
            return plain(*arguments, **named)

        monkeypatch.setattr(owner, name, counting)
    return counts


def assessed(folder: Path, out: Path) -> dict[str, Any]:
    """The assessment, all rows with losses in one batch; without what differs from run to run."""
    config = AssessConfig(
        run=folder, out=out, device="cpu", max_tokens=2000, model_tokens=320, batch_size=10, n_latents=0
    )
    return {key: value for key, value in run(config).items() if key not in ("seconds", "files")}


def test_saes_of_one_shape_are_measured_with_the_baselines_in_one_pass(
    made: Pipeline, tmp_path: Path, calls: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the same figures, bit for bit, from two passes; of both, what is counted by hand: the check
    for later tokens takes 3 passes of the model (`sees_later_tokens`), then come the untouched model, the
    true activation, zeros, the mean, 2 SAEs and 2 baselines, and in a second pass the untouched model."""
    folder = made.out.parent / "alike"
    once = assessed(folder, tmp_path / "once")
    assert calls == {"chunks": 1, "rows": 1, "logits": 3 + 4 + 2 + 2}
    calls |= dict.fromkeys(calls, 0)
    monkeypatch.setattr(measure, "_are_known", lambda _: False)
    assert assessed(folder, tmp_path / "twice") == once
    assert calls == {"chunks": 2, "rows": 2, "logits": 3 + 4 + 2 + 1 + 2}
    for name in ("documents.parquet", "documents_model.parquet", "latents.parquet"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


def test_every_k_has_its_baselines(made: Pipeline, tmp_path: Path, calls: dict[str, int]) -> None:
    """Oracle: the variants' k and number of latents; one pass over everything."""
    assessment = assessed(made.out, tmp_path)
    assert {entry["k"] for entry in assessment["variants"]} == {2, 16}
    names = ["random-k2-f128", "pca-k2", "random-k16-f128", "pca-k16"]
    assert [entry["name"] for entry in assessment["controls"]] == names
    for entry in assessment["variants"] + assessment["controls"]:
        against = {check["against"] for check in entry["evidence"] if check["against"]}
        assert against == {f"random-k{entry['k']}-f128", f"pca-k{entry['k']}"}
    assert calls == {"chunks": 1, "rows": 1, "logits": 3 + 4 + 2 + 4}


def test_a_variant_may_have_the_name_of_a_baseline(made: Pipeline, tmp_path: Path) -> None:
    """Oracle: the same run with the variant's own name: its figures, and the baselines'."""
    common: dict[str, Any] = {"acts": made.acts, "site": (made.site,), "batch_size": 256, "device": "cpu"}
    sae: dict[str, Any] = {"k": 4, "num_latents": 64, "lr": 3e-3}
    found = []
    for name in ("plain", "pca-k4"):
        train(TrainConfig(out=tmp_path / name, variants=({**sae, "name": name},), **common))
        found.append(assessed(tmp_path / name, tmp_path / f"of-{name}"))
    plain, odd = found
    assert odd["best_variant"] == "pca-k4"
    assert odd["variants"][0]["metrics"] == plain["variants"][0]["metrics"]
    assert [entry["name"] for entry in odd["controls"]] == ["random-k4-f64", "pca-k4-untrained"]
    for one, other in zip(odd["controls"], plain["controls"], strict=True):
        assert one["metrics"] == other["metrics"]

"""Models × sources × layers × seeds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from texts import random_texts

from saemill.common.errors import ConfigError, StoreError
from saemill.pipeline import chain
from saemill.pipeline.matrix import run
from saemill.tokenize.config import TokenizeConfig
from saemill.tokenize.run import run as tokenize


@pytest.fixture
def file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_models: dict[str, str], tokenizer_folder: str
) -> Path:
    """Two models × two texts × two layers (of one model) × two seeds."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("one", 1), ("two", 2)):
        lines = [json.dumps({"text": text}) + "\n" for text in random_texts(300, seed)]
        Path(f"{name}.jsonl").write_text("".join(lines))
    target = {"tokenizer": tokenizer_folder}
    sections = {
        "matrix": {
            "out": "study",
            "targets": {
                "neox": {**target, "model": tiny_models["neox"], "layers": [0, 1], "num_latents": [64]},
                "llama": {**target, "model": tiny_models["llama"], "layers": [1], "expansion_factor": [3]},
            },
            "sources": {"one": {"dataset": "one.jsonl"}, "two": {"dataset": "two.jsonl"}},
            "seeds": [5, 6],
        },
        "tokenize": {"ctx_len": 32, "held_out_fraction": 0.3},
        "cache": {"device": "cpu"},
        "train": {"k": [4], "batch_size": 256, "device": "cpu"},
        "assess": {"model_tokens": 300, "max_tokens": 1000, "n_latents": 0, "device": "cpu"},
    }
    return write(tmp_path / "matrix.yaml", sections)


def write(path: Path, sections: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(sections))
    return path


def changed(file: Path, **changes: Any) -> Path:
    """The file with other settings in its section matrix."""
    sections = yaml.safe_load(file.read_text())
    sections["matrix"] |= changes
    return write(file, sections)


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models and token stores that are cached, as it happens."""
    calls: list[str] = []
    real = chain.cache

    def cache(config: Any) -> Any:
        calls.append(f"{config.model} {config.tokens}")
        return real(config)

    monkeypatch.setattr(chain, "cache", cache)
    return calls


def test_every_pair_is_cached_once_and_trained_over_all_seeds(file: Path, cached: list[str]) -> None:
    """Oracle: the pairs, layers, seeds and widths of the file, counted by hand; the assessments' own
    figures, averaged by numpy."""
    out = run(file)
    assert len(cached) == len(set(cached)) == 4
    found = json.loads((out / "matrix.json").read_text())
    assert found["missing"] == []
    cells = {(c["target"], c["source"], c["kind"]): c for c in found["cells"]}
    kinds = {"neox": ["layers.0-k4-f64", "layers.1-k4-f64"], "llama": ["layers.1-k4-f96"]}
    assert set(cells) == {(t, s, kind) for t in kinds for s in ("one", "two") for kind in kinds[t]}
    for (target, source, kind), cell in cells.items():
        names = [f"{kind}-s{seed}" for seed in (5, 6)]
        assert cell["saes"] == [f"runs/{target}--{source}/{name}" for name in names]
        assessment = json.loads((out / f"runs/{target}--{source}/final_assessment.json").read_text())
        values = [e["metrics"]["fvu"]["value"] for e in assessment["variants"] if e["name"] in names]
        np.testing.assert_allclose(cell["metrics"]["fvu"]["mean"], np.mean(values))
        np.testing.assert_allclose(cell["metrics"]["fvu"]["sd"], np.std(values, ddof=1))
    assert len(found["comparisons"]) == 3
    for entry in found["comparisons"]:
        assert (out / entry["folder"] / "report.html").exists()
        compared = json.loads((out / entry["folder"] / "comparison.json").read_text())
        assert len(compared["pairs"]) == 6  # of 2 sources × 2 seeds
        for name, n_pairs in (("seeds", 2), ("sources_and_seeds", 2), ("sources", 2)):
            of_kind = [
                pair["assignment"]["share_above"]
                for pair in compared["pairs"]
                if (pair["a"].split("/")[0] != pair["b"].split("/")[0], pair["a"][-2:] != pair["b"][-2:])
                == ("sources" in name, "seeds" in name)
            ]
            assert len(of_kind) == n_pairs
            np.testing.assert_allclose(entry["shared"][name], np.mean(of_kind))


def test_a_done_pair_stays_done_when_its_stores_are_deleted(
    file: Path, cached: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: what is on disk, and that nothing is cached a second time; a new seed is refused, as the
    pair's run has others. Both pairs are in wandb's group of the matrix."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    changed(file, delete=["tokens", "acts"], compare=False)
    sections = yaml.safe_load(file.read_text())
    sections["train"] |= {"log_to_wandb": True, "wandb_project": "studies"}
    write(file, sections)
    out = run(file, targets=("llama",))
    assert not [path for path in (out / "stores").rglob("*") if path.is_file()]
    assert len(cached) == 2
    missing = json.loads((out / "matrix.json").read_text())["missing"]
    assert missing == ["neox--one", "neox--two"]
    for name in ("llama--one", "llama--two"):
        told = json.loads((out / "runs" / name / "wandb.json").read_text())
        assert (told["project"], told["group"], told["prefix"]) == ("studies", "study", f"{name}/")
    saes = sorted(out.rglob("sae.safetensors"))
    assert len(saes) == 4
    times = [path.stat().st_mtime_ns for path in saes]
    run(file, targets=("llama",))
    assert len(cached) == 2
    assert [path.stat().st_mtime_ns for path in saes] == times
    changed(file, seeds=[5])
    with pytest.raises(ConfigError, match="llama--one was done with other settings or other text"):
        run(file, targets=("llama",))


def test_stores_of_done_pairs_are_deleted_when_that_is_asked_later(file: Path, cached: list[str]) -> None:
    """Oracle: the folders."""
    changed(file, compare=False)
    out = run(file, targets=("llama",), sources=("one",))
    stores = out / "stores" / "llama--one"
    assert sorted(path.name for path in stores.iterdir()) == ["acts", "tokens"]
    changed(file, delete=["acts"])
    run(file, targets=("llama",), sources=("one",))
    assert [path.name for path in stores.iterdir()] == ["tokens"]
    assert len(cached) == 1


def test_what_is_not_a_seed_is_told_apart(file: Path) -> None:
    """Oracle: two rates, two architectures and two seeds: four cells of two, whatever stands behind the seed
    in their names, and no comparison over anything else."""
    sections = yaml.safe_load(file.read_text())
    sections["train"] |= {"lr": ["auto", 1e-4], "architecture": ["topk", "jumprelu"], "target_l0": [4]}
    out = run(write(file, sections), targets=("llama",), sources=("one",))
    found = json.loads((out / "matrix.json").read_text())
    assert [(c["kind"], c["n_seeds"]) for c in found["cells"]] == [
        ("layers.1-jumprelu-f96-target4", 2),
        ("layers.1-jumprelu-f96-target4-lr0.0001", 2),
        ("layers.1-k4-f96", 2),
        ("layers.1-k4-f96-lr0.0001", 2),
    ]
    for entry in found["comparisons"]:
        compared = json.loads((out / entry["folder"] / "comparison.json").read_text())
        assert [pair["differs_in"] for pair in compared["pairs"]] == [["seed"]]


def test_one_pair_that_fails_does_not_stop_the_others(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the first pair's assessment fails; the second is done, and the error names the first."""
    changed(file, compare=False)
    real = chain.assess

    def assess(config: Any) -> Any:
        if config.run.name == "llama--one":
            raise StoreError("every variant diverged")
        return real(config)

    monkeypatch.setattr(chain, "assess", assess)
    with pytest.raises(StoreError, match="llama--one failed: every variant diverged"):
        run(file, targets=("llama",))
    found = json.loads(Path("study/matrix.json").read_text())
    assert found["failed"] == {"llama--one": "every variant diverged"}
    assert [c["source"] for c in found["cells"]] == ["two"]


def test_all_pairs_on_one_text(file: Path, tokenizer_folder: str) -> None:
    """Oracle: the assessments' own account of their tokens."""
    tokens = tokenize(
        TokenizeConfig(dataset="two.jsonl", tokenizer=tokenizer_folder, out=Path("ev"), ctx_len=32)
    )
    sections = yaml.safe_load(changed(file, compare=False).read_text())
    sections["assess"]["tokens"] = "ev"
    out = run(write(file, sections), targets=("llama",), sources=("one",))
    (cell,) = json.loads((out / "matrix.json").read_text())["cells"]
    assessment = json.loads((out / "runs/llama--one/on-ev/final_assessment.json").read_text())
    assert assessment["data"]["tokens_fingerprint"] == tokens.fingerprint
    values = [entry["metrics"]["fvu"]["value"] for entry in assessment["variants"]]
    np.testing.assert_allclose(cell["metrics"]["fvu"]["mean"], np.mean(values))


def test_other_text_under_the_same_name_is_refused(file: Path) -> None:
    """Oracle: the dataset changed after its pair was done."""
    changed(file, compare=False)
    run(file, targets=("llama",), sources=("one",))
    text = Path("one.jsonl")
    text.write_text(text.read_text() + json.dumps({"text": "more of it"}) + "\n")
    with pytest.raises(ConfigError, match="llama--one was done with other settings or other text"):
        run(file, targets=("llama",), sources=("one",))


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("matrix", {"targets": {}}, r"matrix\.targets is empty"),
        ("matrix", {"sources": {"a--b": {"dataset": "one.jsonl"}}}, "names folders"),
        ("matrix", {"sources": {"a": {"dataset": "absent.jsonl"}}}, "no file or folder absent.jsonl"),
        ("matrix", {"sources": {"a": {"txt": "one.jsonl"}}}, r"unknown setting matrix\.sources\.a\.txt"),
        ("matrix", {"delete": ["runs"]}, "must be one of tokens, acts"),
        ("train", {"out": "elsewhere"}, r"train\.out is each pair's own"),
        ("assess", {"acts": "elsewhere"}, r"assess\.acts is each pair's own"),
        ("train", {"seeds": [7]}, r"train\.seeds is each pair's own"),
        ("tokenize", {"tokenizer": "t"}, r"tokenize\.tokenizer is each pair's own"),
        ("run", {"save_dir": "s"}, "section run of .* has no effect"),
        ("compare", {"out": "o"}, r"compare\.out follows from the matrix"),
        ("compare", {"assignment_limit": 70}, "SAEs of 96 latents, more than the 70"),
        ("train", {"k": [80]}, r"k must be in 1..64"),
        ("train", {"batch_size": 2}, "batch_size counts tokens, and 2 of them fill no more than one row"),
    ],
)
def test_wrong_settings_of_any_pair_are_told_before_the_first(
    section: str, changes: dict[str, Any], message: str, file: Path
) -> None:
    """Oracle: nothing appears on disk."""
    sections = yaml.safe_load(file.read_text())
    sections[section] = sections.get(section, {}) | changes
    before = set(Path().iterdir())
    with pytest.raises(ConfigError, match=message):
        run(write(file, sections))
    assert set(Path().iterdir()) == before


def test_unknown_names_are_refused(file: Path) -> None:
    """Oracle: the names in the file."""
    with pytest.raises(ConfigError, match="no target 'lama'; did you mean llama"):
        run(file, targets=("lama",))

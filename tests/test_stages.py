"""The stages as functions: what the commands of their names do, with objects in and out."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
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


def in_memory(work: Work) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32)


def test_a_model_in_memory_is_taken_as_it_is(work: Work, tmp_path: Path) -> None:
    """Oracle: the bytes of the store that was cached from the model's files; the model afterwards."""
    model = in_memory(work).train()
    acts = saemill.cache_activations(work.tokens, tmp_path / "acts", model=model, layers=[1])
    x, expected = (store.read("layers.1", 0, store.n_tokens) for store in (acts, work.acts))
    assert torch.equal(x, expected)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    again = saemill.cache_activations(work.tokens, tmp_path / "acts", model=model, sites=["layers.*.mlp"])
    assert {"layers.1", "layers.0.mlp"} <= set(again.sites)
    model.get_output_embeddings().weight.data[0] += 1
    with pytest.raises(ConfigError, match="model_fingerprint"):
        saemill.cache_activations(work.tokens, tmp_path / "acts", model=model, layers=[0])
    with pytest.raises(ConfigError, match=r"^device has no effect beside a model in memory"):
        saemill.cache_activations(work.tokens, tmp_path / "acts", model=model, layers=[0], device="cpu")


def test_an_assessment_runs_a_model_in_memory(work: Work, run: saemill.Run, tmp_path: Path) -> None:
    """Oracle: the assessment that loads the model's files; another model is refused."""
    brief = {"model_tokens": 300, "max_tokens": 1000, "n_latents": 0}
    model = in_memory(work)
    given = saemill.assess_saes(run, tmp_path / "given", model=model, **brief)
    loaded = saemill.assess_saes(run, tmp_path / "loaded", **brief)
    assert [entry.metrics for entry in given.variants] == [entry.metrics for entry in loaded.variants]
    assert given.data.model_check.startswith("only the activations at layers.1 could be compared")
    torch.nn.init.normal_(model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight)
    with pytest.raises(ConfigError, match=r"its activations at layers\.1 differ"):
        saemill.assess_saes(run, tmp_path / "other", model=model, **brief)


def test_a_run_on_a_model_in_memory_asks_for_it(work: Work, tmp_path: Path) -> None:
    """Oracle: the message's advice, followed; the very model is recognised."""
    model = in_memory(work)
    acts = saemill.cache_activations(work.tokens, tmp_path / "acts", model=model, layers=[1])
    run = saemill.train_saes(acts, tmp_path / "run", **SAES | {"k": 2})
    brief: dict[str, Any] = {"model_tokens": 300, "max_tokens": 1000, "n_latents": 0}
    with pytest.raises(ConfigError, match=r"from a model in memory .*--model, or from Python"):
        saemill.assess_saes(run, **brief)
    assert saemill.assess_saes(run, model=model, **brief).data.model_check == "the very model that was cached"
    by_name = saemill.assess_saes(run, tmp_path / "by-name", model=work.model, **brief)
    assert by_name.data.model_check.startswith("only the activations")


def test_datasets_in_memory_are_taken_as_they_are(work: Work, tmp_path: Path, tokenizer_folder: str) -> None:
    """Oracle: the tokens made of the file with the same texts."""
    texts = [json.loads(line)["text"] for line in work.text.read_text().splitlines()]
    whole = datasets.Dataset.from_dict({"text": texts, "other": list(range(len(texts)))})
    splits = datasets.DatasetDict({"train": whole})
    for number, dataset in enumerate((texts, whole, splits, whole.to_iterable_dataset())):
        out = tmp_path / str(number)
        tokens = saemill.tokenize_text(dataset, out, tokenizer=tokenizer_folder, **TEXT)
        assert (tokens.rows(0, tokens.n_rows) == work.tokens.rows(0, tokens.n_rows)).all()
    again = saemill.tokenize_text(texts, tmp_path / "1", tokenizer=tokenizer_folder, **TEXT)
    assert again.n_rows == work.tokens.n_rows
    with pytest.raises(ConfigError, match="was made of another dataset than this one"):
        saemill.tokenize_text(texts[1:], tmp_path / "1", tokenizer=tokenizer_folder, **TEXT)
    with pytest.raises(ConfigError, match="a stream in memory cannot be compared"):
        saemill.tokenize_text(whole.to_iterable_dataset(), tmp_path / "1", tokenizer=tokenizer_folder, **TEXT)
    with pytest.raises(ConfigError, match="revision has no effect on a dataset in memory"):
        saemill.tokenize_text(whole, tmp_path / "new", tokenizer=tokenizer_folder, revision="x")
    with pytest.raises(ConfigError, match=r"must be a name, a list of texts.*got int"):
        saemill.tokenize_text(3, tmp_path / "new", tokenizer=tokenizer_folder)


def test_the_lines_of_the_page_on_activations_made_on_the_fly_run(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the page's own code, with a small model, text and sizes in place of those that it names; the
    same SAEs on the whole store. The model in memory is as it was."""
    page = (Path(saemill.__file__).parent.parent / "docs" / "python.md").read_text()
    section = page.split("\n## Activations made on the fly\n")[1].split("\n## ")[0]
    instead = {
        '"corpus.jsonl.gz"': f'"{work.text}"', 'tokenizer="EleutherAI/pythia-160m"': f"**{text_of(work)}",
        '"layers": [8]': '"layers": [1], "shard_tokens": 512', '"20GB"': '"170KB"', "layers.8": "layers.1",
        "k=[16, 32]": "k=[2, 4]", "num_latents=6144": "num_latents=64, batch_size=512, log_every=4, "
        "follow_tokens=1024, buffer_tokens=512",
    }  # fmt: skip
    (code,) = re.findall(r"```python\n(.*?)```", section, re.S)
    monkeypatch.chdir(tmp_path)
    for theirs, ours in instead.items():
        assert theirs in code
        code = code.replace(theirs, ours)
    model = in_memory(work).train()
    names: dict[str, Any] = {"model": model}
    exec(code, names)
    assert model.training
    assert (tmp_path / "acts" / "consumed.json").exists()
    acts = saemill.cache_activations(
        names["tokens"], tmp_path / "whole", model=model, layers=[1], shard_tokens=512
    )
    settings = {"follow": True, "follow_tokens": 1024, "buffer_tokens": 512, "site": "layers.1"}
    assert files(saemill.train_saes(acts, tmp_path / "run", **SAES, **settings).path) == files(
        names["run"].path
    )


def test_too_little_room_is_refused_before_anything_is_cached(work: Work, tmp_path: Path) -> None:
    """Oracle: the message, and no folder; what it asks for is enough. A model by name and one in memory."""
    settings = {"site": "layers.1", "follow_tokens": 1024, "k": 4, "num_latents": 64, "batch_size": 512}
    for name, model in (("named", work.model), ("in memory", in_memory(work))):
        acts, out = tmp_path / name / "acts", tmp_path / name / "run"
        cache = {"model": model, "layers": [1], "shard_tokens": 512, "delete_consumed": True}
        with pytest.raises(ConfigError, match=r"training needs .* at once") as told:
            saemill.cache_and_train(work.tokens, acts, out, cache=cache | {"max_disk": "70KB"}, **settings)
        assert not acts.parent.exists()
        size = str(told.value).split("is written, ")[1].split(";")[0]
        saemill.cache_and_train(work.tokens, acts, out, cache=cache | {"max_disk": size}, **settings)
        assert (acts / "consumed.json").exists()


def text_of(work: Work) -> dict[str, Any]:
    return TEXT | {"tokenizer": work.tokens.tokenizer.name}


def test_the_ten_lines_of_the_migration_page_run(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the page's own code, with a small model, text and sizes in place of those that it names."""
    page = (Path(saemill.__file__).parent.parent / "docs" / "migration.md").read_text()
    section = page.split("\n## From Python\n")[1].split("\n## ")[0]
    instead = {
        "EleutherAI/pythia-160m": work.model,
        'load_dataset("monology/pile-uncopyrighted"': f'load_dataset("json", data_files="{work.text}"',
        "monology/pile-uncopyrighted": str(work.text),
        "tokenizer=name": f'tokenizer="{work.tokens.tokenizer.name}"', "ctx_len=2048": "ctx_len=32",
        "ctx_len=256": "ctx_len=32", '"100M"': "3200", "[4, 8]": "[0, 1]", "[8]": "[1]",
        "batch_size=65536": "batch_size=512", "expansion_factor=32": "expansion_factor=4", "k=32": "k=2",
        "num_latents=12288": "num_latents=64, batch_size=512", "target_l0=64": "target_l0=4",
        "layers.8-jumprelu-f12288-s0-target64": "layers.1-jumprelu-f64-s0-target4",
        "assess_saes(run)": "assess_saes(run, with_model=False)",
    }  # fmt: skip
    blocks = re.findall(r"```python\n(.*?)```", section, re.S)
    assert len(blocks) == 2
    for number, code in enumerate(blocks):
        (tmp_path / str(number)).mkdir()
        monkeypatch.chdir(tmp_path / str(number))
        for theirs, ours in instead.items():
            code = code.replace(theirs, ours)
        names: dict[str, Any] = {}
        exec(code, names)
        assert len(names["run"]) == 2 - number
    assert names["sae"].config.num_latents == names["assessment"].variants[0].num_latents == 64

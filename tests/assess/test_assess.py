"""Assessments of whole models: losses, what is left out and why, what is written."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from assessments import brief, entry
from pipeline import Pipeline
from reconstructions import (
    ALONE,
)
from stores import make_tokens
from texts import bert_tokenizer, random_texts

from saemill import splice
from saemill.assess.config import AssessConfig
from saemill.assess.done import is_done
from saemill.assess.evalset import EvalSet
from saemill.assess.run import run
from saemill.assess.table import contexts_text
from saemill.common.errors import ConfigError, StoreError
from saemill.common.models import cached
from saemill.common.sae.sae import Sae
from saemill.common.stores import features
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.tokens import TokenStore
from saemill.tokenize.config import TokenizeConfig
from saemill.tokenize.run import run as tokenize
from saemill.train.config import TrainConfig
from saemill.train.run import run as train


def test_losses_equal_a_model_patched_by_hand(causal: Pipeline) -> None:
    """Oracle: transformers' own model, the block's output replaced in a hook written here."""
    assessment = run(AssessConfig(run=causal.out, device="cpu", model_tokens=10**6))
    store = ActivationStore(causal.acts)
    model = transformers.AutoModelForCausalLM.from_pretrained(causal.model, dtype=torch.float32)
    name = entry(assessment, 16)["name"]
    sae = Sae.load(causal.out / name)
    mean = store.site(causal.site).statistics.mean_D.float()
    rows = np.flatnonzero(store.tokens.held_out_R)
    ids = torch.from_numpy(np.concatenate([store.tokens.rows(r, r + 1) for r in rows]).astype(np.int64))
    keep = (ids != 0) & (torch.arange(32) >= 1)
    sums: dict[str, float] = {}
    edits = {
        "ce_clean": lambda x: x,
        "ce_spliced": lambda x: sae(x).reconstruction,
        "ce_zero": torch.zeros_like,
        "ce_mean": lambda x: mean.expand_as(x),
    }
    counted = keep[:, :-1]
    log_probs = {}
    for what, edit in edits.items():

        def hook(_m: Any, _i: Any, output: Any, edit: Any = edit) -> Any:
            x = output[0] if isinstance(output, tuple) else output
            changed = torch.where(keep[..., None], edit(x), x)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handle = model.gpt_neox.layers[1].register_forward_hook(hook)
        with torch.no_grad():
            log_probs[what] = model(ids).logits[:, :-1].log_softmax(-1)[counted]
        handle.remove()
        sums[what] = float(-log_probs[what].gather(1, ids[:, 1:][counted][:, None]).mean())
    metrics = entry(assessment, 16)["metrics"]
    for what, value in sums.items():
        assert metrics[what]["value"] == pytest.approx(value, rel=1e-4)
    for name, changed in (("kl", "ce_spliced"), ("kl_zero", "ce_zero")):
        kl = (log_probs["ce_clean"].exp() * (log_probs["ce_clean"] - log_probs[changed])).sum(-1).mean()
        assert metrics[name]["value"] == pytest.approx(float(kl), rel=1e-4, abs=1e-5)
    assert metrics["delta_ce"]["value"] == pytest.approx(sums["ce_spliced"] - sums["ce_clean"], abs=1e-4)
    recovered = (sums["ce_zero"] - sums["ce_spliced"]) / (sums["ce_zero"] - sums["ce_clean"])
    assert metrics["loss_recovered"]["value"] == pytest.approx(recovered, rel=1e-2)
    assert assessment["data"]["n_tokens_with_losses"] == int(counted.sum())
    assert assessment["data"]["identity_splice_nats"] == {causal.site: 0.0}
    with torch.no_grad(), splice(model, None, sae, keep_error=False) as spliced:
        logits = model(ids).logits
    assert torch.equal(spliced.where, keep)  # the SAE tells where its training looked
    torch.testing.assert_close(logits[:, :-1].log_softmax(-1)[counted], log_probs["ce_spliced"])


def test_outputs_are_complete_and_strict_json(causal: Pipeline) -> None:
    """Oracle: a strict parser; every null has a reason; the report fetches nothing."""
    run(AssessConfig(run=causal.out, device="cpu", model_tokens=2000))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in the JSON")

    text = (causal.out / "final_assessment.json").read_text()
    assessment = json.loads(text, parse_constant=refuse)
    for found in assessment["variants"]:
        for figure in found["metrics"].values():
            assert figure["value"] is not None or figure["reason"]
    assert entry(assessment, 16)["metrics"]["fvu"]["value"] < entry(assessment, 2)["metrics"]["fvu"]["value"]
    controls = {control["name"]: control["metrics"]["fvu"]["value"] for control in assessment["controls"]}
    assert list(controls) == ["random-k2-f128", "pca-k2", "random-k16-f128", "pca-k16"]
    assert controls["pca-k16"] < controls["random-k16-f128"] < 1
    assert entry(assessment, 16)["metrics"]["fvu"]["value"] < controls["random-k16-f128"]
    other = assessment["best_on_other_documents"]
    table = pq.read_table(causal.out / "documents_model.parquet").to_pandas()
    table = table[table["text_hash"] % 2 == 0]
    name = assessment["best_variant"]
    expected = (table[f"{name}/ce"] - table["clean"]).sum() / table["n"].sum()
    assert other["metrics"]["delta_ce"]["value"] == pytest.approx(expected)
    assert other["n_documents"] == len(table)
    (versus,) = (e["versus_best"] for e in assessment["variants"] if e["name"] != name)
    worse = (table[f"{entry(assessment, 2)['name']}/ce"] - table[f"{name}/ce"]).sum() / table["n"].sum()
    assert versus["delta_ce"]["value"] == pytest.approx(worse)
    page = (causal.out / "report.html").read_text()
    assert "http:" not in page.replace("http-equiv", "")
    assert "https:" not in page
    assert (causal.out / "documents.parquet").exists()
    assert (causal.out / "latents.parquet").exists()


def test_without_model_losses_are_null_with_the_reason(causal: Pipeline, tmp_path: Path) -> None:
    """Oracle: no sentinel values."""
    assessment = run(AssessConfig(run=causal.out, with_model=False, device="cpu", out=tmp_path))
    figure = entry(assessment, 16)["metrics"]["loss_recovered"]
    assert (figure["value"], figure["reason"]) == (None, "run with --no-model")
    assert entry(assessment, 16)["checks_passed"].endswith("1 unknown")
    costs = [check for check in entry(assessment, 16)["evidence"] if check["metric"] == "delta_ce"]
    assert [(check["passed"], check["reason"]) for check in costs] == [(None, "run with --no-model")] * 2


def test_other_tokens_leave_out_what_training_saw(
    causal: Pipeline, tmp_path: Path, tokenizer_folder: str, corpus: Path
) -> None:
    """Oracle: the same corpus in another packing: only its held-out documents are left."""
    other = tokenize(
        TokenizeConfig(dataset=str(corpus), tokenizer=tokenizer_folder, out=tmp_path / "o", ctx_len=24)
    )
    assessment = run(AssessConfig(run=causal.out, tokens=other.path, device="cpu"))
    store = ActivationStore(causal.acts)
    held = store.tokens.documents["held_out"].to_numpy(zero_copy_only=False)
    hashes = store.tokens.documents["text_hash"].to_numpy()
    documents = other.documents["text_hash"].to_numpy()
    unseen = ~np.isin(documents, hashes[~held])
    kept = 0
    for row in range(other.n_rows):
        ids = other.rows(row, row + 1)[0]
        numbers = other.document_of(row * 24 + np.arange(24))
        kept += sum(unseen[numbers[p]] and ids[p] != 0 for p in range(1, 24))
    assert assessment["data"]["n_tokens"] == kept > 0
    assert assessment["data"]["n_documents_left_out_as_seen"] == int((~unseen).sum())
    assert (causal.out / "on-o" / "final_assessment.json").exists()


def test_computed_and_cached_activations_agree(causal: Pipeline) -> None:
    """Oracle: the cache, against the same rows run through the model again."""
    store = ActivationStore(causal.acts)
    from saemill.common.models.model import LanguageModel

    model = LanguageModel(causal.model, revision=None, dtype=torch.float32, device=torch.device("cpu"))
    chosen = EvalSet(store, None, model, store.mask, [causal.site], 4, ALONE)
    cached = list(chosen.chunks(10**9))
    chosen.cached = False
    computed = list(chosen.chunks(10**9))
    np.testing.assert_array_equal(
        np.concatenate([c.addresses_T for c in cached]), np.concatenate([c.addresses_T for c in computed])
    )
    a, b = (torch.cat([c.x[causal.site].float() for c in part]) for part in (cached, computed))
    torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def test_refusals(causal: Pipeline, tmp_path: Path, tiny_models: dict[str, str]) -> None:
    """Oracle: the messages."""
    with pytest.raises(StoreError, match="no finished run"):
        run(AssessConfig(run=tmp_path))
    with pytest.raises(ConfigError, match="is another model than the one that was cached"):
        run(AssessConfig(run=causal.out, model=tiny_models["gpt2"]))
    with pytest.raises(ConfigError, match="no variant"):
        run(AssessConfig(run=causal.out, variant="x"))
    with pytest.raises(StoreError, match="no longer at"):
        run(AssessConfig(run=causal.out, acts=tmp_path / "gone"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"out must be a folder, but .*/file is a file"):
        run(AssessConfig(run=causal.out, out=tmp_path / "file" / "out"))
    with pytest.raises(ConfigError, match=r"cannot load the model './modle': no such folder"):
        run(AssessConfig(run=causal.out, model="./modle"))
    with pytest.raises(ConfigError, match="n_latents must be 0 or more, got -1"):
        AssessConfig(run=causal.out, n_latents=-1)
    with pytest.raises(ConfigError, match="variant has no effect where no latent is shown"):
        AssessConfig(run=causal.out, n_latents=0, variant="x")


def test_mistakes_are_told_before_the_model_is_loaded(
    causal: Pipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    corpus: Path,
    tokenizer_folder: str,
) -> None:
    """Oracle: no model is ever loaded."""
    monkeypatch.setattr(cached, "LanguageModel", lambda *_, **__: pytest.fail("loaded the model"))
    with pytest.raises(ConfigError, match=r"latents must be in 0\.\.127, got 5000"):
        run(AssessConfig(run=causal.out, latents=(3, 5000)))
    with pytest.raises(StoreError, match="is not a finished token store"):
        run(AssessConfig(run=causal.out, tokens=tmp_path / "nope"))
    foreign = make_tokens(tmp_path / "foreign", 10, 16)
    with pytest.raises(ConfigError, match="was made with the tokenizer"):
        run(AssessConfig(run=causal.out, tokens=foreign.path))
    other = TokenizeConfig(dataset=str(corpus), tokenizer=tokenizer_folder, out=tmp_path / "o", ctx_len=200)
    tokenize(other)
    with pytest.raises(ConfigError, match=r"rows have 200 tokens, but .* takes at most 128"):
        run(AssessConfig(run=causal.out, tokens=other.out))
    with pytest.raises(ConfigError, match="need the model; leave out --no-model"):
        run(AssessConfig(run=causal.out, tokens=other.out, with_model=False))


def test_the_table_tells_what_is_not_in_it(
    causal: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the assessment; 200 tokens are of few documents; the baseline stands beside absorption."""
    config: dict[str, Any] = {"run": causal.out, "device": "cpu", "with_model": False, "n_latents": 0}
    assessment = run(AssessConfig(out=tmp_path, max_tokens=200, **config))
    shown = capsys.readouterr().out
    n_documents = assessment["data"]["n_documents"]
    assert f"no interval for FVU, L0, cosine: only {n_documents} documents; an interval needs 30" in shown
    assert "where as many random directions show more than 0.25, it is judged against (random)" in shown
    line = next(line for line in shown.splitlines() if f" {entry(assessment, 16)['name']} " in line)
    metrics = entry(assessment, 16)["metrics"]
    cells = [f"{metrics[name]['value']:.3f}" for name in ("max_decoder_cosine", "max_decoder_cosine_random")]
    assert [cell.strip() for cell in line.split("│")][8:10] == cells
    page = (tmp_path / "report.html").read_text()
    assert f"only {n_documents} documents; an interval needs 30" in page
    assert page.count("(random)") >= 2
    assert 'id="latents"' not in page
    assert contexts_text(features.load(tmp_path), 4, 4) == ""
    run(AssessConfig(out=tmp_path, **config | {"n_latents": 2}))
    assert "no interval" not in capsys.readouterr().out


def test_an_assessment_on_text_that_was_replaced_is_not_current(
    causal: Pipeline, tmp_path: Path, tokenizer_folder: str
) -> None:
    """Oracle: the same folder, made anew of other text."""
    for seed in (50, 51):
        file = tmp_path / f"{seed}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in random_texts(60, seed)))
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        tokenize(
            TokenizeConfig(dataset=str(file), tokenizer=tokenizer_folder, out=tmp_path / "other", ctx_len=32)
        )
        config = brief(causal, tmp_path / "o", tokens=tmp_path / "other")
        assert not is_done(config)
        fingerprint = TokenStore(tmp_path / "other").fingerprint
        assert run(config)["data"]["tokens_fingerprint"] == fingerprint
        assert is_done(config)
    shutil.rmtree(tmp_path / "other")
    assert not is_done(config)


def test_diverged_variants_are_listed_not_measured(causal: Pipeline, tmp_path: Path) -> None:
    """Oracle: the healthy variant's figures without the diverged one; strict JSON; last place."""
    wild = {"k": 4, "num_latents": 48, "optimizer": "sgd", "lr": 1e30}
    healthy = {"k": 4, "num_latents": 48, "lr": 3e-3}
    common: dict[str, Any] = {"acts": causal.acts, "site": (causal.site,), "batch_size": 256}
    train(TrainConfig(out=tmp_path / "r", variants=(wild, healthy), device="cpu", **common))
    assessment = run(AssessConfig(run=tmp_path / "r", device="cpu", model_tokens=500))
    last = assessment["variants"][-1]
    assert last["diverged_at_step"] is not None
    assert last["metrics"]["fvu"]["value"] is None
    assert "diverged" in last["metrics"]["fvu"]["reason"]
    assert assessment["variants"][0]["metrics"]["fvu"]["value"] < 1
    json.loads((tmp_path / "r" / "final_assessment.json").read_text())


def test_stopped_variants_are_listed_with_when_and_why(causal: Pipeline, tmp_path: Path) -> None:
    """Oracle: the run's own record of what halving stopped; last place, no figures."""
    settings: dict[str, Any] = {"k": (4,), "num_latents": (48,), "lr": (1e-6, 3e-3), "halving": 1}
    common: dict[str, Any] = {"acts": causal.acts, "site": (causal.site,)}
    size = {"batch_size": 64, "max_tokens": 64 * 30}
    train(TrainConfig(out=tmp_path / "r", device="cpu", **settings, **common, **size))
    look = json.loads((tmp_path / "r" / "finished.json").read_text())["stopped"]
    (name,) = look
    assert name.endswith("lr1e-06")
    assessment = run(AssessConfig(run=tmp_path / "r", device="cpu", model_tokens=500))
    last = assessment["variants"][-1]
    assert last["name"] == name
    assert last["not_measured"].startswith(f"stopped by halving at step {look[name]['step']}: fvu ")
    assert last["verdict"] == "stopped by halving at step 15"
    assert last["tokens_trained"] == look[name]["step"] * 64
    assert last["metrics"]["fvu"]["value"] is None
    assert "stopped by halving at step 15" in (tmp_path / "r" / "report.html").read_text()


def test_masked_language_model(tmp_path: Path, tiny_models: dict[str, str], corpus: Path) -> None:
    """Oracle: identity splice changes nothing; about 15% of positions are counted; figures present."""
    tokenizer = bert_tokenizer(tmp_path)
    found = Pipeline(tmp_path, tiny_models["bert"], tokenizer, corpus, "encoder.layer.1")
    assessment = run(AssessConfig(run=found.out, device="cpu"))
    data = assessment["data"]
    assert 0.12 < data["n_tokens_with_losses"] / data["n_tokens"] < 0.18
    assert data["identity_splice_nats"] == {"encoder.layer.1": 0.0}
    assert math.isfinite(entry(assessment, 16)["metrics"]["delta_ce"]["value"])


def test_an_encoder_without_head_has_null_losses(
    tmp_path: Path, tiny_models: dict[str, str], corpus: Path
) -> None:
    """Oracle: a BertModel saved without its head; the reason is given."""
    headless = tmp_path / "headless"
    transformers.AutoModel.from_pretrained(tiny_models["bert"]).save_pretrained(headless)
    found = Pipeline(tmp_path, str(headless), bert_tokenizer(tmp_path), corpus, "encoder.layer.1")
    assessment = run(AssessConfig(run=found.out, device="cpu"))
    figure = entry(assessment, 16)["metrics"]["loss_recovered"]
    assert figure["value"] is None
    assert "no language-model head" in figure["reason"]

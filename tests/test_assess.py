"""Assessment figures against their definitions, mean and identity baselines, and whole-model runs."""

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
from conftest import random_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import Pipeline
from safetensors.torch import load_file, save_file
from stores import make_store, make_tokens

from saemill import splice
from saemill.assess import model as assess_model
from saemill.assess.baselines import fit_baselines
from saemill.assess.evalset import EvalSet
from saemill.assess.features import Reader, check_latents, choose_latents, top_addresses
from saemill.assess.reconstruction import Reconstruction, absorption
from saemill.assess.report import contexts_text
from saemill.assess.run import AssessConfig, run
from saemill.assess.sums import Bootstrap, DocumentSums, Ratio, Split
from saemill.assess.verdict import Thresholds, checks, order, summary
from saemill.cache.run import CacheConfig
from saemill.cache.run import run as cache
from saemill.common import durable, records
from saemill.common.errors import ConfigError, StoreError
from saemill.common.records import Record
from saemill.common.sae.parts import SaeConfig
from saemill.common.sae.sae import Sae
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.site_records import (
    Commit,
    SiteManifest,
    StoreSettings,
    group_of,
    read_site,
    record_path,
)
from saemill.common.stores.tokens import TokenStore
from saemill.common.world import Group
from saemill.tokenize.run import TokenizeConfig
from saemill.tokenize.run import run as tokenize
from saemill.train.config import TrainConfig
from saemill.train.run import run as train

D = 8
ALONE = Group([0], 0)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    values = torch.randn(400 * 16, D, generator=torch.Generator().manual_seed(1)) * 3 + 20
    folder = tmp_path_factory.mktemp("assess")
    return make_store(folder, n_rows=400, ctx_len=16, d=D, shard_tokens=1000, values_TD=values)


def held_out(store: ActivationStore) -> tuple[torch.Tensor, np.ndarray[Any, Any]]:
    """Oracle: held-out unmasked activations and their addresses, by a loop over rows."""
    addresses = []
    for row in np.flatnonzero(store.tokens.held_out_R):
        ids = store.tokens.rows(row, row + 1)[0]
        addresses += [row * 16 + p for p in range(1, 16) if ids[p] != 0]
    return store.read("a", 0, store.n_tokens)[torch.tensor(addresses)], np.array(addresses)


def evalset(store: ActivationStore) -> EvalSet:
    return EvalSet(store, None, None, store.mask, ["a"], 4, ALONE)


def constant_sae(bias: torch.Tensor) -> Sae:
    """x̂ = bias for every x: its only latent never fires."""
    config = SaeConfig(d_in=D, num_latents=1, k=1, provenance={})
    return Sae(config, torch.zeros(1, D), torch.tensor([-1.0]), torch.zeros(1, D), bias)


def signed_identity() -> Sae:
    """x̂ = x: latents ±e_i."""
    rows = torch.cat([torch.eye(D), -torch.eye(D)])
    config = SaeConfig(d_in=D, num_latents=2 * D, k=D, provenance={})
    return Sae(config, rows.clone(), torch.zeros(2 * D), rows.clone(), torch.zeros(D))


def random_sae(seed: int, k: int = 3, f: int = 24) -> Sae:
    generator = torch.Generator().manual_seed(seed)
    w_dec = torch.nn.functional.normalize(torch.randn(f, D, generator=generator), dim=1)
    config = SaeConfig(d_in=D, num_latents=f, k=k, provenance={})
    return Sae(config, w_dec * 0.5, torch.zeros(f), w_dec, torch.full((D,), 20.0))


def reconstruct(store: ActivationStore, saes: dict[str, Sae], max_tokens: int = 10**9) -> Reconstruction:
    chosen = evalset(store)
    return Reconstruction(saes, dict.fromkeys(saes, "a"), chosen).run(chosen.chunks(max_tokens))


def over(found: Reconstruction) -> Bootstrap:
    return Split(found.sums.documents).all


def test_mean_predictor_identity_and_constant_bias(store: ActivationStore) -> None:
    """Oracles: FVU of the mean is 1, of the identity 0, and a bias c adds ‖c‖² / variance."""
    x, _ = held_out(store)
    mean = x.double().mean(0)
    shifted = mean + 2.0
    saes = {
        "mean": constant_sae(mean.float()),
        "id": signed_identity(),
        "bias": constant_sae(shifted.float()),
    }
    found = reconstruct(store, saes)
    bootstrap = over(found)
    fvu = {name: found.metrics(name, bootstrap)["fvu"]["value"] for name in saes}
    variance = float((x.double() - mean).square().sum(1).mean())
    assert fvu["mean"] == pytest.approx(1, abs=1e-6)
    assert fvu["id"] == pytest.approx(0, abs=1e-6)
    assert fvu["bias"] == pytest.approx(1 + 4 * D / variance, rel=1e-6)


def test_figures_equal_their_definitions(store: ActivationStore) -> None:
    """Oracle: float64 formulas over all held-out activations at once."""
    x, _ = held_out(store)
    sae = random_sae(0)
    found = reconstruct(store, {"v": sae})
    metrics = found.metrics("v", over(found))
    with torch.no_grad():
        out = sae(x)
    xd, rd = x.double(), out.reconstruction.double()
    sse = (xd - rd).square().sum()
    assert found.n_tokens == len(x)
    assert metrics["fvu"]["value"] == pytest.approx(float(sse / (xd - xd.mean(0)).square().sum()), rel=1e-6)
    assert metrics["explained_variance"]["value"] == pytest.approx(1 - metrics["fvu"]["value"])
    assert metrics["mse"]["value"] == pytest.approx(float(sse / xd.numel()), rel=1e-6)
    cosine = torch.nn.functional.cosine_similarity(xd, rd).mean()
    assert metrics["cosine"]["value"] == pytest.approx(float(cosine), rel=1e-6)
    assert metrics["l0"]["value"] == pytest.approx(float((out.top_acts > 0).sum(1).double().mean()))
    fired = torch.zeros(len(x), 24).scatter_(1, out.top_indices, (out.top_acts > 0).float())
    np.testing.assert_allclose(found.density("v"), fired.mean(0).numpy(), rtol=1e-6)


def test_controls_are_a_random_dictionary_and_pca(tmp_path: Path) -> None:
    """Oracles: numpy's SVD of the training tokens; the random dictionary's gain, which no other beats."""
    mixing = torch.randn(D, D, generator=torch.Generator().manual_seed(5)) * torch.linspace(3, 0.1, D)
    values = torch.randn(400 * 16, D, generator=torch.Generator().manual_seed(6)) @ mixing.T + 7
    store = make_store(tmp_path, 400, 16, D, 1000, values_TD=values)
    found = fit_baselines(random_sae(0, k=3, f=24), "a", evalset(store))
    assert list(found) == ["random-k3-f24", "pca-k3"]
    addresses = [
        row * 16 + p
        for row in np.flatnonzero(~store.tokens.held_out_R)
        for p in range(1, 16)
        if store.tokens.rows(row, row + 1)[0][p] != 0
    ]
    x = values[torch.tensor(addresses)].double()
    mean = x.mean(0)
    axes = torch.from_numpy(np.linalg.svd((x - mean).numpy(), full_matrices=False)[2][:3])
    expected = mean + (x - mean) @ axes.T @ axes
    with torch.no_grad():
        torch.testing.assert_close(
            found["pca-k3"](x.float()).reconstruction, expected.float(), rtol=1e-3, atol=1e-3
        )
        random = found["random-k3-f24"]
        y = random(x.float()).reconstruction.double() - mean
        errors = [float((x - mean - gain * y).square().sum()) for gain in (0.99, 1, 1.01)]
        assert min(errors) == errors[1] < float((x - mean).square().sum())
    np.testing.assert_allclose(random.W_enc.detach().norm(dim=1), 1, rtol=1e-5)


def test_scale_of_the_activations_changes_nothing(tmp_path: Path) -> None:
    """Oracle: the same data times 64 (exact in binary), SAE scaled along."""
    values = torch.randn(64 * 16, D, generator=torch.Generator().manual_seed(3))
    results = []
    for factor in (1.0, 64.0):
        small = make_store(tmp_path / str(factor), 64, 16, D, 500, values_TD=values * factor)
        sae = random_sae(2)
        sae.b_dec.data.mul_(0)
        found = reconstruct(small, {"v": sae})
        metrics = found.metrics("v", over(found))
        results.append([metrics[name]["value"] for name in ("fvu", "cosine", "l0")])
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_max_tokens_takes_the_first_tokens(store: ActivationStore) -> None:
    """Oracle: the definition over the first 100 held-out tokens."""
    x, _ = held_out(store)
    found = reconstruct(store, {"v": random_sae(0)}, max_tokens=100)
    assert found.n_tokens == 100
    with torch.no_grad():
        sse = (random_sae(0)(x[:100]).reconstruction - x[:100]).square().sum()
    fvu = float(sse / (x[:100] - x[:100].mean(0)).square().sum())
    assert found.metrics("v", over(found))["fvu"]["value"] == pytest.approx(fvu, rel=1e-4)


def test_absorption_is_the_mean_largest_cosine() -> None:
    """Oracle: a loop over pairs; equal rows read 1, orthogonal ones 0, one row is no figure."""
    rows = torch.randn(1500, 6, generator=torch.Generator().manual_seed(0))
    unit = (rows / rows.norm(dim=1, keepdim=True)).double()
    cosine = unit @ unit.T - 2 * torch.eye(1500)
    assert absorption(rows)["value"] == pytest.approx(float(cosine.amax(1).mean()), rel=1e-5)
    assert absorption(torch.ones(3, 6))["value"] == pytest.approx(1)
    assert absorption(torch.eye(6))["value"] == pytest.approx(0)
    assert absorption(rows[:1])["value"] is None


def test_intervals_cover_the_truth() -> None:
    """Oracle: 400 synthetic sets of documents with a known ratio; 95% intervals cover it about as often."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        n = generator.integers(5, 50, 80).astype(float)
        level = generator.gamma(4, 0.25, 80)
        figure = Bootstrap(np.ones(80, bool)).figure(Ratio(level * n, n))
        covered += figure["lo"] <= 1.0 <= figure["hi"]
    assert 0.90 <= covered / 400 <= 0.98


def test_too_few_documents_have_no_interval() -> None:
    """Oracle: null with a reason, the value itself kept."""
    figure = Bootstrap(np.ones(3, bool)).figure(Ratio(np.array([1.0, 2, 3]), np.array([2.0, 2, 2])))
    assert figure["value"] == 1.0
    assert figure["lo"] is None
    assert figure["reason"] == "only 3 documents; an interval needs 30"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.floats(-10, 10)), min_size=1, max_size=40), st.integers(1, 7))
def test_document_sums_do_not_depend_on_chunks(tokens: list[tuple[int, float]], size: int) -> None:
    """Oracle: a dictionary of sums."""
    sums = DocumentSums(["v"])
    for start in range(0, len(tokens), size):
        part = tokens[start : start + size]
        sums.add(np.array([unit for unit, _ in part]), {"v": [value for _, value in part]})
    expected: dict[int, float] = {}
    for unit, value in tokens:
        expected[unit] = expected.get(unit, 0.0) + value
    np.testing.assert_allclose(sums.column("v"), [expected[u] for u in sorted(expected)], atol=1e-9)


def test_copies_of_a_document_count_as_one(store: ActivationStore) -> None:
    """Oracle: the number of distinct text hashes among held-out documents."""
    found = reconstruct(store, {"v": random_sae(0)})
    table = store.tokens.documents
    kept = table["held_out"].to_numpy(zero_copy_only=False)
    assert sorted(found.sums.rows) == sorted(set(table["text_hash"].to_numpy()[kept].tolist()))


def test_top_contexts_are_the_strongest_one_per_document(store: ActivationStore) -> None:
    """Oracle: a full sort of all activations of the latent."""
    sae = random_sae(4)
    latents = [3, 7]
    chosen = evalset(store)
    found = top_addresses(chosen.context_chunks(10**9), "a", sae, latents, store.tokens, 5, ALONE)
    kept = np.concatenate(
        [
            store.keep_addresses(i, store.mask, False) | store.keep_addresses(i, store.mask, True)
            for i in range(store.n_shards)
        ]
    )
    with torch.no_grad():
        acts, indices = sae.encode(store.read("a", 0, store.n_tokens))
    for latent in latents:
        value = torch.where(indices == latent, acts, 0.0).amax(1).numpy() * kept
        best: dict[int, tuple[float, int]] = {}
        for address in np.argsort(-value, kind="stable"):
            document = int(store.tokens.document_of(np.array([address]))[0])
            if value[address] > 0 and document not in best:
                best[document] = (float(value[address]), int(address))
        expected = sorted(best.values(), reverse=True)[:5]
        assert [address for _, address in found[latent]] == [address for _, address in expected]


def test_a_context_is_the_text_around_the_address(store: ActivationStore) -> None:
    """Oracle: the tokenizer's decoding of the row, specials left out, cut at the document's start."""
    reader = Reader(store.tokens)
    tokenizer = transformers.AutoTokenizer.from_pretrained(store.tokens.tokenizer.name)
    row, position = 6, 8
    ids = [int(i) for i in store.tokens.rows(row, row + 1)[0]]
    context = reader.context(1.5, row * 16 + position)
    assert context.token == tokenizer.decode([ids[position]])
    assert context.before == tokenizer.decode([i for i in ids[:position] if i != 0])
    assert context.after == tokenizer.decode([i for i in ids[position + 1 :] if i != 0])


def test_latents_shown_are_asked_or_random_live_ones() -> None:
    """Oracle: the asked first; the rest live and without repeats."""
    density = np.array([0, 0.1, 0.2, 0, 0.3])
    chosen = choose_latents(density > 0, (3,), 10)
    assert chosen[0] == 3
    assert sorted(chosen) == [1, 2, 3, 4]
    check_latents((0, 4), [5, 9])
    with pytest.raises(ConfigError, match=r"latents must be in 0\.\.4, got 5, -1$"):
        check_latents((5, 4, -1), [5])
    with pytest.raises(
        ConfigError, match=r"in 0\.\.4, got 5; name the variant they belong to with --variant"
    ):
        check_latents((5,), [9, 5])


def test_verdict_counts_only_checks_that_ran() -> None:
    """Oracle: counted by hand."""
    figures = {
        "loss_recovered": {"value": None, "reason": "no head"},
        "l0": {"value": 32.0},
        "dead_fraction": {"value": 0.5},
        "absorption": {"value": 0.25},
        "absorption_random": {"value": None, "reason": "1 live latent"},
    }
    found = checks(figures, Thresholds())
    assert [check["passed"] for check in found] == [None, True, False, True]
    assert summary(found) == "passed 2/3, 1 unknown"
    entries = [
        {"name": name, "checks": found, "not_measured": at}
        for name, at in (("a", None), ("b", None), ("c", 7), ("d", None))
    ]
    losses = {"a": 0.3, "b": 0.2, "d": math.nan}
    assert [entry["name"] for entry in order(entries, losses)] == ["b", "a", "d", "c"]


def test_the_best_is_reported_on_documents_it_was_not_chosen_on() -> None:
    """Oracle: 50 variants of one true loss, 200 documents; the choice leaves a bias in its own half only."""
    generator = np.random.default_rng(0)
    split, n = Split(list(range(200))), np.ones(200)
    chosen, reported, same = [], [], []
    for _ in range(100):
        variants = generator.normal(1.0, 1.0, (50, 200))
        best = min(variants, key=lambda sums: split.loss(Ratio(sums, n)))
        chosen.append(split.loss(Ratio(best, n)))
        reported.append(split.reported_on.figure(Ratio(best, n))["value"])
        same.append(split.all.figure(Ratio(min(variants, key=np.mean), n))["value"])
    assert np.mean(chosen) < 0.8
    assert np.mean(same) < 0.87
    assert np.mean(reported) == pytest.approx(1.0, abs=0.04)
    assert not split.overlap
    alone = Split([4, 8])
    assert alone.overlap
    assert alone.chosen_on.all()
    assert alone.reported_on.n_documents == 2


@pytest.mark.parametrize(
    ("value", "random", "passed", "threshold"),
    [(0.28, 0.2, False, 0.25), (0.28, 0.3, True, 0.3), (0.3, 0.3, True, 0.3), (0.31, 0.3, False, 0.3)],
)
def test_absorption_is_judged_against_what_random_directions_show(
    value: float, random: float, passed: bool, threshold: float
) -> None:
    """Oracle: the larger of threshold and baseline, by hand; the reason where it is the baseline."""
    figures = {name: {"value": 0.0} for name in ("loss_recovered", "l0", "dead_fraction")}
    figures |= {"absorption": {"value": value}, "absorption_random": {"value": random}}
    check = checks(figures, Thresholds())[3]
    assert (check["passed"], check["threshold"]) == (passed, f"at most {threshold}")
    assert check.get("reason") == (
        "as many random directions show 0.300, more than the threshold of 0.25" if random > 0.25 else None
    )


def test_a_figure_that_is_not_finite_is_null() -> None:
    """Oracle: null with a reason, never NaN or infinity in the JSON."""
    for bad in (np.inf, np.nan):
        figure = Bootstrap(np.ones(40, bool)).figure(Ratio(np.array([bad] * 40), np.ones(40)))
        assert figure == {"value": None, "reason": "a value of it is not finite"}


@pytest.fixture(scope="module")
def causal(
    tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, str], tokenizer_folder: str, corpus: Path
) -> Pipeline:
    return Pipeline(
        tmp_path_factory.mktemp("causal"), tiny_models["neox"], tokenizer_folder, corpus, "layers.1"
    )


def entry(assessment: dict[str, Any], k: int) -> dict[str, Any]:
    (found,) = [e for e in assessment["variants"] if e["k"] == k]
    return dict(found)


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
    kl = (log_probs["ce_clean"].exp() * (log_probs["ce_clean"] - log_probs["ce_spliced"])).sum(-1).mean()
    assert metrics["kl"]["value"] == pytest.approx(float(kl), rel=1e-3, abs=1e-5)
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
    random, pca = (control["metrics"]["fvu"]["value"] for control in assessment["controls"])
    assert pca < random < 1
    assert entry(assessment, 16)["metrics"]["fvu"]["value"] < random
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
    assert "<script" not in page
    assert (causal.out / "documents.parquet").exists()
    assert (causal.out / "latents.parquet").exists()


def test_without_model_losses_are_null_with_the_reason(causal: Pipeline, tmp_path: Path) -> None:
    """Oracle: no sentinel values."""
    assessment = run(AssessConfig(run=causal.out, with_model=False, device="cpu", out=tmp_path))
    figure = entry(assessment, 16)["metrics"]["loss_recovered"]
    assert (figure["value"], figure["reason"]) == (None, "run with --no-model")
    assert entry(assessment, 16)["verdict"].endswith("1 unknown")


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
    monkeypatch.setattr(assess_model, "LanguageModel", lambda *_, **__: pytest.fail("loaded the model"))
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
    cells = [f"{metrics[name]['value']:.3f}" for name in ("absorption", "absorption_random")]
    assert [cell.strip() for cell in line.split("│")][8:10] == cells
    page = (tmp_path / "report.html").read_text()
    assert f"only {n_documents} documents; an interval needs 30" in page
    assert page.count("(random)") >= 2
    assert "<h2>Where latents" not in page
    assert contexts_text(assessment["features"], 4, 4) == ""
    run(AssessConfig(out=tmp_path, **config | {"n_latents": 2}))
    assert "no interval" not in capsys.readouterr().out


def changed(model: str, folder: Path, name: str) -> str:
    """A copy of a model with one weight's rows in reverse."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights[name] = weights[name].flip(0).contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def tell(acts: Path, **values: Any) -> None:
    """Make a store tell other things of its model; the SAEs trained on it still know it."""
    store = ActivationStore(acts)
    plain = store.settings.model_dump(mode="json") | {"fingerprint": store.fingerprint}
    settings = StoreSettings.made(plain | values)
    durable.write_json(acts / "zarr.json", group_of(settings))
    for site in store.sites:
        of_site = read_site(acts, site).model_copy(update={"settings": settings})
        records.write(record_path(acts, site), of_site)
        kinds: list[tuple[Path, type[Record]]] = [(acts / site / "manifest.json", SiteManifest)]
        kinds += [(file, Commit) for file in (acts / site / "commits").iterdir()]
        for file, kind in kinds:
            found = records.read(file, kind, "")
            records.write(file, found.model_copy(update={"store": settings.identity}))


LAST_LAYER, HEAD = "gpt_neox.layers.2.mlp.dense_4h_to_h.weight", "embed_out.weight"


def small(causal: Pipeline, out: Path, **values: Any) -> AssessConfig:
    return AssessConfig(run=causal.out, out=out, device="cpu", model_tokens=500, n_latents=0, **values)


def test_a_copy_of_the_model_elsewhere_is_accepted(causal: Pipeline, tmp_path: Path) -> None:
    """Oracle: the same weights in several files and another config: the figures of the original."""
    copy = tmp_path / "copy"
    model = transformers.AutoModelForCausalLM.from_pretrained(causal.model)
    model.config.use_cache = not model.config.use_cache
    model.save_pretrained(copy, max_shard_size="300KB")
    assert len(list(copy.glob("*.safetensors"))) > 1
    moved = shutil.copytree(causal.model, tmp_path / "moved")
    found = [run(small(causal, tmp_path / "o", model=str(m))) for m in (causal.model, moved, copy)]
    assert entry(found[0], 16)["metrics"] == entry(found[1], 16)["metrics"] == entry(found[2], 16)["metrics"]
    assert [assessment["data"]["model_check"] for assessment in found] == [
        "the very files that were cached",
        "the very files that were cached",
        "the weights that were cached, in other files",
    ]


@pytest.mark.parametrize("part", [LAST_LAYER, HEAD])
def test_weights_that_no_cached_site_depends_on_are_compared(
    causal: Pipeline, tmp_path: Path, part: str
) -> None:
    """Oracle: one weight after the only cached site, flipped in a copy of the checkpoint."""
    other = changed(causal.model, tmp_path / "other", part)
    with pytest.raises(ConfigError, match="another model than the one that was cached: its weights differ"):
        run(small(causal, tmp_path / "o", model=other))


def test_a_model_that_was_changed_in_its_place_is_refused(
    causal: Pipeline, tmp_path: Path, tokenizer_folder: str, corpus: Path
) -> None:
    """Oracle: the head, flipped after the model was cached; in stores of old, too, that know the files' hash
    alone."""
    model = str(shutil.copytree(causal.model, tmp_path / "model"))
    found = Pipeline(tmp_path, model, tokenizer_folder, corpus, "layers.1")
    shutil.copytree(found.acts, tmp_path / "old")
    tell(tmp_path / "old", weights_fingerprint=None)
    shutil.rmtree(model)
    changed(causal.model, Path(model), HEAD)
    for acts in (found.acts, tmp_path / "old"):
        with pytest.raises(ConfigError, match="its files have changed since; name the right one"):
            run(small(found, tmp_path / "o", acts=acts))
        assert run(small(found, tmp_path / "o", acts=acts, model=causal.model))["data"]["model_check"]


def test_where_only_activations_can_be_compared_all_sites_are_and_it_is_told(
    causal: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: a store as a hub id leaves it, of two sites: a change at the second is found, and one of the
    head, which cannot be, is told of."""
    acts = tmp_path / "acts"
    shutil.copytree(causal.acts, acts)
    cache(CacheConfig(tokens=causal.tokens, model=causal.model, out=acts, sites=("layers.2",), device="cpu"))
    tell(acts, model="someone/model", model_fingerprint="a commit", weights_fingerprint=None)
    last, head = (changed(causal.model, tmp_path / part, part) for part in (LAST_LAYER, HEAD))
    with pytest.raises(ConfigError, match=r"its activations at layers\.2 differ"):
        run(small(causal, tmp_path / "o", acts=acts, model=last))
    told = run(small(causal, tmp_path / "o", acts=acts, model=head))["data"]["model_check"]
    assert "only the activations at layers.1, layers.2 could be compared" in told
    assert f"what {head} computes after them, the head included, could not" in told
    assert told in capsys.readouterr().out
    written = json.loads((tmp_path / "o" / "final_assessment.json").read_text())
    assert written["data"]["model_check"] == told


def test_an_attention_sink_does_not_hide_another_model() -> None:
    """Oracle: by hand; the first token is a thousand times the others, which differ by half."""
    x_TD = torch.randn(32, D, generator=torch.Generator().manual_seed(0))
    x_TD[0] *= 1000
    y_TD = torch.cat([x_TD[:1], x_TD[1:] * 1.5])
    assert float((x_TD - y_TD).norm() / x_TD.norm()) < assess_model.SAME_ACTIVATIONS
    assert not assess_model._agree(y_TD, x_TD)
    assert assess_model._agree(x_TD * 1.01, x_TD)
    assert not assess_model._agree(x_TD[:, :4], x_TD)


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
        config = small(causal, tmp_path / "o", tokens=tmp_path / "other")
        assert not config.is_done()
        fingerprint = TokenStore(tmp_path / "other").fingerprint
        assert run(config)["data"]["tokens_fingerprint"] == fingerprint
        assert config.is_done()
    shutil.rmtree(tmp_path / "other")
    assert not config.is_done()


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


def bert_tokenizer(folder: Path) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces = [*letters, ".", *(f"##{letter}" for letter in letters)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = ["the", "cat", "sat", "on", "mat", "while", "seven", "dogs", "ran", "over", "green", "hills"]
    (folder / "vocab.txt").write_text("\n".join([*special, *pieces, *words]))
    tokenizer = transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    return str(folder)


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

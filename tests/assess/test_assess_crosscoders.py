"""Assessments of crosscoders: each site in its own units, and losses at one site at a time."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from reconstructions import ALONE
from splicing import at, by_hand

from saemill import Sae
from saemill.assess.config import AssessConfig, LatentConfig
from saemill.assess.evalset import EvalSet
from saemill.assess.latent import run as show
from saemill.assess.reader import Pieces
from saemill.assess.run import run
from saemill.cache.config import CacheConfig
from saemill.cache.run import run as cache
from saemill.common.errors import ConfigError, StoreError
from saemill.common.stores.activations import ActivationStore
from saemill.tokenize.config import TokenizeConfig
from saemill.tokenize.run import run as tokenize
from saemill.train.config import TrainConfig
from saemill.train.run import run as train

SITES = ("layers.0", "layers.2")
JOINED = "layers.0+layers.2"


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, str], tokenizer_folder: str, corpus: Path
) -> Path:
    """Two layers of a tiny model in `acts`, in `other` one of another seed's; a crosscoder and an SAE in
    `run`."""
    folder = tmp_path_factory.mktemp("crosscoders")
    tokenize(
        TokenizeConfig(
            dataset=str(corpus), tokenizer=tokenizer_folder, out=folder / "tokens", ctx_len=32,
            held_out_fraction=0.3,
        )
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_models["neox"])
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(0.02 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(0)))
    model.save_pretrained(folder / "tuned")
    transformers.AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder / "tuned")
    for name, path, sites in (
        ("acts", tiny_models["neox"], SITES),
        ("other", str(folder / "tuned"), SITES[1:]),
    ):
        tokens = folder / "tokens"
        cache(CacheConfig(tokens=tokens, model=path, out=folder / name, sites=sites, device="cpu"))
    train(trained(folder, "run", site=(JOINED, "layers.2")))
    return folder


def trained(folder: Path, out: str, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "acts": folder / "acts", "out": folder / out, "k": (8,), "num_latents": (96,), "batch_size": 256,
        "lr": (3e-3,), "epochs": 2, "device": "cpu", "precision": "fp32",
    }  # fmt: skip
    return TrainConfig(**settings | changes)


def by_hooks(
    sae: Sae, store: ActivationStore, models: dict[str, Any], n_rows: int | None = None
) -> dict[str, dict[str, float]]:
    """Losses by site, in the model given for each, on the first held-out rows: untouched, and with the site's
    part of the reconstruction and with zeros in its place; it is made of the untouched activations of all."""
    rows = np.flatnonzero(store.tokens.held_out_R)[:n_rows]
    ids = torch.from_numpy(np.concatenate([store.tokens.rows(r, r + 1) for r in rows]).astype(np.int64))
    where = (ids != 0) & (torch.arange(32) >= 1)
    counted = where[:, :-1]

    def loss(model: Any) -> float:
        log_probs = model(ids).logits[:, :-1].log_softmax(-1)[counted]
        return float(-log_probs.gather(1, ids[:, 1:][counted][:, None]).mean())

    def with_other(site: str, other: torch.Tensor) -> float:
        changed = torch.where(where[..., None], other, own[site])
        model = models[site]
        return float(by_hand(model, site.removeprefix("with."), lambda _: changed, lambda: loss(model)))

    with torch.no_grad():
        own = {
            site: at(model, site.removeprefix("with."), lambda model=model: model(ids))
            for site, model in models.items()
        }
        made = sae(torch.cat(list(own.values()), -1)).reconstruction
        parts = dict(zip(models, torch.split(made, [32, 32], -1), strict=True))
        return {
            "clean": {site: loss(model) for site, model in models.items()},
            "spliced": {site: with_other(site, part) for site, part in parts.items()},
            "zero": {site: with_other(site, torch.zeros_like(x)) for site, x in own.items()},
        }


def entry_of(assessment: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [each for each in assessment["variants"] if each["name"].startswith(f"{name}-")]
    return dict(found)


def test_figures_and_losses_equal_their_definitions(folder: Path, tiny_models: dict[str, str]) -> None:
    """Oracle: float64 formulas over all held-out rows, each site scaled to the variance that the store
    tells; transformers' own model, in which one site at a time is replaced by a hook, and of the whole the
    means of what that costs, and of what zeros cost. The SAE beside it has the figures that it has in a run
    of its own."""
    assessment = run(AssessConfig(run=folder / "run", device="cpu", model_tokens=10**6, n_latents=1))
    found = entry_of(assessment, JOINED)
    sae = Sae.load(folder / "run" / found["name"])
    store = ActivationStore(folder / "acts")
    keep = np.concatenate([store.keep_addresses(i, store.mask, held_out=True) for i in range(store.n_shards)])
    x = {s: store.read(s, 0, store.n_tokens)[torch.from_numpy(keep)].float() for s in SITES}
    error = (sae(torch.cat(list(x.values()), 1)).reconstruction - torch.cat(list(x.values()), 1)).double()
    errors = dict(zip(SITES, torch.split(error, [32, 32], 1), strict=True))
    above = below = 0.0
    cuts = {cut["name"]: cut["metrics"] for cut in found["cuts"]}
    for site in SITES:
        sse = float(errors[site].square().sum())
        squares = float((x[site].double() - x[site].double().mean(0)).square().sum())
        assert cuts[f"at {site}"]["fvu"]["value"] == pytest.approx(sse / squares, rel=1e-5)
        scale = 32 / store.site(site).statistics.total_variance
        above, below = above + scale * sse, below + scale * squares
    assert found["metrics"]["fvu"]["value"] == pytest.approx(above / below, rel=1e-5)
    assert found["metrics"]["mse"]["value"] is None
    assert "units of their own" in found["metrics"]["mse"]["reason"]

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_models["neox"], dtype=torch.float32)
    hand = by_hooks(sae, store, dict.fromkeys(SITES, model))
    for site in SITES:
        assert cuts[f"at {site}"]["delta_ce"]["value"] == pytest.approx(
            hand["spliced"][site] - hand["clean"][site], rel=1e-3, abs=1e-5
        )
    clean, spliced, zero = (np.mean(list(losses.values())) for losses in hand.values())
    whole, cost = found["metrics"], spliced - clean
    assert whole["delta_ce"]["value"] == pytest.approx(cost, rel=1e-3, abs=1e-5)
    assert whole["ce_clean"]["value"] == pytest.approx(clean, rel=1e-5)
    assert whole["ce_zero"]["value"] == pytest.approx(zero, rel=1e-5)
    assert whole["ce_spliced"]["value"] == pytest.approx(spliced, rel=1e-5)
    train(trained(folder, "alone", site=("layers.2",)))
    alone = run(AssessConfig(run=folder / "alone", device="cpu", model_tokens=10**6, n_latents=0))
    assert entry_of(alone, "layers.2")["metrics"] == entry_of(assessment, "layers.2")["metrics"]
    page = (folder / "run" / "report.html").read_text()
    assert "at layers.0" in page
    parts = zip(torch.split(sae.W_dec.detach().double(), [32, 32], 1), SITES, strict=True)
    norms = [rows.norm(dim=1) * (32 / store.site(s).statistics.total_variance) ** 0.5 for rows, s in parts]
    shares = (norms[0] / (norms[0] + norms[1])).numpy()
    table = pq.read_table(folder / "run" / "latents.parquet").to_pandas()
    live = table[table["variant"] == found["name"]]["density"].to_numpy() >= 0.0005
    assert found["norm_shares"][SITES[0]] == np.histogram(shares[live], 20, (0, 1))[0].tolist()
    assert found["norm_shares"][SITES[0]] == found["norm_shares"][SITES[1]][::-1]
    assert "live latents by the share of layers.0 in their decoder row" in page


def test_tokens_are_promoted_at_each_site_by_its_models_unembedding(folder: Path, tmp_path: Path) -> None:
    """Oracle: the logits of transformers' own final norm and head, of each decoder row against the row 0, in
    the model of its site; the terminal and the page say which site."""
    joined = "layers.2+with.layers.2"
    train(trained(folder, "both", site=(joined,), with_acts=folder / "other", epochs=1))
    for run_name, site in (("run", JOINED), ("both", joined)):
        (path,) = (each for each in (folder / run_name).iterdir() if each.name.startswith(site))
        found = show(LatentConfig(run=path, latents=("0-4",), out=tmp_path / "page.html", device="cpu"))
        sae, page = Sae.load(path), (tmp_path / "page.html").read_text()
        assert [place.at for place in found.vocabularies] == site.split("+")
        for number, rows_FD in enumerate(torch.split(sae.decoder_rows, 32, 1)):
            at = site.split("+")[number]
            store = ActivationStore(folder / ("other" if at.startswith("with.") else "acts"))
            logits_FV = direct_logits(str(store.settings.model), rows_FD)[
                :, : store.tokens.tokenizer.vocab_size
            ]
            pieces = Pieces(store.tokens)
            assert f"At {at} it</h4>" in page
            for latent in found.latents:
                up = latent.effects[number].promoted
                expected = logits_FV[latent.latent].topk(10)
                assert [token.text for token in up] == [pieces.text(i) for i in expected.indices.tolist()]


def direct_logits(model: str, rows_FD: torch.Tensor) -> torch.Tensor:
    """What a norm by hand and transformers' own weights make of rows, their mean over tokens left in."""
    of = transformers.AutoModelForCausalLM.from_pretrained(model)
    norm_D = of.base_model.final_layer_norm.weight.detach()
    rows_FD = rows_FD - rows_FD.mean(1, keepdim=True)
    return (rows_FD * norm_D) @ of.get_output_embeddings().weight.detach().T


def test_crosscoders_alone_have_controls_in_their_units(folder: Path) -> None:
    """Oracle: PCA explains more than random directions, and the crosscoder beats these; FVU chooses it."""
    train(trained(folder, "pair", site=(JOINED,), k=(4, 8)))
    assessment = run(AssessConfig(run=folder / "pair", device="cpu", with_model=False, n_latents=0))
    assert assessment["best_on_other_documents"]["chosen_by"] == "fvu"
    best = entry_of(assessment, f"{JOINED}-k8")
    controls = {control["name"]: control["metrics"]["fvu"]["value"] for control in assessment["controls"]}
    random, pca = (
        next(controls[n] for n in controls if n.startswith(kind)) for kind in ("random-k8", "pca-k8")
    )
    assert best["metrics"]["fvu"]["value"] < random < 1
    assert pca < random


def test_two_models(folder: Path, tmp_path: Path, tiny_models: dict[str, str]) -> None:
    """Oracle: both of transformers' own models, each with its part of the reconstruction in the place of its
    layer by a hook; a store and a model that moved give the figures that they gave before."""
    site = "layers.2+with.layers.2"
    train(trained(folder, "two", site=(site,), with_acts=folder / "other"))
    config = AssessConfig(run=folder / "two", device="cpu", model_tokens=12 * 32, n_latents=0)
    assessment = run(config)
    found = entry_of(assessment, site)
    store = ActivationStore(folder / "acts")
    models = {
        part: transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for part, path in zip(site.split("+"), (tiny_models["neox"], folder / "tuned"), strict=True)
    }
    hand = by_hooks(Sae.load(folder / "two" / found["name"]), store, models, n_rows=12)
    assert hand["clean"]["layers.2"] != pytest.approx(hand["clean"]["with.layers.2"], rel=1e-3)
    for cut, part in zip(found["cuts"], models, strict=True):
        assert cut["name"] == f"at {part}"
        assert 0 < cut["metrics"]["fvu"]["value"] < 1
        cost = hand["spliced"][part] - hand["clean"][part]
        assert cut["metrics"]["delta_ce"]["value"] == pytest.approx(cost, rel=1e-3, abs=1e-5)
    clean, spliced, zero = (np.mean(list(losses.values())) for losses in hand.values())
    assert found["metrics"]["delta_ce"]["value"] == pytest.approx(spliced - clean, rel=1e-3, abs=1e-5)
    assert found["metrics"]["ce_zero"]["value"] == pytest.approx(zero, rel=1e-5)
    assert set(assessment["data"]["identity_splice_nats"]) == set(models)
    assert "of the second model the very files that were cached" in assessment["data"]["model_check"]
    (folder / "other").rename(tmp_path / "moved")
    (folder / "tuned").rename(tmp_path / "tuned")
    with pytest.raises(StoreError, match=r"second activations are no longer at .*; say where"):
        run(config)
    moved = replace(config, with_acts=tmp_path / "moved", out=tmp_path / "again")
    with pytest.raises(ConfigError, match="no longer there; say where with --with-acts-model"):
        run(moved)
    with pytest.raises(ConfigError, match=r"another model than .* the right one with --with-acts-model"):
        run(replace(moved, with_acts_model=tiny_models["neox"]))
    moved = replace(moved, with_acts_model=str(tmp_path / "tuned"))
    assert entry_of(run(moved), site)["metrics"] == found["metrics"]
    (tmp_path / "moved").rename(folder / "other")
    (tmp_path / "tuned").rename(folder / "tuned")
    with pytest.raises(ConfigError, match="with_acts has no effect on a run on one model"):
        run(AssessConfig(run=folder / "run", with_acts=folder / "other"))
    with pytest.raises(ConfigError, match="with_acts_model has no effect on a run on one model"):
        run(AssessConfig(run=folder / "run", with_acts_model="tuned"))


def test_other_text_is_computed_for_all_sites(folder: Path, corpus: Path) -> None:
    """Oracle: the FVU of the whole is a mean of those at its sites; cached rows are those of the sites, side
    by side."""
    store = ActivationStore(folder / "acts")
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()[:40]]
    (folder / "more.jsonl").write_text("".join(json.dumps({"text": f"More {t}"}) + "\n" for t in texts))
    tokenize(
        TokenizeConfig(
            dataset=str(folder / "more.jsonl"), tokenizer=store.tokens.tokenizer.name, out=folder / "more",
            ctx_len=32, held_out_fraction=0.3,
        )
    )  # fmt: skip
    assessment = run(AssessConfig(run=folder / "run", tokens=folder / "more", device="cpu", n_latents=0))
    fvu = entry_of(assessment, JOINED)["metrics"]["fvu"]["value"]
    assert 0 < fvu < 1
    parts = [cut["metrics"]["fvu"]["value"] for cut in entry_of(assessment, JOINED)["cuts"]]
    assert min(parts) < fvu < max(parts)
    evalset = EvalSet(store, None, None, store.mask, [JOINED, *SITES], 4, ALONE)
    chunk = next(iter(evalset.chunks(50)))
    assert torch.equal(chunk.x[JOINED], torch.cat([chunk.x[site] for site in SITES], 1))

"""The model's losses while SAEs train: what transformers computes with each of them in a hook."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from assessments import brief, entry
from pipeline import Pipeline
from safetensors.torch import load_file, save_file
from splicing import at, by_hand
from torch import Tensor
from watching import dense_codes, held_out, lines

from saemill.assess.run import run as assess
from saemill.assess.sums import number
from saemill.assess.table import table
from saemill.cache.config import CacheConfig
from saemill.cache.run import run as cache
from saemill.common.errors import ConfigError
from saemill.common.sae.sae import Sae
from saemill.common.stores.activations import ActivationStore
from saemill.train.config import TrainConfig
from saemill.train.run import run

N_ROWS = 5


@pytest.fixture(scope="module")
def causal(
    tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, str], tokenizer_folder: str, corpus: Path
) -> Pipeline:
    """A run by a tiny model, whose store is trained on."""
    folder = tmp_path_factory.mktemp("causal")
    return Pipeline(folder, tiny_models["neox"], tokenizer_folder, corpus, "layers.1")


def config(causal: Pipeline, out: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "acts": causal.acts, "out": out, "k": (4,), "num_latents": (96,), "lr": (3e-3,), "batch_size": 256,
        "max_tokens": 256 * 30, "log_every": 5, "eval_every": 5, "eval_losses_every": 10, "device": "cpu",
        "eval_losses_tokens": N_ROWS * 32, "precision": "fp32",
    }  # fmt: skip
    return TrainConfig(**settings | changes)


def by_transformers(
    causal: Pipeline, sae: Sae, transcoded: tuple[str, str] | None = None
) -> tuple[float, float]:
    """Oracle: ΔCE and loss recovered by a hook of torch, the SAE dense, on the first held-out rows; of a
    transcoder in the place of the second of its sites, from what the first has."""
    store = ActivationStore(causal.acts)
    rows = np.flatnonzero(store.text.held_out_R)[:N_ROWS]
    ids = torch.from_numpy(np.concatenate([store.tokens.rows(r, r + 1) for r in rows]).astype(np.int64))
    keep = torch.from_numpy(store.mask.keep(ids.numpy(), store.tokens.tokenizer.special_ids))
    model = transformers.AutoModelForCausalLM.from_pretrained(causal.model).eval()
    site = transcoded[1] if transcoded else causal.site
    with torch.no_grad():
        read = at(model, transcoded[0] if transcoded else site, lambda: model(ids))

    def nats(change: Any) -> Tensor:
        with torch.no_grad():
            logits = by_hand(model, site, change, lambda: model(ids).logits)
        every = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
        )
        return every[keep[:, :-1]].double().mean()

    def predicted(y: Tensor) -> Tensor:
        codes, x = dense_codes(sae, read.flatten(0, 1), centred=False), read.double()
        decoded = (codes @ sae.W_dec.double() + sae.b_dec.double()).view(y.shape) + x @ sae.W_skip.double().T
        return torch.where(keep[..., None], decoded.to(y.dtype), y)

    def spliced(x: Tensor) -> Tensor:
        codes = dense_codes(sae, x.flatten(0, 1))
        decoded = (codes @ sae.W_dec.double() + sae.b_dec.double()).view(x.shape).to(x.dtype)
        return torch.where(keep[..., None], decoded, x)

    clean, zero, with_sae = (
        nats(change)
        for change in (
            lambda x: x,
            lambda x: torch.where(keep[..., None], 0.0, x),
            predicted if transcoded else spliced,
        )
    )
    return float(with_sae - clean), float((zero - with_sae) / (zero - clean))


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_losses_are_those_of_transformers(causal: Pipeline, tmp_path: Path, architecture: str) -> None:
    """Oracle: transformers with a hook, for the SAE kept at step 20 and the last one; the last is what
    `saemill assess` finds too. Where the model is not run there are no losses."""
    changes: dict[str, Any] = {"architecture": (architecture,), "n_checkpoints": 2}
    (folder,) = run(config(causal, tmp_path / "r", **changes))
    found = lines(tmp_path / "r")
    for step, place in ((20, tmp_path / "r/steps/20" / folder.name), (30, folder)):
        figures = found[step][folder.name]
        expected = by_transformers(causal, Sae.load(place))
        assert (figures["eval_delta_ce"], figures["eval_loss_recovered"]) == pytest.approx(
            expected, rel=1e-3, abs=1e-6
        )
    assert {step for step, variants in found.items() if "eval_delta_ce" in variants[folder.name]} == {
        10, 20, 30,
    }  # fmt: skip
    if architecture == "topk":
        settings = replace(brief(causal, tmp_path / "o"), run=tmp_path / "r", model_tokens=N_ROWS * 32)
        metrics = entry(assess(settings), 4)["metrics"]
        assert metrics["delta_ce"]["value"] == pytest.approx(figures["eval_delta_ce"], rel=1e-4)
        assert metrics["loss_recovered"]["value"] == pytest.approx(figures["eval_loss_recovered"], rel=1e-4)


def test_a_transcoder_takes_the_place_of_an_mlp(causal: Pipeline, tmp_path: Path) -> None:
    """Oracle: transformers with a hook that puts the dense prediction in the place of the MLP's output; the
    store's activations for the FVU, and for that of W_skip alone. `saemill assess` finds the same, and its
    tables tell it with both sites, however long a name is."""
    sites = ("layers.1.post_attention_layernorm", "layers.1.mlp")
    acts = tmp_path / "acts"
    cache(CacheConfig(tokens=causal.tokens, model=causal.model, out=acts, sites=sites, device="cpu"))
    changes: dict[str, Any] = {"acts": acts, "site": sites[:1], "target_site": sites[1:]}
    (folder,) = run(config(causal, tmp_path / "r", skip_connection=True, **changes))
    figures, sae = lines(tmp_path / "r")[30][folder.name], Sae.load(folder)
    expected = by_transformers(causal, sae, sites)
    assert (figures["eval_delta_ce"], figures["eval_loss_recovered"]) == pytest.approx(expected, rel=1e-3)
    settings = replace(brief(causal, tmp_path / "o"), run=tmp_path / "r", model_tokens=N_ROWS * 32)
    assessment = assess(settings)
    metrics = entry(assessment, 4)["metrics"]
    assert metrics["delta_ce"]["value"] == pytest.approx(figures["eval_delta_ce"], rel=1e-4)
    store = ActivationStore(acts)
    x, y = (held_out(store, site, 10**6).double() for site in sites)
    x_mean, y_mean = (store.site(site).statistics.mean_D for site in sites)
    squares, wide = (y - y.mean(0)).square().sum(), sae.double()
    skip = (y - y_mean - (x - x_mean) @ wide.W_skip.T).square().sum() / squares
    whole = (y - wide(x).reconstruction).square().sum() / squares
    assert metrics["fvu_skip"]["value"] == pytest.approx(float(skip), rel=1e-4)
    assert metrics["fvu"]["value"] == pytest.approx(float(whole), rel=1e-4)
    assessment["variants"][0]["name"] += 100 * "x"  # which takes lines, not the figures' room
    printed, page = table(assessment), (tmp_path / "o" / "report.html").read_text()
    assert f"│ {number(metrics['fvu'])} │ " in printed
    assert f" {number(metrics['fvu_skip'])} │ " in printed
    assert "layers.1.post_attention_layernorm → layers.1.mlp · " in page
    assert f">{number(metrics['fvu_skip'])}<" in page


def test_an_sae_kept_on_the_way_is_assessed_as_a_run(causal: Pipeline, tmp_path: Path) -> None:
    """Oracle: the figures that training logged at that step, on the same tokens."""
    run(config(causal, tmp_path / "r", n_checkpoints=2, eval_tokens=400))
    point = tmp_path / "r" / "steps" / "10"
    found = lines(tmp_path / "r")[10]
    settings = replace(brief(causal, tmp_path / "o"), run=point, max_tokens=400)
    metrics = entry(assess(settings), 4)["metrics"]
    (figures,) = found.values()
    for name in ("fvu", "l0"):
        assert metrics[name]["value"] == pytest.approx(figures[f"eval_{name}"], rel=1e-4)


def test_training_does_not_notice_the_model(causal: Pipeline, tmp_path: Path) -> None:
    """Oracle: the same run without it, every byte of the SAE; from a copy of the model in another place."""
    copy = shutil.copytree(causal.model, tmp_path / "copy")
    (with_model,) = run(config(causal, tmp_path / "r", model=str(copy)))
    (without,) = run(
        config(causal, tmp_path / "s", eval_every=0, eval_losses_every=None, eval_losses_tokens=None)
    )
    names = ("sae.safetensors", "cfg.json")
    assert [(with_model / n).read_bytes() for n in names] == [(without / n).read_bytes() for n in names]


def test_another_model_is_refused_before_the_first_step(causal: Pipeline, tmp_path: Path) -> None:
    """Oracle: the message, where one weight differs, and where there is no model. Nothing is trained, and the
    same folder takes the run without losses."""
    other = Path(shutil.copytree(causal.model, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["embed_out.weight"] = weights["embed_out.weight"].flip(0).contiguous()
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    for model, message in (
        (other, "is another model than the one that was cached"),
        (tmp_path / "nowhere", "nowhere"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(config(causal, tmp_path / "r", model=str(model)))
        assert not (tmp_path / "r" / "metrics.jsonl").exists()
    assert run(config(causal, tmp_path / "r", eval_losses_every=None, eval_losses_tokens=None))


def test_a_model_without_losses_is_refused(causal: Pipeline, tmp_path: Path) -> None:
    """Oracle: the message, for a store of a checkpoint that has no head."""
    bare = tmp_path / "bare"
    transformers.AutoModel.from_pretrained(causal.model).save_pretrained(bare)
    store = cache(
        CacheConfig(
            tokens=causal.tokens, model=str(bare), out=tmp_path / "acts", sites=("layers.1",), device="cpu"
        )
    )
    with pytest.raises(
        ConfigError, match=r"eval_losses_every: .*bare has no language-model head; leave it out"
    ):
        run(config(causal, tmp_path / "r", acts=store.path))
    assert not (tmp_path / "r" / "metrics.jsonl").exists()

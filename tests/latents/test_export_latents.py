"""Exported latents: what other tools read of them is what the SAEs do on the cached tokens."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peers import require_peers, run_in_peers
from pipeline import Pipeline
from safetensors.numpy import load_file
from torch import Tensor
from training import config, structured_store

from saemill import convert
from saemill.common.models.unembedding import NoUnembeddingError
from saemill.common.sae.sae import Sae
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.mask import MaskConfig
from saemill.latents import saedashboard
from saemill.latents.config import ExportLatentsConfig
from saemill.latents.run import run
from saemill.train.run import run as train

pytestmark = pytest.mark.usefixtures("one_thread")
SAE = "layers.1-k16-f128-s0-lr0.003"


def export(trained: Pipeline, format: Any, out: Path, name: str = SAE, **settings: Any) -> None:
    run(ExportLatentsConfig(run=trained.out / name, format=format, out=out, device="cpu", **settings))


def dense(trained: Pipeline, name: str = SAE) -> tuple[Tensor, Tensor]:
    """Oracle: codes [R, S, F] by the SAE's formula on all tokens of the store, 0 where they are masked; and
    which are not, bool [R, S]."""
    store, sae = ActivationStore(trained.acts), Sae.load(trained.out / name)
    x_TD = store.read(trained.site, 0, store.n_tokens).float()
    pre_TF = (x_TD - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    values, indices = pre_TF.topk(sae.config.k or 0, 1)
    codes_TF = torch.zeros_like(pre_TF).scatter(1, indices, values.relu())
    ids_RS = store.tokens.rows(0, store.text.n_rows)
    keep_RS = torch.from_numpy(ids_RS != 0)
    keep_RS[:, 0] = False
    codes_RSF = codes_TF.view(*keep_RS.shape, -1) * keep_RS[..., None]
    return codes_RSF, keep_RS


def test_delphi_reads_the_codes(trained: Pipeline, tmp_path: Path) -> None:
    """Oracle: delphi's own LatentDataset, beside the dense codes; its tokens beside the store's."""
    require_peers()
    codes_RSF, _ = dense(trained)
    export(trained, "delphi", tmp_path / "cache", n_splits=3)
    run_in_peers(
        tmp_path, {"do": "read_delphi", "folder": tmp_path / "cache", "width": 128, "out": tmp_path / "r.npz"}
    )
    read = np.load(tmp_path / "r.npz")
    assert np.array_equal(read["codes"] > 0, codes_RSF.numpy() > 1e-5)
    np.testing.assert_allclose(read["codes"], codes_RSF.numpy(), rtol=2e-3, atol=1e-4)
    store = ActivationStore(trained.acts)
    assert np.array_equal(read["tokens"], store.tokens.rows(0, store.text.n_rows))


def test_delphi_files_of_chosen_latents_and_short_rows(trained: Pipeline, tmp_path: Path) -> None:
    """Oracle: the dense codes of held-out rows, each cut in two; delphi's fields by hand."""
    codes_RSF, _ = dense(trained)
    store = ActivationStore(trained.acts)
    held_out = codes_RSF[store.text.held_out_R][:4].reshape(8, 16, 128)
    chosen = [*range(10), 127]
    export(
        trained, "delphi", tmp_path / "c", latents=("0-9", "127"), ctx=16, held_out=True, max_tokens=4 * 32
    )
    found = torch.zeros(8, 16, 128)
    files = sorted(
        (tmp_path / "c" / "layers.1").glob("*.safetensors"), key=lambda f: int(f.stem.split("_")[0])
    )
    assert [file.stem for file in files] == ["0_24", "25_50", "51_75", "76_101", "102_127"]
    for file in files:
        content = load_file(file)
        assert {name: str(v.dtype) for name, v in content.items()} == {
            "locations": "uint16", "activations": "float16", "tokens": "int64"
        }  # fmt: skip
        row, pos, latent = content["locations"].astype(np.int64).T
        found[row, pos, latent + int(file.stem.split("_")[0])] = torch.from_numpy(
            content["activations"]
        ).float()
    wanted = torch.zeros_like(held_out)
    wanted[..., chosen] = held_out[..., chosen]
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1e-4)
    config = json.loads((tmp_path / "c" / "layers.1" / "config.json").read_text())
    assert (config["cache_ctx_len"], config["n_tokens"], config["model_name"]) == (16, 128, trained.model)


def test_what_float16_cannot_hold_is_its_largest_number(
    trained: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: numpy's float16, and the number of such activations in the sentence."""
    monkeypatch.setattr("saemill.latents.delphi.LARGEST", 1.0)
    codes_RSF, _ = dense(trained)
    export(trained, "delphi", tmp_path / "c", n_splits=1)
    acts = load_file(tmp_path / "c" / "layers.1" / "0_127.safetensors")["activations"]
    assert acts.max() == 1.0
    n = int((codes_RSF > 1).sum())
    assert f"{n:,} activations beyond float16" in capsys.readouterr().out


def batches(folder: Path) -> dict[int, dict[str, Any]]:
    """Features of all batches, by latent."""
    content = [json.loads(file.read_text()) for file in folder.glob("batch-*.json")]
    return {feature["feature_index"]: feature for batch in content for feature in batch["features"]}


def test_saedashboard_shows_what_latents_do(
    trained: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: SAEDashboard's own classes take the file whole; figures from the dense codes, by numpy."""
    require_peers()
    monkeypatch.setattr(saedashboard, "BATCH", 50)
    export(trained, "saedashboard", tmp_path / "b", release="set")
    files = [tmp_path / "b" / f"batch-{i}.json" for i in range(3)]
    run_in_peers(tmp_path, {"do": "read_dashboards", "files": files})
    batch = json.loads(files[1].read_text())
    assert (batch["model_id"], batch["layer"], batch["sae_set"]) == (Path(trained.model).name, 1, "set")
    assert batch["sae_id_suffix"] == SAE
    features = batches(tmp_path / "b")
    assert sorted(features) == list(range(128))
    codes_RSF, keep_RS = dense(trained)
    codes_TF, tokens = codes_RSF[keep_RS].double().numpy(), ActivationStore(trained.acts)
    x_TD = tokens.read(trained.site, 0, tokens.n_tokens).view(*keep_RS.shape, -1)[keep_RS].double().numpy()
    alive = [latent for latent in range(128) if (codes_TF[:, latent] > 0).sum() >= 10]
    for latent in alive[::7]:
        check_feature(features[latent], latent, codes_RSF.numpy(), codes_TF, x_TD, alive)
    dead = [features[latent] for latent in range(128) if not codes_TF[:, latent].any()]
    assert all(feature["activations"] == [] and feature["frac_nonzero"] == 0 for feature in dead)


def check_feature(
    feature: dict[str, Any],
    latent: int,
    codes_RSF: np.ndarray[Any, Any],
    codes_TF: np.ndarray[Any, Any],
    x_TD: np.ndarray[Any, Any],
    alive: list[int],
) -> None:
    acts_T = codes_TF[:, latent]
    assert feature["frac_nonzero"] == pytest.approx((acts_T > 0).mean())
    assert sum(feature["freq_hist_data_bar_heights"]) == (acts_T > 0).sum()
    per_row = np.sort(codes_RSF[..., latent].max(1))[::-1]
    shown = feature["activations"]
    top = [a for a in shown if a["bin_min"] == -1]
    n_top = min(20, int((per_row > 0).sum()))
    values = [a["values"][a["qualifying_token_index"]] for a in top]
    np.testing.assert_allclose(values, per_row[:n_top], atol=2e-3)
    samples = [a for a in shown if a["bin_min"] != -1]
    edges = np.linspace(0, acts_T.max(), 6)
    for low, high in pairwise(edges):
        share = ((acts_T > low) & (acts_T <= high)).mean()
        told = {a["bin_contains"] for a in samples if abs(a["bin_max"] - high) < 1e-3 * edges[-1]}
        assert sorted(told) == pytest.approx([share] if share else [])
    for a in samples:
        value = a["values"][a["qualifying_token_index"]]
        assert a["bin_min"] - 2e-3 <= value <= a["bin_max"] + 2e-3
        assert value > 0
        assert len(a["tokens"]) == len(a["values"]) == 32
        assert np.abs(codes_RSF[..., latent] - a["values"]).max(1).min() < 1e-3 * max(1, edges[-1])
    with np.errstate(invalid="ignore", divide="ignore"):
        to_latents = np.corrcoef(codes_TF, rowvar=False)[latent]
        to_inputs = [np.corrcoef(acts_T, column)[0, 1] for column in x_TD.T]
    others = [i for i in alive if i != latent]
    best = sorted(others, key=lambda i: -to_latents[i])[:3]
    np.testing.assert_allclose(feature["correlated_features_pearson"], to_latents[best], atol=2e-3)
    np.testing.assert_allclose(feature["correlated_neurons_pearson"], np.sort(to_inputs)[:-4:-1], atol=2e-3)
    at = feature["correlated_neurons_indices"][0]
    cosine = acts_T @ x_TD[:, at] / np.linalg.norm(acts_T) / np.linalg.norm(x_TD[:, at])
    assert feature["correlated_neurons_l1"][0] == pytest.approx(cosine, abs=2e-3)


def test_saedashboard_names_the_tokens_that_latents_write(trained: Pipeline, tmp_path: Path) -> None:
    """Oracle: transformers' own norm and head on a decoder row and its opposite; the tokenizer's decoding."""
    export(trained, "saedashboard", tmp_path / "b", latents=("7",), max_tokens=320)
    feature = batches(tmp_path / "b")[7]
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(trained.model)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
        ActivationStore(trained.acts).tokens.path / "tokenizer"
    )
    row_D = Sae.load(trained.out / SAE).W_dec[7]
    with torch.no_grad():
        plus, minus = model.lm_head(model.gpt_neox.final_layer_norm(torch.stack([row_D, -row_D])))
    top = (plus - minus).topk(10).indices.tolist()
    bottom = (minus - plus).topk(10).indices.tolist()
    for sign, ids in (("pos", top), ("neg", bottom)):
        texts = [tokenizer.decode([i]) for i in ids]
        pieces = tokenizer.convert_ids_to_tokens(ids)
        wanted = [piece if "\ufffd" in text else text for text, piece in zip(texts, pieces, strict=True)]
        assert feature[f"{sign}_str"] == wanted
    tokens = feature["activations"][0]["tokens"]
    rows = ActivationStore(trained.acts).tokens.rows(0, 10)
    assert "".join(tokens) in [tokenizer.decode(row.tolist()) for row in rows]


def test_without_an_unembedding_no_tokens_are_named(
    trained: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: empty fields, all else as it was, and a sentence with the reason."""

    def none(*_: Any) -> None:
        raise NoUnembeddingError("it has none")

    export(trained, "saedashboard", tmp_path / "with", latents=("7",), max_tokens=320)
    monkeypatch.setattr("saemill.latents.run.load_unembedding", none)
    export(trained, "saedashboard", tmp_path / "without", latents=("7",), max_tokens=320)
    assert "without the tokens that latents make more probable: it has none" in capsys.readouterr().out
    whole, bare = (batches(tmp_path / name)[7] for name in ("with", "without"))
    empty = {name: value for name, value in bare.items() if value != whole[name]}
    assert set(empty) == {name for name in whole if name.startswith(("pos_", "neg_", "logits_"))}
    assert set(map(str, empty.values())) == {"[]"}


def test_saebench_loads_the_results(trained: Pipeline, tmp_path: Path) -> None:
    """Oracle: SAEBench's own classes; figures from dense codes and reconstructions of the held-out tokens."""
    require_peers()
    run(
        ExportLatentsConfig(
            run=trained.out, format="saebench", out=tmp_path / "e", release="set", device="cpu"
        )
    )
    files = sorted((tmp_path / "e" / "core").glob("*.json"))
    assert [file.name for file in files] == [
        f"set_layers.1-k{k}-f128-s0-lr0.003_eval_results.json" for k in (16, 2)
    ]
    run_in_peers(tmp_path, {"do": "read_core", "files": files})
    found = json.loads(files[0].read_text())
    metrics = found["eval_result_metrics"]
    assessed = json.loads((trained.out / "final_assessment.json").read_text())
    (entry,) = (each for each in assessed["variants"] if each["name"] == SAE)
    losses = metrics["model_performance_preservation"]
    assert losses["ce_loss_with_sae"] == entry["metrics"]["ce_spliced"]["value"]
    store, sae = ActivationStore(trained.acts), Sae.load(trained.out / SAE)
    codes_RSF, keep_RS = dense(trained)
    held_R = torch.from_numpy(store.text.held_out_R)
    keep_RS &= held_R[:, None]
    x_TD = store.read(trained.site, 0, store.n_tokens).double().view(*keep_RS.shape, -1)[keep_RS]
    codes_TF = codes_RSF[keep_RS].double()
    out_TD = codes_TF @ sae.W_dec.double() + sae.b_dec.double()
    spread_T, error_T = (x_TD - x_TD.mean(0)).square().sum(1), (x_TD - out_TD).square().sum(1)
    assert metrics["reconstruction_quality"] == pytest.approx(
        {
            "explained_variance": float(1 - error_T.sum() / spread_T.sum()),
            "explained_variance_legacy": float((1 - error_T / spread_T).mean()),
            "mse": float(error_T.mean()),
            "cossim": float(torch.cosine_similarity(x_TD, out_TD).mean()),
        },
        rel=1e-4,
    )
    assert metrics["shrinkage"] == pytest.approx(
        {
            "l2_norm_in": float(x_TD.norm(dim=1).mean()),
            "l2_norm_out": float(out_TD.norm(dim=1).mean()),
            "l2_ratio": float((out_TD.norm(dim=1) / x_TD.norm(dim=1)).mean()),
            "relative_reconstruction_bias": metrics["shrinkage"]["relative_reconstruction_bias"],
        },
        rel=1e-4,
    )
    bias = metrics["shrinkage"]["relative_reconstruction_bias"]  # which is near 1
    assert bias - 1 == pytest.approx(
        float((out_TD - x_TD).mul(out_TD).sum() / (x_TD * out_TD).sum()), rel=1e-3
    )
    assert metrics["sparsity"]["l1"] == pytest.approx(float(codes_TF.sum(1).mean()), rel=1e-4)
    check_latents(found, codes_RSF * keep_RS[..., None], int(keep_RS.sum()), sae)


def check_latents(found: dict[str, Any], codes_RSF: Tensor, n_tokens: int, sae: Sae) -> None:
    fired_RF = (codes_RSF > 0).sum(1)
    density_F, rows_F = fired_RF.sum(0) / n_tokens, (fired_RF > 0).sum(0)
    misc = found["eval_result_metrics"]["misc_metrics"]
    assert misc["frac_alive"] == pytest.approx(float((density_F > 0).double().mean()))
    assert misc["freq_over_10_percent"] == pytest.approx(float((density_F > 0.1).double().mean()))
    share = density_F[density_F > 0.1].sum() / density_F.sum()
    assert misc["normalized_freq_over_10_percent"] == pytest.approx(float(share), rel=1e-5)
    cosine_FF = torch.cosine_similarity(sae.W_enc[:, None], sae.W_enc[None], dim=-1).fill_diagonal_(-1)
    assert misc["average_max_encoder_cosine_sim"] == pytest.approx(float(cosine_FF.amax(1).mean()), rel=1e-5)
    details = {latent["index"]: latent for latent in found["eval_result_details"]}
    assert sorted(details) == density_F.nonzero()[:, 0].tolist()
    for latent, detail in details.items():
        assert detail["feature_density"] == pytest.approx(float(density_F[latent]))
        heuristic = fired_RF[:, latent].sum() / rows_F[latent]
        assert detail["consistent_activation_heuristic"] == pytest.approx(float(heuristic))
        assert detail["encoder_norm"] == pytest.approx(float(sae.W_enc[latent].norm()), rel=1e-5)
    never = found["eval_result_unstructured"]["saemill"]["never_fired"]
    assert sorted([*never, *details]) == list(range(len(density_F)))


def test_saelens_has_the_same_figures(trained: Pipeline, tmp_path: Path) -> None:
    """Oracle: SAEBench's file, whose groups are SAELens'; latents by number, null without an average."""
    export(trained, "saebench", tmp_path / "e")
    (entry,) = json.loads((tmp_path / "e" / "saelens" / "all_eval_results.json").read_text())
    core = json.loads(next((tmp_path / "e" / "core").glob("*.json")).read_text())
    assert entry["metrics"] == {k: v for k, v in core["eval_result_metrics"].items() if k != "misc_metrics"}
    heuristic = entry["feature_metrics"]["consistent_activation_heuristic"]
    never = core["eval_result_unstructured"]["saemill"]["never_fired"]
    assert [latent for latent, value in enumerate(heuristic) if value is None] == never


def test_saelens_itself_measures_the_same(trained: Pipeline, tmp_path: Path) -> None:
    """Oracle: SAELens' own evals of the SAE as it was exported for it, on the cached activations of the same
    held-out tokens in one batch."""
    require_peers()
    export(trained, "saebench", tmp_path / "e")
    (ours,) = json.loads((tmp_path / "e" / "saelens" / "all_eval_results.json").read_text())
    convert.export(str(trained.out / SAE), "saelens", tmp_path / "sae", trained.model)
    store, (_, keep_RS) = ActivationStore(trained.acts), dense(trained)
    held_R = store.text.held_out_R
    ids_RS = store.tokens.rows(0, store.text.n_rows).astype(np.int64) * keep_RS.numpy()
    np.save(tmp_path / "ids.npy", ids_RS[held_R])
    x_RSD = store.read(trained.site, 0, store.n_tokens).float().view(*keep_RS.shape, -1).numpy()
    np.save(tmp_path / "x.npy", x_RSD[held_R])
    places = {
        name: tmp_path / file for name, file in (("ids", "ids.npy"), ("x", "x.npy"), ("out", "out.json"))
    }
    run_in_peers(tmp_path, {"do": "saelens_evals", "sae": tmp_path / "sae", "ignored": 0, **places})
    theirs = json.loads((tmp_path / "out.json").read_text())
    flat = {name: value for group in ours["metrics"].values() for name, value in group.items()}
    assert len(theirs["metrics"]) == 10
    assert {name: flat[name] for name in theirs["metrics"]} == pytest.approx(theirs["metrics"], rel=1e-4)
    for name, values in theirs["feature_metrics"].items():
        known = [math.nan if value is None else value for value in ours["feature_metrics"][name]]
        np.testing.assert_allclose(known, values, rtol=1e-4, atol=1e-6, err_msg=name)


def test_masks_are_the_runs(trained: Pipeline) -> None:
    """Oracle: the mask that the oracles above assume."""
    assert ActivationStore(trained.acts).mask == MaskConfig()


def test_every_rule_of_latents(tmp_path: Path) -> None:
    """Oracle: the rules by hand, on dense pre-activations: above a threshold, the largest of each group; of a
    transcoder those of the site that it reads."""
    store = structured_store(tmp_path)
    small: dict[str, Any] = {"k": (4,), "num_latents": (48,), "max_tokens": 1024}
    kinds: tuple[Any, ...] = ("batchtopk", "groupmax")
    train(config(store, tmp_path / "run", architecture=kinds, target_site=("b",), **small))
    run(
        ExportLatentsConfig(
            run=tmp_path / "run", format="delphi", out=tmp_path / "d", device="cpu", n_splits=1
        )
    )
    x_TD, ids_RS = store.read("a", 0, store.n_tokens), store.tokens.rows(0, 256)
    keep_T = torch.from_numpy((ids_RS != 0) & (np.arange(32) > 0)).flatten()
    for folder in (tmp_path / "d").iterdir():
        sae = Sae.load(tmp_path / "run" / folder.name)
        pre_TF = x_TD @ sae.W_enc.T + sae.b_enc
        if sae.threshold is not None:
            wanted = pre_TF * (pre_TF > sae.threshold)
        else:
            groups = pre_TF.view(-1, 4, 12)
            wanted = (groups * (groups == groups.amax(2, keepdim=True))).relu().flatten(1)
        content = load_file(folder / "a" / "0_47.safetensors")
        row, pos, latent = content["locations"].astype(np.int64).T
        found = torch.zeros_like(wanted)
        found[row * 32 + pos, latent] = torch.from_numpy(content["activations"]).float()
        torch.testing.assert_close(found, wanted * keep_T[:, None], rtol=2e-3, atol=1e-3)

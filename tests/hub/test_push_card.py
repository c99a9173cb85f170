"""The card of what is pushed: its figures and metadata."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from command_line import call
from hub import Hub
from pipeline import Pipeline
from pushed import VARIANTS, metadata
from replaced import run_of_other_saes

from saemill import Sae
from saemill.assess.config import AssessConfig
from saemill.assess.run import run as assess
from saemill.common import durable, records
from saemill.common.sae.formats import seal
from saemill.common.stores import runs
from saemill.hub import kinds


def test_the_card_tells_every_variant_with_its_figures(made: Pipeline, hub: Hub) -> None:
    """Oracle: final_assessment.json and the settings of the run; the address in the example loads."""
    call("push", made.out, "user/saes")
    card = hub.files("user/saes")["README.md"]
    told = metadata(card)
    assert told["library_name"] == "saemill"
    assert "sparse-autoencoder" in told["tags"]
    assert {"base_model", "datasets", "license"}.isdisjoint(told)  # a local model, a local file, none given
    assessment = durable.read_json(made.out / "final_assessment.json")
    lines = {
        line.split("`")[1]: line for line in card.decode().splitlines() if line.startswith("| `layers.1-")
    }
    for entry in assessment["variants"]:
        line = lines.pop(entry["name"])
        for name in ("fvu", "l0", "delta_ce", "loss_recovered", "dead_fraction"):
            value = entry["metrics"][name]["value"]
            assert (f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}") in line
        assert line.endswith(f"| {entry['verdict']} |")
    assert lines == {}
    untrained = {
        line.split("`")[1]: line
        for line in card.decode().splitlines()
        if re.match(r"\| `(random|pca)-", line)
    }
    assert sorted(untrained) == sorted(entry["name"] for entry in assessment["controls"])
    for entry in assessment["controls"]:
        assert f"| {entry['metrics']['fvu']['value']:.3f}" in untrained[entry["name"]]
    assert "](pareto.svg)" in card.decode()
    recipe = yaml.safe_load(card.decode().split("```yaml\n")[1].split("```")[0])["train"]
    assert recipe["k"] == [2, 16]
    assert recipe["epochs"] == 3
    address = card.decode().split('Sae.load("')[1].split('"')[0]
    assert address == f"hf://user/saes/{assessment['best_variant']}"
    Sae.load(address)


def test_the_picture_shows_what_is_pushed(made: Pipeline, hub: Hub) -> None:
    """Oracle: the names of the SAEs that are pushed, in the picture; the record of the repository answers for
    the picture as it is there."""
    call("push", made.out, "user/one", "--variant", VARIANTS[1])
    files = hub.files("user/one")
    picture = files["pareto.svg"].decode()
    assert VARIANTS[1] in picture
    assert VARIANTS[0] not in picture
    listed = {file["path"]: file for file in json.loads(files["final_assessment.json"])["files"]}
    assert listed["pareto.svg"]["xxh3"] == durable.hash_bytes(files["pareto.svg"])
    assert VARIANTS[0] in (made.out / "pareto.svg").read_text()


def test_hub_ids_become_metadata_of_the_card(made: Pipeline, hub: Hub, tmp_path: Path) -> None:
    """Oracle: the ids, as the hub's metadata names them."""
    run = shutil.copytree(made.out, tmp_path / "run")
    cfgs = {}
    for name in VARIANTS:
        cfg = durable.read_json(run / name / "cfg.json")
        cfg["saemill"] |= {
            "model": "EleutherAI/pythia-160m",
            "dataset": "monology/pile",
            "revision": "step3000",
        }
        durable.write_json(run / name / "cfg.json", seal.sealed_again(cfg))
        cfgs[name] = seal.checksum(run / name)
    records.write(run / "finished.json", runs.finished(run).model_copy(update={"cfgs": cfgs}))
    (run / "final_assessment.json").unlink()  # which is of the SAEs as they were
    call("push", run, "user/saes")
    card = hub.files("user/saes")["README.md"]
    assert metadata(card)["base_model"] == "EleutherAI/pythia-160m"
    assert metadata(card)["datasets"] == ["monology/pile"]
    assert b"`EleutherAI/pythia-160m` at revision `step3000`" in card


def test_metadata_added_on_the_hub_outlives_a_push(made: Pipeline, hub: Hub) -> None:
    """Oracle: the fields, one of the hub's page, one of the card's own; the text is written anew."""
    call("push", made.out, "user/saes")
    pushed = hub.files("user/saes")["README.md"]
    edited = pushed.decode().replace("tags:", "license: mit\ntags:").replace("# Sparse", "# My sparse")
    hub.files("user/saes")["README.md"] = edited.encode()
    call("push", made.out, "user/saes")
    again = hub.files("user/saes")["README.md"]
    assert metadata(again) == metadata(pushed) | {"license": "mit"}
    assert again.decode().split("---\n", 2)[2] == pushed.decode().split("---\n", 2)[2]


def test_a_run_that_was_not_assessed_says_so(made: Pipeline, tmp_path: Path) -> None:
    """Oracle: the card of a dry run, which lists no assessment."""
    run = shutil.copytree(made.out, tmp_path / "run")
    for file in ("final_assessment.json", "report.html"):
        (run / file).unlink()
    told = call("push", run, "user/saes", "--dry-run")
    assert "**Not assessed.**" in told
    assert "report.html" not in told
    assert [line for line in told.splitlines() if line.endswith("| trained to the end |")]
    diverged = runs.finished(run).model_copy(update={"diverged": {VARIANTS[0]: 7}})
    records.write(run / "finished.json", diverged)
    told = call("push", run, "user/saes", "--dry-run")
    assert [line for line in told.splitlines() if line.endswith("| diverged at step 7 |")]
    assert f'Sae.load("hf://user/saes/{VARIANTS[1]}")' in told


def test_saes_of_several_architectures_go_there_and_back(made: Pipeline, hub: Hub, tmp_path: Path) -> None:
    """Oracle: the run's own SAEs, loaded from the hub; `final_assessment.json`; and the words of the card
    that do not fit them all, which are left out of it."""
    matryoshka = {"threshold": 0.8, "architecture": "matryoshka", "prefixes": (32, 128)}
    run = tmp_path / "run"
    saes = run_of_other_saes(made.out, run, {VARIANTS[0]: matryoshka, VARIANTS[1]: {"ks": (4, 16)}})
    assess(AssessConfig(run=run, device="cpu", max_tokens=4096, model_tokens=2048, n_latents=0))
    call("push", run, "user/saes")
    for name, wanted in saes.items():
        found = Sae.load(f"hf://user/saes/{name}")
        assert (found.config.architecture, found.config.prefixes) == (
            wanted.config.architecture,
            wanted.config.prefixes,
        )
        assert all(torch.equal(found.get_parameter(n), w) for n, w in wanted.named_parameters())
    raw = hub.files("user/saes")["README.md"]
    card = raw.decode()
    assert {"topk", "matryoshka"} <= set(metadata(raw)["tags"])
    assert "\n2 sparse autoencoders of " in card
    assert "f = ReLU(TopK(W_enc (x − b_dec) + b_enc)) where there is a k, else f = z · 1[z > θ]" in card
    assert f"| `{VARIANTS[0]}` | `layers.1` | matryoshka | – | 128 |" in card
    assessment = durable.read_json(run / "final_assessment.json")
    entries = {entry["name"]: entry for entry in assessment["variants"]}
    for name, cut in ((VARIANTS[0], "first 32"), (VARIANTS[1], "k 4")):
        (told,) = entries[name]["cuts"]
        for place, figures in ((cut, told["metrics"]), ("whole", entries[name]["metrics"])):
            assert f"| `{name}` | {place} | {figures['fvu']['value']:.3f}" in card
    assert ("SparseCoder" in card) == (assessment["best_variant"] == VARIANTS[1])


def test_the_card_of_saes_with_thresholds_does_not_send_to_sparsify(made: Pipeline, tmp_path: Path) -> None:
    """Oracle: what sparsify loads: no SAE without a k."""
    run_of_other_saes(made.out, tmp_path / "run", {name: {"threshold": 0.8} for name in VARIANTS})
    card = call("push", tmp_path / "run", "user/saes", "--dry-run")
    assert "\n2 JumpReLU sparse autoencoders of " in card
    assert "x̂ = W_decᵀ f + b_dec" in card
    assert "TopK" not in card
    assert "SparseCoder" not in card
    assert "--format saelens" in card


def test_the_card_of_transcoders_tells_both_sites(made: Pipeline, tmp_path: Path) -> None:
    """Oracle: what each tool has (docs/formats.md): no transcoder with k in SAELens, none in
    dictionary_learning; and the formulas, of transcoders alone and beside an SAE."""
    origins = {name: Sae.load(made.out / name).config.provenance for name in VARIANTS}
    transcoders: dict[str, dict[str, Any]] = {
        name: {"d_out": 32, "provenance": origin | {"target_site": "layers.1.mlp"}}
        for name, origin in origins.items()
    }
    run_of_other_saes(made.out, tmp_path / "both", transcoders)
    card = call("push", tmp_path / "both", "user/saes", "--dry-run")
    assert "\n2 TopK transcoders of " in card
    assert "at `layers.1` → `layers.1.mlp`, trained by" in card
    assert f"| `{VARIANTS[0]}` | `layers.1` → `layers.1.mlp` | 2 | 128 |" in card
    assert "predicts the second: f = ReLU(TopK(W_enc x + b_enc)), ŷ = W_decᵀ f + b_dec.\n" in card
    assert "sae.decode(top_acts, top_indices, x)  # [T, E]" in card
    assert "SparseCoder" in card
    assert "saemill export" not in card
    assert "transcoder" in metadata(card.partition("\n\n")[2].encode())["tags"]
    run_of_other_saes(
        made.out, tmp_path / "one", {VARIANTS[0]: transcoders[VARIANTS[0]] | {"threshold": 0.8}}
    )
    card = call("push", tmp_path / "one", "user/saes", "--variant", VARIANTS[0], "--dry-run")
    assert "--format saelens" in card
    assert "SparseCoder" not in card
    assert "dictionary_learning" not in card
    card = call("push", tmp_path / "one", "user/saes", "--dry-run")
    assert "# Sparse autoencoders and transcoders of " in card
    assert "\n1 sparse autoencoder and 1 transcoder of " in card
    assert "x̂ = W_decᵀ f + b_dec; a transcoder f = z · 1[z > θ] with z = W_enc x + b_enc" in card


def test_formulas_of_skip_connections() -> None:
    """Oracle: the definition, ŷ = W_decᵀ f + b_dec + W_skip x."""
    cfg = {"transcode": True, "activation": "topk", "k": 4, "d_in": 8, "d_out": 5, "skip_connection": True}
    assert kinds.formula({"a": cfg}).endswith("ŷ = W_decᵀ f + b_dec + W_skip x")
    mixed = kinds.formula({"a": cfg, "b": cfg | {"skip_connection": False}})
    assert mixed.endswith("ŷ = W_decᵀ f + b_dec + W_skip x where there is a W_skip")
    assert kinds.tools(cfg) == []

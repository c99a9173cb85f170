"""`saemill push` and `saemill pull`, against a hub on this machine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from command_line import call
from hub import READER, WRITER, Hub
from peers import require_peers, run_in_peers
from pipeline import Pipeline
from saes import check_same
from stores import make_store

from saemill import ActivationStore, Sae, TokenStore
from saemill.assess.run import AssessConfig
from saemill.assess.run import run as assess
from saemill.common import durable, records
from saemill.common.errors import ConfigError, StoreError
from saemill.common.sae.formats import seal
from saemill.common.stores import runs
from saemill.hub.names import Names
from saemill.show import problems

VARIANTS = ["layers.1-k2-f128-s0-lr0.003", "layers.1-k16-f128-s0-lr0.003"]
SAE_FILES = [f"{name}/{file}" for name in VARIANTS for file in ("cfg.json", "sae.safetensors")]
OF_A_RUN = [
    "README.md",
    "config.yaml",
    "final_assessment.json",
    "finished.json",
    "identity.json",
    "report.html",
]


@pytest.fixture(scope="module")
def made(
    tiny_models: dict[str, str], tokenizer_folder: str, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Pipeline:
    """A run with its assessment, its activations in several shards and its tokens."""
    folder = tmp_path_factory.mktemp("push")
    made = Pipeline(folder, tiny_models["neox"], tokenizer_folder, corpus, "layers.1", shard_tokens=1024)
    assess(AssessConfig(run=made.out, device="cpu", max_tokens=4096, model_tokens=2048, n_latents=2))
    (made.out / "checkpoint").mkdir()
    (made.out / "checkpoint" / "weights.pt").write_bytes(bytes(50_000))
    (made.out / "wandb").mkdir()
    (made.out / "wandb" / "debug.log").write_text("a log")
    return made


def metadata(card: bytes) -> dict[str, Any]:
    """The YAML before a card."""
    head = card.decode().split("---\n")[1]
    read: dict[str, Any] = yaml.safe_load(head)
    return read


def test_a_pushed_run_is_pulled_as_it_was(made: Pipeline, hub: Hub, tmp_path: Path) -> None:
    """Oracle: the run's own SAEs, bit by bit; the list of what belongs to a run, without its checkpoint."""
    told = call("push", made.out, "user/saes")
    assert ": 10 files, " in told
    assert told.endswith("hf://user/saes is there\n")
    assert sorted(hub.files("user/saes")) == sorted([".gitattributes", *OF_A_RUN, *SAE_FILES])
    assert hub.messages == ["Upload run with saemill: files", "Upload run with saemill"]
    call("pull", "user/saes", "-o", tmp_path / "run")
    for name in VARIANTS:
        weights = f"{name}/sae.safetensors"
        assert (tmp_path / "run" / weights).read_bytes() == (made.out / weights).read_bytes()
        found, wanted = Sae.load(f"hf://user/saes/{name}"), Sae.load(made.out / name)
        assert all(torch.equal(found.get_parameter(n), w) for n, w in wanted.named_parameters())
    assert not (tmp_path / "run" / ".cache").exists()
    shown = [call("show", path).splitlines()[1:] for path in (made.out, tmp_path / "run")]
    assert shown[0] == shown[1]
    assert "passed" in shown[0][0]
    assert problems(tmp_path / "run") == []


def test_a_damaged_report_is_not_pushed(made: Pipeline, hub: Hub, tmp_path: Path) -> None:
    """Oracle: the hash that the assessment has of it; the hub gets nothing."""
    run = Path(shutil.copytree(made.out, tmp_path / "run"))
    report = run / "report.html"
    report.write_bytes(report.read_bytes()[:-9])
    with pytest.raises(StoreError, match=r"(?s)report\.html: file has .*Run `saemill assess` again"):
        call("push", run, "user/saes")
    assert hub.asked == []


def test_a_pulled_run_is_assessed_on_its_pulled_activations(made: Pipeline, hub: Hub, tmp_path: Path) -> None:
    """Oracle: the run's own assessment, where it was made: the fingerprints outlive the paths."""
    call("push", made.out, "user/saes")
    call("push", made.acts, "user/acts")
    call("pull", "user/saes", "-o", tmp_path / "run")
    call("pull", "datasets/user/acts", "-o", tmp_path / "acts")
    again = assess(
        AssessConfig(
            run=tmp_path / "run", acts=tmp_path / "acts", model=made.model, device="cpu", max_tokens=4096,
            model_tokens=2048, n_latents=0,
        )
    )  # fmt: skip
    wanted = durable.read_json(made.out / "final_assessment.json")
    assert [e["metrics"] for e in again["variants"]] == [e["metrics"] for e in wanted["variants"]]


@pytest.mark.parametrize("kind", ["acts", "tokens"])
def test_a_pushed_store_is_pulled_byte_for_byte(kind: str, made: Pipeline, hub: Hub, tmp_path: Path) -> None:
    """Oracle: the store's own files; those that named a path of this machine differ in that alone."""
    path = {"acts": made.acts, "tokens": made.tokens}[kind]
    assert call("push", path, f"user/{kind}").endswith(f"hf://datasets/user/{kind} is there\n")
    told = call("pull", f"user/{kind}", "-o", tmp_path / kind)
    files = {str(f.relative_to(path)) for f in path.rglob("*") if f.is_file()}
    found = {str(f.relative_to(tmp_path / kind)) for f in (tmp_path / kind).rglob("*") if f.is_file()}
    assert found == files | {"README.md"}
    differ = {name for name in files if (path / name).read_bytes() != (tmp_path / kind / name).read_bytes()}
    of_sites = {name for name in files if name.startswith("sites/")}
    of_acts = {"zarr.json", "tokens/manifest.json", *of_sites}
    assert differ == (of_acts if kind == "acts" else {"manifest.json"})
    store: Any = ActivationStore if kind == "acts" else TokenStore
    assert store(tmp_path / kind).fingerprint == store(path).fingerprint
    assert f"fingerprint {store(path).fingerprint}" in told
    assert "every file has its size and hash" in call("verify", tmp_path / kind)
    assert metadata(hub.files(f"user/{kind}", kind="datasets")["README.md"])["viewer"] is False


def test_embeddings_and_their_saes_go_there_and_back(hub: Hub, tmp_path: Path) -> None:
    """Oracle: the store's own vectors and texts, and the assessment of the run where it was made."""
    x_TD = np.random.default_rng(0).standard_normal((600, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x_TD)
    texts = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(600))
    (tmp_path / "texts.jsonl").write_text(texts)
    acts, run = tmp_path / "acts", tmp_path / "run"
    call("import-activations", tmp_path / "x.npy", "--texts", tmp_path / "texts.jsonl", "-o", acts)
    call("train", acts, "--site", "embedding", "--k", 2, "--num-latents", 16, "--batch-size", 64, "-o", run,
         "--device", "cpu")  # fmt: skip
    wanted = assess(AssessConfig(run=run, device="cpu", n_latents=1))
    call("push", acts, "user/acts")
    call("push", run, "user/saes")
    call("pull", "user/acts", "-o", tmp_path / "there")
    call("pull", "user/saes", "-o", tmp_path / "saes")
    store = ActivationStore(tmp_path / "there")
    np.testing.assert_array_equal(store.read("embedding", 0, 600).numpy(), x_TD)
    assert store.text.texts(0, 2) == ["text 0", "text 1"]  # type: ignore[union-attr]
    again = assess(AssessConfig(run=tmp_path / "saes", acts=tmp_path / "there", device="cpu", n_latents=1))
    assert [e["metrics"] for e in again["variants"]] == [e["metrics"] for e in wanted["variants"]]
    card = hub.files("user/saes")["README.md"].decode()
    assert "base_model" not in metadata(card.encode())
    assert "of `x.npy`. The SAEs take vectors as they were stored" in card
    assert "ΔCE, nats" not in card
    files = hub.files("user/acts", kind="datasets")
    assert "600, of `x.npy`" in files["README.md"].decode()
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]


def test_no_path_of_this_machine_is_uploaded(made: Pipeline, hub: Hub) -> None:
    """Oracle: the folders that the run, its stores, its model and its text lie in, searched in every file."""
    for path, repo in ((made.out, "user/saes"), (made.acts, "user/acts"), (made.tokens, "user/tokens")):
        call("push", path, repo)
    folders = {str(made.out.parent), str(Path(made.model).parent), str(Path.home()), str(Path.cwd())}
    for held in hub.repos.values():
        for files in held.commits.values():
            for name, content in files.items():
                assert not [folder for folder in folders if folder.encode() in content], name
    config = yaml.safe_load(hub.files("user/saes")["config.yaml"])["train"]
    assert (config["acts"], config["out"]) == ("acts", "run")
    cfg = json.loads(hub.files("user/saes")[SAE_FILES[0]])["saemill"]
    assert (cfg["model"], cfg["dataset"]) == (Path(made.model).name, "corpus.jsonl")


def test_paths_become_names_and_nothing_else_changes() -> None:
    """Oracle: texts written by hand."""
    names = Names({"acts": "/data", "model": ["/home/é & co/model", "owner/data", "~/x"], "n": 3})
    assert names.of({"acts": "/data", "n": [1, None], "id": "owner/data"}) == {
        "acts": "data", "n": [1, None], "id": "owner/data",
    }  # fmt: skip
    assert names.in_text("in /data/a, /data, /data-2 and b/data") == "in data/a, data, /data-2 and b/data"
    assert names.in_text("<p>/home/é &amp; co/model</p> ~/x") == "<p>model</p> x"
    assert Names({}).in_text("/data") == "/data"


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
    recipe = yaml.safe_load(card.decode().split("```yaml\n")[1].split("```")[0])["train"]
    assert recipe["k"] == [2, 16]
    assert recipe["epochs"] == 3
    address = card.decode().split('Sae.load("')[1].split('"')[0]
    assert address == f"hf://user/saes/{assessment['best_variant']}"
    Sae.load(address)


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


def test_stores_are_not_read_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    """Oracle: the message, which names the command that fetches them; the requests, none."""
    for arguments in (["show"], ["verify"], ["train", "--site", "a", "-o", "x"], ["cache", "--model", "m",
                      "--layers", "0", "-o", "x"]):  # fmt: skip
        with pytest.raises(ConfigError, match="`saemill pull datasets/user/acts -o FOLDER`"):
            call(arguments[0], "hf://datasets/user/acts", *arguments[1:])
    for store in (ActivationStore, TokenStore):
        with pytest.raises(ConfigError, match="`saemill pull user/acts -o FOLDER`"):
            store("hf://user/acts")
    assert hub.asked == []


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


def test_a_dry_run_asks_nothing_and_lists_what_is_uploaded(made: Pipeline, hub: Hub) -> None:
    """Oracle: the requests, none; the files of the push that follows, with their sizes."""
    for path, repo, kind in ((made.out, "user/saes", "models"), (made.acts, "user/acts", "datasets")):
        hub.asked.clear()
        told = call("push", path, repo, "--dry-run")
        assert hub.asked == []
        call("push", path, repo)
        pushed = hub.files(repo, kind=kind)
        listed = dict(line.split()[::-1] for line in told.split("\n\n")[0].splitlines()[1:])
        wanted = {n: f"{len(content):,}" for n, content in pushed.items() if n != ".gitattributes"}
        assert listed == wanted
        assert told.endswith(pushed["README.md"].decode() + "\n")


def test_chosen_variants_alone_are_a_run(made: Pipeline, hub: Hub, tmp_path: Path) -> None:
    """Oracle: the pulled run, which `show` and `Sae.load` take; then both variants over the one."""
    call("push", made.out, "user/saes", "--variant", VARIANTS[1])
    assert not [name for name in hub.files("user/saes") if name.startswith(VARIANTS[0])]
    assert VARIANTS[0] not in hub.files("user/saes")["README.md"].decode()
    assert VARIANTS[0] not in call("pull", "user/saes", "-o", tmp_path / "run")
    assert Sae.from_pretrained("user/saes").config.k == 16
    call("push", made.out, "user/saes")
    assert set(SAE_FILES) <= set(hub.files("user/saes"))
    with pytest.raises(ConfigError, match=f"user/saes holds more than is pushed now.*{VARIANTS[0]}"):
        call("push", made.out, "user/saes", "--variant", VARIANTS[1])
    call("push", made.out, "user/saes", "--variant", VARIANTS[1], "--revision", "one")
    assert Sae.from_pretrained("user/saes", revision="one").config.k == 16
    assert len(Sae.load(f"hf://user/saes/{VARIANTS[0]}").b_enc) == 128
    with pytest.raises(ConfigError, match=r"no variant 'layers.1-k3'; known: layers"):
        call("push", made.out, "user/saes", "--variant", "layers.1-k3")


def test_a_branch_a_message_and_a_private_repository(made: Pipeline, hub: Hub, tmp_path: Path) -> None:
    """Oracle: what the hub then holds, and where."""
    call("push", made.out, "user/saes", "--private", "--revision", "wide/2", "--message", "Two of them")
    assert hub.repos["models", "user/saes"].private
    assert list(hub.files("user/saes")) == [".gitattributes"]
    assert set(SAE_FILES) <= set(hub.files("user/saes", "wide/2"))
    assert hub.messages[-1] == "Two of them"
    call("pull", "user/saes@wide%2F2", "-o", tmp_path / "run")
    card = hub.files("user/saes", "wide/2")["README.md"].decode()
    address = card.split('Sae.load("')[1].split('"')[0]
    assert address.startswith("hf://user/saes@wide%2F2/")
    Sae.load(address)
    assert "load_from_hub" not in card  # sparsify's takes no branch
    hub.put("user/open", {".gitattributes": b""})
    with pytest.raises(ConfigError, match="user/open is there and public"):
        call("push", made.out, "user/open", "--private")
    assert list(hub.files("user/open")) == [".gitattributes"]


def test_an_interrupted_push_goes_on(made: Pipeline, hub: Hub, tmp_path: Path) -> None:
    """Oracle: the large files that the hub got before it refused more; none of them comes again."""
    hub.n_uploads_left = 2
    with pytest.raises(ConfigError, match=r"user/acts: .*run the command again"):
        call("push", made.acts, "user/acts")
    assert len(hub.large) == 2
    with pytest.raises(StoreError, match="its upload is not finished"):
        call("pull", "datasets/user/acts", "-o", tmp_path / "acts")
    hub.n_uploads_left = 10**9
    hub.asked.clear()
    call("push", made.acts, "user/acts")
    assert len([verb for verb, _ in hub.asked if verb == "PUT"]) == len(hub.large) - 2
    call("pull", "datasets/user/acts", "-o", tmp_path / "acts")
    hub.asked.clear()
    call("push", made.acts, "user/acts")
    assert "PUT" not in {verb for verb, _ in hub.asked}
    assert not (made.acts / ".cache").exists()


def test_an_interrupted_pull_goes_on(made: Pipeline, hub: Hub, tmp_path: Path) -> None:
    """Oracle: the files whose content is asked for; those that had arrived are not asked for again."""
    call("push", made.acts, "user/acts")
    n_files = len(hub.files("user/acts", kind="datasets")) - 1
    hub.n_downloads_left = 5
    with pytest.raises(ConfigError, match="status 400"):
        call("pull", "datasets/user/acts", "-o", tmp_path / "acts")
    assert (tmp_path / "acts").is_dir()
    hub.n_downloads_left = 10**9
    hub.asked.clear()
    call("pull", "datasets/user/acts", "-o", tmp_path / "acts")
    assert len(hub.downloaded()) == n_files - 5
    with pytest.raises(ConfigError, match="must be a new or an empty folder"):
        call("pull", "datasets/user/acts", "-o", tmp_path / "acts")


def test_damaged_data_is_refused_on_both_ways(made: Pipeline, hub: Hub, tmp_path: Path) -> None:
    """Oracle: one flipped bit, here in the store, then in what the hub holds."""
    acts = shutil.copytree(made.acts, tmp_path / "acts")
    shard = acts / "layers.1" / "c" / "1" / "0"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(StoreError, match=r"layers\.1 shard 1: content differs from its hash"):
        call("push", acts, "user/acts")
    assert list(hub.files("user/acts", kind="datasets")) == [".gitattributes"]
    call("push", made.acts, "user/acts")
    hub.files("user/acts", kind="datasets")["layers.1/c/1/0"] = bytes(content)
    with pytest.raises(StoreError, match=r"(?s)layers\.1 shard 1: content differs.*pull again"):
        call("pull", "user/acts", "-o", tmp_path / "pulled")


def test_what_cannot_be_pushed_is_refused_before_the_hub_is_asked(
    made: Pipeline, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the messages, and the requests, none."""
    run = shutil.copytree(made.out, tmp_path / "run")
    (run / "finished.json").unlink()
    acts = shutil.copytree(made.acts, tmp_path / "acts")
    (acts / "layers.1" / "manifest.json").unlink()
    for path, repo, error, message in (
        (run, "user/saes", StoreError, "is unfinished; finish it with `saemill train`"),
        (acts, "user/acts", StoreError, "no site of .* is finished"),
        (tmp_path, "user/saes", StoreError, "is no run, token store or activation store .*; did you mean"),
        (made.out / VARIANTS[0], "user/saes", StoreError, "is one SAE; push its run, .*, with --variant"),
        (made.out, "saes", ConfigError, "is no place on the hub"),
        (made.out, "user/saes/layers.1", ConfigError, "repo must be user/repo"),
        (made.out, "user/saes@main", ConfigError, "named with --revision"),
    ):
        with pytest.raises(error, match=message):
            call("push", path, repo)
    with pytest.raises(ConfigError, match="--variant has no effect on the activation store"):
        call("push", made.acts, "user/acts", "--variant", "x")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match=r"needs a token .* `hf auth login`, or set HF_TOKEN"):
        call("push", made.out, "user/saes")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set, so that nothing can be pushed"):
        call("push", made.out, "user/saes")
    assert hub.asked == []


def test_a_token_that_may_not_write_is_told(
    made: Pipeline, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the hub, which knows one token as a reader's and the other not at all."""
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(ConfigError, match=r"your token does not allow this .*write access"):
        call("push", made.out, "user/saes")
    monkeypatch.setenv("HF_TOKEN", "hf_unknown0123456789")
    with pytest.raises(ConfigError, match="the hub does not know your token"):
        call("push", made.out, "user/saes")
    assert hub.repos == {}


def test_a_repository_that_is_model_and_dataset_is_named_in_full(
    made: Pipeline, hub: Hub, tmp_path: Path
) -> None:
    """Oracle: both are there; each is had by its full name, and one that is nothing of ours is refused."""
    call("push", made.out, "user/both")
    call("push", made.tokens, "user/both")
    with pytest.raises(ConfigError, match="say models/user/both or datasets/user/both"):
        call("pull", "user/both", "-o", tmp_path / "x")
    assert call("pull", "models/user/both", "-o", tmp_path / "run").startswith("run ")
    assert call("pull", "hf://datasets/user/both", "-o", tmp_path / "tokens").startswith("token store ")
    hub.put("user/text", {"README.md": b"nothing"})
    with pytest.raises(StoreError, match="holds no run and no store"):
        call("pull", "user/text", "-o", tmp_path / "x")
    with pytest.raises(ConfigError, match="user/absent is not on the hub"):
        call("pull", "user/absent", "-o", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_tokenizer_that_names_a_path_gets_another_hash(hub: Hub, tmp_path: Path) -> None:
    """Oracle: `verify` of the pulled store; the tokenizer's own file, which keeps its path."""
    store = make_store(tmp_path, n_rows=8, ctx_len=32, d=4, shard_tokens=128)
    file = store.path / "tokens" / "tokenizer" / "tokenizer_config.json"
    manifest = store.tokens.manifest
    file.write_text(json.dumps(json.loads(file.read_text()) | {"name_or_path": manifest.tokenizer.name}))
    new = records.File(
        path="tokenizer/tokenizer_config.json", bytes=file.stat().st_size, xxh3=durable.hash_file(file)
    )
    files = tuple(new if entry.path == new.path else entry for entry in manifest.files)
    records.write(store.path / "tokens" / "manifest.json", manifest.model_copy(update={"files": files}))
    call("push", store.path, "user/acts")
    call("pull", "user/acts", "-o", tmp_path / "pulled")
    assert "every file has its size and hash" in call("verify", tmp_path / "pulled")
    pulled = tmp_path / "pulled" / "tokens" / "tokenizer" / "tokenizer_config.json"
    assert json.loads(pulled.read_text())["name_or_path"] == "model"


def test_the_command_shows_no_token_and_leaves_none(made: Pipeline, hub: Hub, tmp_path: Path) -> None:
    """Oracle: real processes, what they print and every file that they leave or send."""
    environment = os.environ | hub.environment(tmp_path / "home")
    hub.n_uploads_left = 1
    printed, codes = "", []
    for arguments in (["push", made.out, "user/saes"], ["push", made.out, "user/saes"],
                      ["pull", "user/saes", "-o", tmp_path / "run"]):  # fmt: skip
        command = [sys.executable, "-m", "saemill", *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        printed += done.stdout + done.stderr
        codes.append(done.returncode)
        hub.n_uploads_left = 10**9
    assert codes == [2, 0, 0], printed
    assert "Traceback" not in printed
    left = [f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()]
    sent = [
        content
        for repo in hub.repos.values()
        for files in repo.commits.values()
        for content in files.values()
    ]
    for secret in (WRITER, "signature-of-the-address"):
        assert secret not in printed
        assert not [content for content in left + sent if secret.encode() in content]


def test_peers_load_from_the_hub(made: Pipeline, hub: Hub, tmp_path: Path) -> None:
    """Oracle: sparsify's and SAELens' own way to an SAE on the hub, their latents and reconstructions."""
    require_peers()
    call("push", made.out, "user/saes")
    call("export", f"hf://user/saes/{VARIANTS[1]}", "--format", "saelens", "--model", made.model,
         "-o", tmp_path / "repo" / "layer_1")  # fmt: skip
    hub.put_folder("user/for-saelens", tmp_path / "repo")
    x_TD = ActivationStore(made.acts).read("layers.1", 0, 200).float()
    np.save(tmp_path / "x.npy", x_TD.numpy())
    places = {"sparsify": f"user/saes/{VARIANTS[1]}", "saelens": "user/for-saelens/layer_1"}
    jobs = [
        {"do": "encode", "format": f"{name} from the hub", "folder": place, "x": tmp_path / "x.npy",
         "out": tmp_path / f"{name}.npz"}
        for name, place in places.items()
    ]  # fmt: skip
    run_in_peers(tmp_path, *jobs, environment=hub.environment(tmp_path / "peers-home"))
    for name in places:
        check_same(Sae.load(made.out / VARIANTS[1]), x_TD, tmp_path / f"{name}.npz")

"""`saemill push` and `saemill pull`, against a hub on this machine: what goes there comes back."""

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from command_line import call
from hub import Hub
from peers import require_peers, run_in_peers
from pipeline import Pipeline
from pushed import OF_A_RUN, SAE_FILES, VARIANTS, metadata
from saes import check_same

from saemill import ActivationStore, Sae, TokenStore
from saemill.assess.config import AssessConfig
from saemill.assess.run import run as assess
from saemill.common import durable
from saemill.common.errors import ConfigError
from saemill.common.stores import assessments, features
from saemill.hub.names import Names
from saemill.show import problems


def test_a_pushed_run_is_pulled_as_it_was(made: Pipeline, hub: Hub, tmp_path: Path) -> None:
    """Oracle: the run's own SAEs, bit by bit; the list of what belongs to a run, without its checkpoint."""
    told = call("push", made.out, "user/saes")
    assert ": 16 files, " in told
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
    assert "failed: dead latents" in shown[0][0]
    assert problems(tmp_path / "run") == []


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


@pytest.mark.parametrize("kind", ["acts", "packed", "tokens"])
def test_a_pushed_store_is_pulled_byte_for_byte(kind: str, made: Pipeline, hub: Hub, tmp_path: Path) -> None:
    """Oracle: the store's own files; those that named a path of this machine differ in that alone."""
    path = {"acts": made.acts, "packed": tmp_path / "int8", "tokens": made.tokens}[kind]
    if kind == "packed":
        call("convert-store", made.acts, path, "--dtype", "int8", "--compression", "zstd")
    assert call("push", path, f"user/{kind}").endswith(f"hf://datasets/user/{kind} is there\n")
    told = call("pull", f"user/{kind}", "-o", tmp_path / kind)
    files = {str(f.relative_to(path)) for f in path.rglob("*") if f.is_file()}
    found = {str(f.relative_to(tmp_path / kind)) for f in (tmp_path / kind).rglob("*") if f.is_file()}
    assert found == files | {"README.md"}
    differ = {name for name in files if (path / name).read_bytes() != (tmp_path / kind / name).read_bytes()}
    of_sites = {name for name in files if name.startswith("sites/")}
    of_acts = {"zarr.json", "tokens/manifest.json", *of_sites}
    assert differ == ({"manifest.json"} if kind == "tokens" else of_acts)
    store: Any = TokenStore if kind == "tokens" else ActivationStore
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
                if name.endswith(".js"):
                    content = gzip.decompress(base64.b64decode(content.split(b'"')[3]))
                assert not [folder for folder in folders if folder.encode() in content], name
    config = yaml.safe_load(hub.files("user/saes")["config.yaml"])["train"]
    assert (config["acts"], config["out"]) == ("acts", "run")
    cfg = json.loads(hub.files("user/saes")[SAE_FILES[0]])["saemill"]
    assert (cfg["model"], cfg["dataset"]) == (Path(made.model).name, "corpus.jsonl")


def test_a_pulled_run_has_the_latents_of_its_page(made: Pipeline, hub: Hub, tmp_path: Path) -> None:
    """Oracle: the run's own record but for the hash of what it is of; its shards, which name no path; the
    densities."""
    call("push", made.out, "user/saes")
    call("pull", "user/saes", "-o", tmp_path / "run")
    own, pulled = features.load(made.out), features.load(tmp_path / "run")
    assert pulled.of == durable.hash_file(tmp_path / "run" / "finished.json") != own.of
    assert pulled.latents == own.latents
    shards = sorted((made.out / "report-latents").iterdir())
    assert len(shards) == 3
    assert all((tmp_path / "run" / "report-latents" / s.name).read_bytes() == s.read_bytes() for s in shards)
    for name, density_F in assessments.densities(made.out).items():
        np.testing.assert_array_equal(assessments.densities(tmp_path / "run")[name], density_F)


def test_paths_become_names_and_nothing_else_changes() -> None:
    """Oracle: texts written by hand."""
    names = Names({"acts": "/data", "model": ["/home/é & co/model", "owner/data", "~/x"], "n": 3})
    assert names.of({"acts": "/data", "n": [1, None], "id": "owner/data"}) == {
        "acts": "data", "n": [1, None], "id": "owner/data",
    }  # fmt: skip
    assert names.in_text("in /data/a, /data, /data-2 and b/data") == "in data/a, data, /data-2 and b/data"
    assert names.in_text("<p>/home/é &amp; co/model</p> ~/x") == "<p>model</p> x"
    assert Names({}).in_text("/data") == "/data"


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

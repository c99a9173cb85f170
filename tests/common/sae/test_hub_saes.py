"""SAEs from the hub: `hf://user/repo/folder`, against a hub on this machine."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hub import READER, WRITER, Hub
from saes import make_sae
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from saemill import Sae, cli
from saemill.common.errors import ConfigError, StoreError
from saemill.common.sae import formats
from saemill.common.sae.formats.hooks import Hook


def big(k: int) -> Sae:
    """An SAE whose weights are a large file to the hub."""
    return make_sae(32, 300 + k, k)


def check_same(found: Sae, wanted: Sae) -> None:
    assert found.config.k == wanted.config.k
    for name, weight in wanted.named_parameters():
        assert torch.equal(found.get_parameter(name), weight), name


def serve(hub: Hub, folder: Path, branch: str = "main", **saes: Sae) -> None:
    """Make a branch of `user/saes` hold a folder per SAE, and what no SAE needs."""
    for name, made in saes.items():
        made.save(folder / branch / name)
        (folder / branch / name / "optimizer.pt").write_bytes(bytes(100_000))
    (folder / branch / "README.md").write_text("what these are")
    hub.put_folder("user/saes", folder / branch, branch)


def test_an_sae_is_loaded_by_its_address(hub: Hub, tmp_path: Path) -> None:
    """Oracle: the SAEs that were put there, by weights; what the hub was asked for: two files of each."""
    serve(hub, tmp_path, a=big(3), b=big(4))
    serve(hub, tmp_path, branch="feature/wide", a=big(7))
    check_same(Sae.load("hf://user/saes/b"), big(4))
    assert hub.downloaded() == ["b/cfg.json", "b/sae.safetensors"]
    check_same(Sae.load("hf://user/saes@main/a"), big(3))
    check_same(Sae.load("hf://models/user/saes@feature%2Fwide/a"), big(7))
    check_same(Sae.from_pretrained("user/saes", "a", revision="feature/wide"), big(7))
    check_same(Sae.from_pretrained("user/saes", revision="feature/wide"), big(7))
    commit = hub.repos["models", "user/saes"].branches["main"]
    check_same(Sae.from_pretrained("user/saes", "b", revision=commit), big(4))
    assert not [path for path in hub.downloaded() if "optimizer" in path]


def test_files_are_downloaded_once(hub: Hub, tmp_path: Path) -> None:
    """Oracle: the requests; a new commit that changes one of two SAEs brings that one's weights alone."""
    serve(hub, tmp_path, a=big(3), b=big(4))
    for _ in range(2):
        Sae.load("hf://user/saes/a")
        Sae.load("hf://user/saes/b")
    assert hub.downloaded() == ["a/cfg.json", "a/sae.safetensors", "b/cfg.json", "b/sae.safetensors"]
    serve(hub, tmp_path, b=big(5))
    check_same(Sae.load("hf://user/saes/b"), big(5))
    check_same(Sae.load("hf://user/saes/a"), big(3))


@pytest.mark.parametrize("layout", ["root", "alone", "nested"])
def test_the_folder_may_be_left_out_where_there_is_one_sae(layout: str, hub: Hub, tmp_path: Path) -> None:
    """Oracle: the SAE, at the root of the repository, in its only folder, or deeper below the named one."""
    big(3).save(tmp_path / {"root": ".", "alone": "layers.3", "nested": "x/y/trainer_0"}[layout])
    hub.put_folder("user/one", tmp_path)
    check_same(Sae.load("hf://user/one"), big(3))
    if layout == "nested":
        check_same(Sae.load("hf://user/one/x"), big(3))


def test_saes_of_other_tools_are_loaded_and_imported(hub: Hub, tmp_path: Path) -> None:
    """Oracle: the same SAE in each format, and what each format tells beside its weights."""
    for name in formats.NAMES:
        formats.save(big(3).parts, name, tmp_path / "repo" / name / "layers.2", Hook(2, "resid_post"))
    (tmp_path / "repo" / "sparsify" / "config.json").write_text(json.dumps({"model": "owner/model"}))
    cfg = tmp_path / "repo" / "sparsify" / "layers.2" / "cfg.json"
    cfg.write_text(json.dumps({key: v for key, v in json.loads(cfg.read_text()).items() if key != "saemill"}))
    save_file(load_file(cfg.with_name("sae.safetensors")), cfg.with_name("sae.safetensors"))
    hub.put_folder("user/theirs", tmp_path / "repo")
    for name in formats.NAMES:
        address = f"hf://user/theirs/{name}/layers.2"
        check_same(Sae.load(address), big(3))
        result = CliRunner().invoke(cli.app, ["import", address, "-o", str(tmp_path / name)])
        assert result.exit_code == 0, result.output
        check_same(Sae.load(tmp_path / name), big(3))
    told = Sae.load(tmp_path / "sparsify").config.provenance
    assert (told["site"], told["model"]) == ("layers.2", "owner/model")


def test_an_sae_is_exported_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    """Oracle: the export of the same SAE from a folder, byte for byte."""
    serve(hub, tmp_path / "repo", a=big(3))
    big(3).save(tmp_path / "sae")
    for place, out in (("hf://user/saes/a", "from-hub"), (tmp_path / "sae", "from-folder")):
        arguments = ["export", str(place), "--format", "dictionary_learning", "-o", str(tmp_path / out)]
        assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    for file in ("ae.pt", "config.json"):
        assert (tmp_path / "from-hub" / file).read_bytes() == (tmp_path / "from-folder" / file).read_bytes()


def test_offline_what_was_downloaded_is_used(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the SAE; the hub is not asked. What was not downloaded is an error that says so."""
    serve(hub, tmp_path, a=big(3), b=big(4))
    Sae.load("hf://user/saes/a")
    hub.asked.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    check_same(Sae.load("hf://user/saes/a"), big(3))
    check_same(Sae.load("hf://user/saes"), big(3))  # the only one that is there
    with pytest.raises(StoreError, match=r"hf://user/saes/b .* downloaded before: a"):
        Sae.load("hf://user/saes/b")
    for address in ("hf://user/others/a", "hf://user/saes@other/a"):
        with pytest.raises(ConfigError, match="HF_HUB_OFFLINE"):
            Sae.load(address)
    assert hub.asked == []


def test_a_half_downloaded_sae_is_an_error_offline(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: weights without their config, as a kill leaves them; online they are completed."""
    serve(hub, tmp_path, a=big(3))
    hub.n_downloads_left = 1
    with pytest.raises(ConfigError, match="status 400"):
        Sae.load("hf://user/saes/a")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises((ConfigError, StoreError)):
        Sae.load("hf://user/saes/a")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.n_downloads_left = 10
    check_same(Sae.load("hf://user/saes/a"), big(3))


def test_a_wrong_address_is_told_with_what_is_there(hub: Hub, tmp_path: Path) -> None:
    """Oracle: the messages; each names what there is instead or how to get in."""
    serve(hub, tmp_path, a=big(3), b=big(4))
    hub.put("user/text", {"README.md": b"no SAE"})
    for address, error, message in (
        ("hf://user/saes", StoreError, r"holds 2 SAEs; name one after the repository: a, b$"),
        ("hf://user/saes/c", StoreError, r"hf://user/saes/c holds no SAE; there are: a, b$"),
        ("hf://user/text", StoreError, r"holds no SAE: there is no sae.safetensors, sae_weights"),
        ("hf://user/saes@dev/a", ConfigError, r"user/saes has no such revision; name another branch"),
        ("hf://user/absent/a", ConfigError, r"user/absent is not on the hub, or is private .* HF_TOKEN"),
        ("hf://saes", ConfigError, r"'hf://saes' is no place on the hub: .*namespace/name"),
        ("hf://spaces/user/saes", ConfigError, r"must be a model or a dataset repository, got a space"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            Sae.load(address)


def test_a_private_repository_needs_a_token_that_is_never_shown(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the hub, which lets in whoever has a token; the texts of the errors."""
    serve(hub, tmp_path, a=big(3))
    hub.repos["models", "user/saes"].private = True
    for token in (None, "hf_unknown0123456789"):
        monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(ConfigError, match="hf auth login") as caught:
            Sae.load("hf://user/saes/a")
        error: Any = caught.value
        while error is not None:
            assert "hf_unknown" not in str(error)
            error = error.__cause__ or error.__context__
    for token in (READER, WRITER):
        monkeypatch.setenv("HF_TOKEN", token)
        shutil.rmtree(tmp_path / "hub-home", ignore_errors=True)
        check_same(Sae.load("hf://user/saes/a"), big(3))


def test_a_hub_that_cannot_be_reached_is_an_error_that_names_offline_mode(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a port that nobody listens at."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub tries again, ever later
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"cannot be reached .*HF_HUB_OFFLINE=1"):
        Sae.load("hf://user/saes/a")

"""Pushes and pulls that are interrupted, damaged or not allowed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from command_line import call
from hub import READER, WRITER, Hub
from pipeline import Pipeline
from pushed import VARIANTS
from stores import make_store

from saemill import ActivationStore, TokenStore
from saemill.common import durable, records
from saemill.common.errors import ConfigError, StoreError


def test_a_damaged_report_is_not_pushed(made: Pipeline, hub: Hub, tmp_path: Path) -> None:
    """Oracle: the hash that the assessment has of it; the hub gets nothing."""
    run = Path(shutil.copytree(made.out, tmp_path / "run"))
    report = run / "report.html"
    report.write_bytes(report.read_bytes()[:-9])
    with pytest.raises(StoreError, match=r"(?s)report\.html: file has .*Run `saemill assess` again"):
        call("push", run, "user/saes")
    assert hub.asked == []


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

"""Settings of `saemill tokenize` that are refused, and outputs that are there already."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from packing import TEXTS, jsonl, tokenize, word_tokenizer

import saemill.tokenize.run as stage
from saemill.common.errors import ConfigError, StoreError
from saemill.common.stores.tokens import TokenStore
from saemill.tokenize.config import TokenizeConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text_column": "body"}, r"has no column 'body'; it has text, number\. .*--text-column"),
        ({"text_column": "body", "streaming": True}, "has no column 'body'; it has text, number"),
        ({"ctx_len": 257}, r"ctx_len must be at most 256 \(the tokenizer's model_max_length\), got 257"),
        ({"tokenizer": "/absent/tokenizer"}, "cannot load the tokenizer '/absent/tokenizer'"),
        ({"split": "test"}, "has neither subsets nor splits"),
        ({"subset": "en"}, "has neither subsets nor splits"),
        ({"revision": "main"}, "--revision has no effect on the local path"),
    ],
)
def test_wrong_settings(tmp_path: Path, tokenizer_folder: str, values: dict[str, Any], message: str) -> None:
    """Oracle: the message by hand; nothing is left at the output."""
    file = jsonl(tmp_path / "a.jsonl", TEXTS, number=list(range(len(TEXTS))))
    values = {"tokenizer": tokenizer_folder} | values
    with pytest.raises(ConfigError, match=message):
        tokenize(file, tmp_path / "out", **values)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "values", [{"ctx_len": 0}, {"num_proc": 0}, {"held_out_fraction": 1.0}, {"held_out_fraction": -0.1},
               {"held_out_fraction": float("nan")}, {"max_tokens": 31}]
)  # fmt: skip
def test_nonsense_settings(values: dict[str, Any]) -> None:
    """Oracle: the config itself refuses the setting by name."""
    (name,) = values
    with pytest.raises(ConfigError, match=f"^{name} must be "):
        TokenizeConfig(dataset="d", tokenizer="t", out=Path("o"), **{"ctx_len": 32} | values)


def test_ctx_len_limits(tmp_path: Path, tokenizer_folder: str, bert_folder: str) -> None:
    """Oracle: 256 is allowed and 257 is not; a model beside the tokenizer limits too; a row needs room."""
    file = jsonl(tmp_path / "a.jsonl", TEXTS)
    assert tokenize(file, tmp_path / "out", tokenizer_folder, ctx_len=256, held_out_fraction=0).ctx_len == 256
    folder = tmp_path / "model"
    shutil.copytree(bert_folder, folder)
    transformers.BertConfig(max_position_embeddings=40).save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"at most 40 \(the longest row of the model beside it\), got 41"):
        tokenize(file, tmp_path / "b", str(folder), ctx_len=41)
    with pytest.raises(ConfigError, match="ctx_len 2 leaves no room"):
        tokenize(file, tmp_path / "b", str(folder), ctx_len=2)
    assert tokenize(file, tmp_path / "b", str(folder), ctx_len=40, held_out_fraction=0).ctx_len == 40


def test_tokenizer_without_separator(tmp_path: Path) -> None:
    """Oracle: no EOS and no [SEP] is an error that says how to repair it."""
    folder = word_tokenizer(tmp_path / "tokenizer", {"<unk>": 0, "a": 1}, eos=False)
    with pytest.raises(ConfigError, match=r"has no EOS or separator token .* set its eos_token"):
        tokenize(jsonl(tmp_path / "a.jsonl", ["a a a"]), tmp_path / "out", folder, ctx_len=2)


def test_other_settings_are_refused(tmp_path: Path, tokenizer_folder: str) -> None:
    """Oracle: the two keys that differ are named with both values, the store stays as it was."""
    file = jsonl(tmp_path / "a.jsonl", TEXTS)
    store = tokenize(file, tmp_path / "out", tokenizer_folder, shuffle_seed=4)
    with pytest.raises(ConfigError) as caught:
        tokenize(file, tmp_path / "out", tokenizer_folder, shuffle_seed=5, ctx_len=16)
    lines = str(caught.value).splitlines()
    assert lines[1:3] == ["  ctx_len: there 32, now 16", "  shuffle_seed: there 4, now 5"]
    assert len(lines) == 4
    assert TokenStore(tmp_path / "out").problems(hashes=True) == []
    assert TokenStore(tmp_path / "out").fingerprint == store.fingerprint


def test_finished_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenizer_folder: str
) -> None:
    """Oracle: no tokenizer is loaded, no file's time changes, and it says so; num_proc may differ."""
    file = jsonl(tmp_path / "a.jsonl", TEXTS)
    store = tokenize(file, tmp_path / "out", tokenizer_folder)
    times = {path: path.stat().st_mtime_ns for path in store.path.rglob("*")}
    monkeypatch.setattr(stage, "load_tokenizer", lambda *_: pytest.fail("started anew"))
    capsys.readouterr()
    again = tokenize(file, tmp_path / "out", tokenizer_folder, num_proc=3)
    assert again.fingerprint == store.fingerprint
    assert "is finished already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in store.path.rglob("*")} == times


def test_changed_source_is_refused(tmp_path: Path, tokenizer_folder: str) -> None:
    """Oracle: one letter of the text changed after the store was made; the same settings are refused."""
    file = jsonl(tmp_path / "a.jsonl", TEXTS)
    store = tokenize(file, tmp_path / "out", tokenizer_folder)
    jsonl(file, [TEXTS[0].upper(), *TEXTS[1:]])
    with pytest.raises(ConfigError, match=r"a\.jsonl has changed since .*out was made of it"):
        tokenize(file, tmp_path / "out", tokenizer_folder)
    assert TokenStore(tmp_path / "out").fingerprint == store.fingerprint
    jsonl(file, TEXTS)
    assert tokenize(file, tmp_path / "out", tokenizer_folder).fingerprint == store.fingerprint


def test_foreign_output_is_kept(tmp_path: Path, tokenizer_folder: str) -> None:
    """Oracle: a folder with other things, or a file, at the output is refused and not touched."""
    file = jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match="is not a finished token store"):
        tokenize(file, tmp_path / "out", tokenizer_folder)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"
    with pytest.raises(ConfigError, match="out must be a folder"):
        tokenize(file, file, tokenizer_folder)
    with pytest.raises(StoreError, match="is not a finished token store"):
        TokenStore(file)
    (tmp_path / "empty").mkdir()
    assert tokenize(file, tmp_path / "empty", tokenizer_folder).n_rows > 0

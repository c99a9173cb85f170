"""`saemill tokenize` run again on a store that is damaged."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from crashes import file_hashes
from texts import random_texts

import saemill.tokenize.run as stage
from saemill.common.errors import ConfigError, DiskError, StoreError
from saemill.common.stores.tokens import TokenStore
from saemill.tokenize.config import TokenizeConfig
from saemill.tokenize.run import run

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> TokenizeConfig:
    """A store, and the settings that made it."""
    folder = tmp_path_factory.mktemp("made")
    file = folder / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in random_texts(30)))
    config = TokenizeConfig(dataset=str(file), tokenizer=tokenizer_folder, out=folder / "out", ctx_len=16)
    run(config)
    return config


def again(made: TokenizeConfig, out: Path, **changes: object) -> TokenStore:
    values = {"dataset": made.dataset, "tokenizer": made.tokenizer, "ctx_len": 16} | changes
    return run(TokenizeConfig(out=out, **values))  # type: ignore[arg-type]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


DAMAGE: dict[str, Damage] = {
    "bit": flip,
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-2]),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "empty": lambda file: file.write_bytes(b""),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_each_damaged_file_is_made_anew(
    made: TokenizeConfig, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: every file of the store as it was; what is said names the damaged one."""
    whole = {str(f.relative_to(made.out)): f.read_bytes() for f in made.out.rglob("*") if f.is_file()}
    out = tmp_path / "out"
    shutil.copytree(made.out, out)
    for name in whole:
        DAMAGE[kind](out / name)
        capsys.readouterr()
        again(made, out)
        said = capsys.readouterr().out
        assert f"{out} is damaged, and made anew:" in said
        assert Path(name).name in said or Path(name).parts[0] in said
        assert "finished already" not in said
        assert "saemill tokenize" not in said
        found = {str(f.relative_to(out)): f.read_bytes() for f in out.rglob("*") if f.is_file()}
        assert found == whole, name
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    again(made, out)
    assert "is finished already" in capsys.readouterr().out


def test_two_files_exchanged(made: TokenizeConfig, tmp_path: Path) -> None:
    """Oracle: the store as it was, after the tables took each other's names."""
    out = tmp_path / "out"
    shutil.copytree(made.out, out)
    (out / "segments.parquet").rename(out / "x")
    (out / "documents.parquet").rename(out / "segments.parquet")
    (out / "x").rename(out / "documents.parquet")
    assert again(made, out).fingerprint == TokenStore(made.out).fingerprint


def test_what_is_not_ours_is_never_replaced(made: TokenizeConfig, tmp_path: Path) -> None:
    """Oracle: a damaged store with a file of the user's in it, and a folder with a tokenizer alone, are
    refused and stay; emptied, as the message says, the folder is taken."""
    out = tmp_path / "out"
    shutil.copytree(made.out, out)
    (out / "manifest.json").unlink()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"holds notes\.txt; choose another output folder, or empty"):
        again(made, out)
    assert (out / "notes.txt").read_text() == "mine"
    own = tmp_path / "own"
    shutil.copytree(made.out / "tokenizer", own / "tokenizer")
    with pytest.raises(StoreError, match="holds parts of one; choose another output folder, or empty"):
        again(made, own)
    shutil.rmtree(own / "tokenizer")
    assert again(made, own).n_rows > 0


def test_other_settings_and_other_sources_are_told_before_a_repair(
    made: TokenizeConfig, tmp_path: Path
) -> None:
    """Oracle: the key that differs, and the damaged store untouched."""
    out = tmp_path / "out"
    shutil.copytree(made.out, out)
    flip(out / "tokens" / "c" / "0" / "0")
    content = (out / "tokens" / "c" / "0" / "0").read_bytes()
    with pytest.raises(ConfigError, match="shuffle_seed: there 42, now 7"):
        again(made, out, shuffle_seed=7)
    assert (out / "tokens" / "c" / "0" / "0").read_bytes() == content


def test_a_kill_while_the_new_store_takes_its_place(
    made: TokenizeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the same command makes the whole store, and leaves nothing beside it."""
    out = tmp_path / "out"
    shutil.copytree(made.out, out)
    flip(out / "manifest.json")
    replace, calls = Path.replace, []

    def killed(path: Path, target: Path) -> Path:
        if path.name == "out.partial" and target.name == "out":
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            again(made, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial", "out.partial-damaged"]
    assert again(made, out).fingerprint == TokenStore(made.out).fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_store_whose_row_length_followed_from_the_rows(made: TokenizeConfig, tmp_path: Path) -> None:
    """Oracle: with the length left out and with it named the store is found; another length is refused."""
    ids = [[i + j for j in range(8)] for i in range(1, 30)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    first = again(made, tmp_path / "out", dataset=str(file), ctx_len=None)
    assert first.ctx_len == 8
    for ctx_len in (None, 8):
        found = again(made, tmp_path / "out", dataset=str(file), ctx_len=ctx_len)
        assert found.fingerprint == first.fingerprint
    with pytest.raises(ConfigError, match="ctx_len: there None, now 9"):
        again(made, tmp_path / "out", dataset=str(file), ctx_len=9)


def test_a_failure_leaves_nothing(
    made: TokenizeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: no folder beside the output after an error that is not a kill."""

    def failed(*_: object) -> None:
        raise ConfigError("something")

    monkeypatch.setattr(stage, "survey", failed)
    monkeypatch.setattr(stage.Writer, "check", failed)
    with pytest.raises(ConfigError, match="something"):
        again(made, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_no_other_corpus_takes_the_place_of_a_damaged_one(made: TokenizeConfig, tmp_path: Path) -> None:
    """Oracle: the files that were there: a store that lost one is not made anew of another text."""
    out = Path(shutil.copytree(made.out, tmp_path / "out"))
    (out / "documents.parquet").unlink()
    before = file_hashes(out)
    other = tmp_path / "b.jsonl"
    other.write_text("".join(json.dumps({"text": text}) + "\n" for text in random_texts(30, seed=1)))
    with pytest.raises(ConfigError, match="was made with other settings"):
        again(made, out, dataset=str(other))
    assert file_hashes(out) == before


def test_a_file_that_cannot_be_read_is_no_damage(
    made: TokenizeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the files that were there; the system's error is told."""
    out = Path(shutil.copytree(made.out, tmp_path / "out"))
    before = file_hashes(out)

    def failing(path: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing)
        with pytest.raises(DiskError, match=r"manifest\.json"):
            again(made, out)
    assert file_hashes(out) == before

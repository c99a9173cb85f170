"""Damage to any one file of a store: it is found, named and, where the inputs are given, mended."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from crashes import Crash, bury, crash_at, file_hashes
from stores import files_of, make_embeddings, make_tokens
from without_norms import forget_norms

from saemill.cache import run as cache_run
from saemill.cache import token_copy
from saemill.cache.claims.worker import Worker
from saemill.cache.config import CacheConfig
from saemill.cache.placing import OnDisk
from saemill.common import durable, records
from saemill.common.errors import ConfigError, StoreError
from saemill.common.stores import passages
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.site_records import SiteManifest
from saemill.common.stores.tokens import TokenStore
from saemill.embeddings.config import ImportConfig
from saemill.embeddings.run import run as import_activations
from saemill.show import describe, problems
from saemill.tokenize.config import TokenizeConfig
from saemill.tokenize.run import run as tokenize

CTX_LEN, N_ROWS = 16, 24


@pytest.fixture(scope="module")
def tokens(corpus: Path, tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """24 rows of 16, some held out."""
    folder = tmp_path_factory.mktemp("damage") / "tokens"
    return tokenize(
        TokenizeConfig(
            dataset=str(corpus), tokenizer=tokenizer_folder, out=folder, ctx_len=CTX_LEN,
            max_tokens=N_ROWS * CTX_LEN, held_out_fraction=0.2,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def cached(tokens: TokenStore, tiny_models: dict[str, str]) -> tuple[Path, Callable[[Path], object]]:
    """A store of two sites in three shards each, and what makes or mends one."""

    return cached_as(tokens, tiny_models["llama"], "acts", shard_tokens=N_ROWS // 3 * CTX_LEN)


@pytest.fixture(scope="module")
def packed(tokens: TokenStore, tiny_models: dict[str, str]) -> tuple[Path, Callable[[Path], object]]:
    """Such a store of int8, compressed, in two shards each."""
    return cached_as(
        tokens, tiny_models["llama"], "packed", shard_tokens=256, dtype="int8", compression="lz4"
    )


def cached_as(
    tokens: TokenStore, model: str, name: str, **form: Any
) -> tuple[Path, Callable[[Path], object]]:
    """A store of two sites, and what makes or mends one."""

    def make(out: Path, found_in: Path = tokens.path) -> ActivationStore:
        settings = {"tokens": found_in, "model": model, "out": out, "layers": (0, 1), "device": "cpu"}
        return cache_run.run(CacheConfig(**settings, **form))

    return make(tokens.path.with_name(name)).path, make


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Callable[[Path], object]]:
    """A store of 40 embeddings with texts, in three shards, and what makes or mends one."""
    return make_embeddings(tmp_path_factory.mktemp("embeddings"))


def sibling(folder: Path, name: str) -> str:
    """The file that one is swapped with: of the same kind if there is another with other content."""
    shape = [part if not part.isdigit() else "#" for part in Path(name).with_suffix("").parts]
    other = [file for file in files_of(folder) if file != name]
    alike = [
        f for f in other if [p if not p.isdigit() else "#" for p in Path(f).with_suffix("").parts] == shape
    ]
    same_name = [file for file in other if Path(file).name == Path(name).name]
    content = (folder / name).read_bytes()
    return next(f for f in (*alike, *same_name, *other) if (folder / f).read_bytes() != content)


def damage(folder: Path, name: str, kind: str) -> list[str]:
    """Damage a file; the names of those that are bad now."""
    file = folder / name
    content = bytearray(file.read_bytes())
    if kind == "bit":
        content[len(content) // 2] ^= 0x04
    elif kind == "cut":
        del content[len(content) // 2 :]
    elif kind == "zeros":
        content[:] = bytes(len(content))
        if file.read_bytes() == content:
            content[0] = 1
    elif kind == "missing":
        file.unlink()
        return [name]
    else:
        other = sibling(folder, name)
        file.write_bytes((folder / other).read_bytes())
        (folder / other).write_bytes(content)
        return [name, other]
    file.write_bytes(content)
    return [name]


def is_named(folder: Path, name: str, lines: list[str]) -> bool:
    """Whether a line names a file by its path, or a shard by its number."""
    parts = Path(name).parts
    shard = f"{parts[0]} shard {parts[2]}:" if len(parts) == 4 and parts[1] == "c" else None
    of_folder = f"{(folder / name).parent} " if parts[-1] == "manifest.json" else None
    return any(
        str(folder / name) in line or (shard and shard in line) or (of_folder and of_folder in line)
        for line in lines
    )


KINDS = ("bit", "cut", "zeros", "missing", "swapped")


@pytest.mark.parametrize("which", ["tokens", "cached", "packed", "imported"])
def test_any_damaged_file_is_found_and_named(
    which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Oracle: the file that was damaged, in each of five ways, for all files that the store has."""
    made = request.getfixturevalue(which)
    whole = made.path if which == "tokens" else made[0]
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    assert problems(copy) == []
    for name in files_of(whole):
        for kind in KINDS:
            bad = damage(copy, name, kind)
            found = problems(copy)
            assert any(is_named(copy, file, found[:-1]) for file in bad), f"{name} {kind}: {found}"
            for file in bad:
                shutil.copyfile(whole / file, copy / file)


@pytest.mark.parametrize("which", ["cached", "packed", "imported"])
def test_any_damaged_file_is_mended_by_the_command_that_made_it(
    which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Oracle: the whole store, file by file; all files in turn, the kinds of damage taken in turn too."""
    whole, make = request.getfixturevalue(which)
    expected = file_hashes(whole)
    for number, name in enumerate(files_of(whole)):
        kind = KINDS[number % len(KINDS)]
        copy = Path(shutil.copytree(whole, tmp_path / "copy"))
        damage(copy, name, kind)
        make(copy)
        assert file_hashes(copy) == expected, f"{name} {kind}"
        shutil.rmtree(copy)


METADATA = (
    "zarr.json", "sites/layers.0.json", "layers.0/zarr.json", "layers.1/manifest.json",
    "layers.0/commits/1.json", "tokens/manifest.json",
)  # fmt: skip


def spoil(folder: Path) -> None:
    """Damage what describes the shards, in several ways at once."""
    contents = (b"{}", b"", b"not JSON", b'{"a": 1}', b"[" * 99_999, b"\xff\xfe")
    for name, content in zip(METADATA, contents, strict=True):
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("which", ["cached", "packed"])
def test_no_shard_is_computed_again_for_bad_metadata(
    which: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the whole store; the model, which would be needed for that, cannot be loaded."""
    whole, make = request.getfixturevalue(which)
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    spoil(copy)
    before = {name: (copy / name).stat().st_ino for name in files_of(copy) if name.startswith("layers")}
    monkeypatch.setattr(cache_run, "LanguageModel", None)
    make(copy)
    assert file_hashes(copy) == file_hashes(whole)
    kept = [name for name in before if "/c/" in name]
    assert len(kept) == (6 if which == "cached" else 4)
    assert all((copy / name).stat().st_ino == before[name] for name in kept)


def test_a_crash_while_metadata_is_mended_loses_nothing(
    cached: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the whole store, after a crash before each step on the disk and one more call, without the
    model."""
    whole, make = cached
    monkeypatch.setattr(cache_run, "LanguageModel", None)
    for moment in range(0, 100, 3):
        copy = Path(shutil.copytree(whole, tmp_path / str(moment)))
        spoil(copy)
        with pytest.MonkeyPatch.context() as patch:
            crash_at(moment, patch)
            try:
                make(copy)
            except Crash:
                bury(copy)
            else:
                assert moment > 10
                return
        make(copy)
        assert file_hashes(copy) == file_hashes(whole), f"after a crash at step {moment}"
        shutil.rmtree(copy)
    raise AssertionError("the mending never ended")


def test_only_the_shard_of_a_lost_record_is_computed(
    cached: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the rows that the model is given: those of the one shard for which nothing answers."""
    whole, make = cached
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    (copy / "layers.1" / "manifest.json").write_text("{}")
    (copy / "layers.1" / "commits" / "1.json").write_text("{}")
    seen = []
    capture = cache_run.LanguageModel.capture

    def watched(model: Any, ids_RS: Any, *more: Any) -> Any:
        seen.append(ids_RS.numpy())
        return capture(model, ids_RS, *more)

    monkeypatch.setattr(cache_run.LanguageModel, "capture", watched)
    monkeypatch.setattr(cache_run.names, "warnings", lambda *_: [])  # which looks at a few tokens first
    make(copy)
    assert np.array_equal(np.concatenate(seen), ActivationStore(whole).tokens.rows(8, 16))
    assert file_hashes(copy) == file_hashes(whole)


def test_exchanged_sites_are_told_and_the_advice_helps(cached: tuple[Path, Any], tmp_path: Path) -> None:
    """Oracle: the whole store, after the folders were renamed as the message says."""
    whole, make = cached
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))

    def exchange() -> None:
        (copy / "layers.0").rename(copy / "x")
        (copy / "layers.1").rename(copy / "layers.0")
        (copy / "x").rename(copy / "layers.1")

    exchange()
    with pytest.raises(StoreError, match=r"layers\.0/.*'layers\.1'"):
        ActivationStore(copy).read("layers.0", 0, 1)
    assert any("name folders as they were" in line for line in problems(copy))
    with pytest.raises(StoreError, match=r"holds shards of the site 'layers\.1'.* rename them"):
        make(copy)
    exchange()
    make(copy)
    assert file_hashes(copy) == file_hashes(whole)


def test_tokens_of_another_store_are_copied_again(cached: tuple[Path, Any], tmp_path: Path) -> None:
    """Oracle: the whole store, after the advice was followed. The tokens there are as many, and whole."""
    whole, make = cached
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    shutil.rmtree(copy / "tokens")
    make_tokens(copy / "tokens", N_ROWS, CTX_LEN, parent="of another store")
    with pytest.raises(StoreError, match=r"tokens is of another store\. Run the command that made it"):
        ActivationStore(copy)
    make(copy)
    assert file_hashes(copy) == file_hashes(whole)


def test_a_token_store_in_place_of_the_copy_is_not_lost(cached: tuple[Path, Any], tmp_path: Path) -> None:
    """Oracle: its files as they were, and the whole store, after it was moved as the message says."""
    whole, make = cached
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    shutil.rmtree(copy / "tokens")
    before = file_hashes(make_tokens(copy / "tokens", N_ROWS, CTX_LEN).path)
    with pytest.raises(StoreError, match=r"is a token store of its own.* move it to another folder"):
        make(copy)
    (copy / "tokens").rename(tmp_path / "moved")
    assert file_hashes(tmp_path / "moved") == before
    make(copy)
    assert file_hashes(copy) == file_hashes(whole)


def test_a_manifest_of_another_time_is_merged_again(
    cached: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the whole store, without the model. The manifest is whole by itself, as one from a backup."""
    whole, make = cached
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    file = copy / "layers.1" / "manifest.json"
    manifest = records.read(file, SiteManifest, "")
    first, second, third = manifest.shards
    other = second.model_copy(update={"xxh3": "0" * 16})
    records.write(file, manifest.model_copy(update={"shards": (first, other, third)}))
    assert any("1.json and" in line and "tell of other shards" in line for line in problems(copy))
    monkeypatch.setattr(cache_run, "LanguageModel", None)
    make(copy)
    assert problems(copy) == []
    assert file_hashes(copy) == file_hashes(whole)


def test_a_lost_folder_of_a_site_is_missed(cached: tuple[Path, Any], tmp_path: Path) -> None:
    """Oracle: the folder's name, from `verify` and `show`; the command makes it again."""
    whole, make = cached
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    shutil.rmtree(copy / "layers.1")
    assert f"{copy}/layers.1: folder is missing" in problems(copy)
    with pytest.raises(StoreError, match=r"layers\.1: folder is missing.*saemill cache"):
        describe(copy)
    make(copy)
    assert file_hashes(copy) == file_hashes(whole)


def test_settings_of_which_no_copy_is_left_are_not_guessed(
    cached: tuple[Path, Any], tokens: TokenStore, tiny_models: dict[str, str], tmp_path: Path
) -> None:
    """Oracle: the shards' records, which know the settings by their hash; the right ones mend the store."""
    whole, make = cached
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    (copy / "zarr.json").write_text("{}")
    shutil.rmtree(copy / "sites")
    config = CacheConfig(tokens=tokens.path, model=tiny_models["llama"], out=copy, layers=(0,), dtype="fp32")
    with pytest.raises(ConfigError, match="was made with other settings than these"):
        cache_run.run(config)
    make(copy)
    assert file_hashes(copy) == file_hashes(whole)


@pytest.mark.parametrize(
    "name",
    ["tokens/c/0/0", "held_out/c/0/0", "segments.parquet", "documents.parquet", "tokenizer/tokenizer.json"],
)
def test_cache_refuses_tokens_that_are_damaged(
    name: str, cached: tuple[Path, Any], tokens: TokenStore, tmp_path: Path
) -> None:
    """Oracle: the damaged file's name, and that no copy of it is sealed."""
    copy = Path(shutil.copytree(tokens.path, tmp_path / "tokens"))
    damage(copy, name, "bit")
    with pytest.raises(StoreError, match=rf"{name}: content differs from its hash.*saemill tokenize"):
        cached[1](tmp_path / "acts", copy)  # type: ignore[call-arg]
    assert not (tmp_path / "acts" / "tokens").exists()


def test_a_worker_taken_for_dead_while_it_makes_the_store_is_told(
    cached: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the sentence, and the whole store after the same command once more. Another worker clears away
    what this one had begun, in the middle of it."""
    whole, make = cached
    out = tmp_path / "acts"
    copy_rows = token_copy.copy_rows

    def taken_over(*arguments: Any) -> Any:
        for file in (out / "claims").glob("worker-*"):
            if "partial" not in file.name:
                file.write_text(json.dumps(durable.read_json(file) | {"started": "before"}))
        with Worker(OnDisk(out), threading.Event()) as other, other.hold("store"):
            return copy_rows(*arguments)

    monkeypatch.setattr(token_copy, "copy_rows", taken_over)
    with pytest.raises(StoreError, match=r"another one took over its work.* Run the same command again"):
        make(out)
    monkeypatch.undo()
    make(out)
    assert file_hashes(out) == file_hashes(whole)


# Embeddings whose list of passages does not tell what they were made of


def import_other(
    folder: Path, out: Path, shift: float, text: str = "text", **changes: Any
) -> ActivationStore:
    """As the fixture `imported`, of vectors that are shifted and of other texts, if told so."""
    vectors = np.random.default_rng(0).standard_normal((40, 4)).astype("f4") + np.float32(shift)
    columns = {"embedding": pa.array(list(vectors), pa.list_(pa.float32()))}
    pq.write_table(pa.table(columns | {"text": [f"{text} {i}" for i in range(40)]}), folder / "other.parquet")
    source = str(folder / "other.parquet")
    return import_activations(ImportConfig(source=source, out=out, shard_rows=16, **changes))


def test_passages_of_another_source_replace_none(imported: tuple[Path, Any], tmp_path: Path) -> None:
    """Oracle: every file as it was, for other vectors, other texts and other settings; then the whole store,
    from the right ones."""
    whole, make = imported
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    (copy / "passages" / "manifest.json").write_text("{}")
    before = file_hashes(copy)
    for changes in ({"shift": 1.0}, {"shift": 0.0, "text": "other"}, {"shift": 0.0, "normalize": True}):
        with pytest.raises(ConfigError, match="does not give it again byte by byte"):
            import_other(tmp_path, copy, **changes)  # type: ignore[arg-type]
        assert file_hashes(copy) == before
    make(copy)
    assert file_hashes(copy) == file_hashes(whole)


def test_passages_that_come_out_otherwise_replace_none(
    imported: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: every file as it was. The same passages are written as other bytes, as by another pyarrow."""
    whole, make = imported
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    (copy / "passages" / "manifest.json").write_text("{}")
    before = file_hashes(copy)
    with monkeypatch.context() as patch:
        patch.setattr(passages, "GROUP_ROWS", 8)
        with pytest.raises(ConfigError, match="or by another version of pyarrow"):
            make(copy)
    assert file_hashes(copy) == before
    make(copy)
    assert file_hashes(copy) == file_hashes(whole)


def test_passages_of_another_store_are_made_again(imported: tuple[Path, Any], tmp_path: Path) -> None:
    """Oracle: the whole store, after the command that made it."""
    whole, make = imported
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    other = import_other(tmp_path, tmp_path / "other", 1.0, "other")
    shutil.rmtree(copy / "passages")
    shutil.copytree(other.path / "passages", copy / "passages")
    with pytest.raises(StoreError, match=r"passages is of another store\. Run the command that made it"):
        ActivationStore(copy)
    make(copy)
    assert file_hashes(copy) == file_hashes(whole)


def test_norms_are_recorded_in_a_store_of_before_they_were(
    cached: tuple[Path, Any], imported: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the store as it is made today, file by file; no shard is computed again, and a site whose
    manifest is lost beside that is mended too."""
    monkeypatch.setattr(cache_run, "LanguageModel", None)
    for number, (whole, make) in enumerate((cached, imported)):
        old = forget_norms(ActivationStore(whole), tmp_path / str(number)).path
        assert problems(old) == []
        make(old)
        assert file_hashes(old) == file_hashes(whole)
    lost = forget_norms(ActivationStore(cached[0]), tmp_path / "lost").path
    (lost / "layers.1" / "manifest.json").unlink()
    cached[1](lost)
    assert file_hashes(lost) == file_hashes(cached[0])

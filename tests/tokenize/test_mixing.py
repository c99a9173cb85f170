"""Several sources: their shares, the end of a mix, a column of sources."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import call
from crashes import file_hashes
from hypothesis import given
from hypothesis import strategies as st
from packing import jsonl
from texts import random_texts

from saemill.common.config import build
from saemill.common.errors import ConfigError, DataError
from saemill.common.stores.token_writer import copy_rows
from saemill.common.stores.tokens import TokenStore
from saemill.show import describe
from saemill.tokenize import row_files
from saemill.tokenize.config import MixedDataset, TokenizeConfig
from saemill.tokenize.mixing import Document, Mix
from saemill.tokenize.named import named
from saemill.tokenize.run import run


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Files of 300 and of 200 documents."""
    folder = tmp_path_factory.mktemp("two")
    return (
        jsonl(folder / "a.jsonl", random_texts(300, seed=1)),
        jsonl(folder / "b.jsonl", random_texts(200, seed=2, words=90)),
    )


def mixed(two: tuple[Path, Path], out: Path, tokenizer: str, **values: Any) -> TokenStore:
    shares = values.pop("shares", (0.7, 0.3))
    mix = tuple(MixedDataset(dataset=str(file), share=s) for file, s in zip(two, shares, strict=True))
    values = {"ctx_len": 32, "held_out_fraction": 0.1} | values
    return run(TokenizeConfig(mix=mix, tokenizer=tokenizer, out=out, **values))


def test_a_mix_that_was_stopped_midway(
    two: tuple[Path, Path], tmp_path: Path, tokenizer_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the files of a run that nothing stopped, byte for byte."""
    monkeypatch.setattr(row_files, "SHARD_TOKENS", 320)
    whole = mixed(two, tmp_path / "whole", tokenizer_folder, max_tokens=6400)
    flush, calls = row_files.RowFiles._flush, list[int]()

    def stop_at_the_fifth(self: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        flush(self)

    with monkeypatch.context() as patch:
        patch.setattr(row_files.RowFiles, "_flush", stop_at_the_fifth)
        with pytest.raises(KeyboardInterrupt):
            mixed(two, tmp_path / "out", tokenizer_folder, max_tokens=6400)
    assert not (tmp_path / "out").exists()
    again = mixed(two, tmp_path / "out", tokenizer_folder, max_tokens=6400)
    assert file_hashes(again.path) == file_hashes(whole.path)


def test_shares_are_those_of_the_tokens(
    two: tuple[Path, Path], tmp_path: Path, tokenizer_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the tokens of each document, counted by its source; the bound that docs/text.md states."""
    store = mixed(two, tmp_path / "out", tokenizer_folder, max_tokens=6400)
    assert store.n_tokens == 6400
    counts, table = store.source_tokens, store.documents
    assert sum(counts.values()) == 6400
    longest = max(table["n_tokens"].to_pylist())
    assert abs(counts["a.jsonl"] - 0.7 * 6400) <= longest + 2 * 32
    addresses = np.arange(store.n_tokens)
    by_token = np.bincount(table["source"].to_numpy()[store.document_of(addresses)])
    assert by_token.tolist() == list(counts.values())
    texts = [random_texts(300, seed=1), random_texts(200, seed=2, words=90)]
    wanted = {f"{s}/{t[:9]}" for s, each in enumerate(texts) for t in each}
    assert all(
        f"{source}/{texts[source][index][:9]}" in wanted
        for source, index in zip(table["source"].to_pylist(), table["source_index"].to_pylist(), strict=True)
    )
    assert "Mixed: a.jsonl 70." in capsys.readouterr().out
    assert f"a.jsonl: {counts['a.jsonl']:,} tokens" in describe(store.path)
    copy = copy_rows(store, 20, tmp_path / "copy")
    assert sum(copy.source_tokens.values()) == 640


def test_a_mix_is_the_same_by_processes_and_from_a_stream(
    two: tuple[Path, Path], tmp_path: Path, tokenizer_folder: str
) -> None:
    """Oracle: the fingerprint of the store that one process makes of whole files; another seed's differs."""
    once = mixed(two, tmp_path / "a", tokenizer_folder, max_tokens=3200)
    assert mixed(two, tmp_path / "a", tokenizer_folder, max_tokens=3200).fingerprint == once.fingerprint
    stream = mixed(two, tmp_path / "b", tokenizer_folder, max_tokens=3200, streaming=True, num_proc=2)
    assert stream.fingerprint == once.fingerprint
    other = mixed(two, tmp_path / "c", tokenizer_folder, max_tokens=3200, shuffle_seed=1)
    assert other.fingerprint != once.fingerprint
    with pytest.raises(ConfigError, match=r"other settings:\n  mix"):
        mixed(two, tmp_path / "a", tokenizer_folder, max_tokens=3200, shares=(0.5, 0.5))


def test_a_mix_ends_with_the_source_whose_turn_it_is(
    two: tuple[Path, Path], tmp_path: Path, tokenizer_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the documents of the source that runs out, all of them in the store's count."""
    store = mixed(two, tmp_path / "out", tokenizer_folder, shares=(9, 1))
    assert "a.jsonl ran out after" in capsys.readouterr().out
    sources = store.documents["source"].to_numpy()
    assert 295 <= (sources == 0).sum() <= 300
    assert (sources == 1).sum() < 100


def test_a_column_names_the_sources(tmp_path: Path, tokenizer_folder: str) -> None:
    """Oracle: the column of the file, document by document."""
    texts = random_texts(120)
    names = [f"source {i % 3}" for i in range(120)]
    file = jsonl(tmp_path / "a.jsonl", texts, origin=names)

    def store(out: str, **values: Any) -> TokenStore:
        return run(
            TokenizeConfig(
                dataset=str(file), tokenizer=tokenizer_folder, out=tmp_path / out, ctx_len=32, **values
            )
        )

    found = store("out", source_column="origin").documents.to_pydict()
    sources = TokenStore(tmp_path / "out").manifest.sources
    assert set(sources) == set(names)
    for source, index in zip(found["source"], found["source_index"], strict=True):
        assert sources[source] == names[index]
    with pytest.raises(ConfigError, match="no column of sources 'orgin'; did you mean origin"):
        store("b", source_column="orgin")
    broken = jsonl(tmp_path / "b.jsonl", texts, origin=["x"] * 119 + [None])
    with pytest.raises(DataError, match=r"row 119 of .*names no source in its column origin"):
        run(
            TokenizeConfig(
                dataset=str(broken),
                tokenizer=tokenizer_folder,
                out=tmp_path / "c",
                ctx_len=32,
                source_column="origin",
            )
        )


def test_a_command_line_and_a_file_name_the_same_mix(
    two: tuple[Path, Path], tmp_path: Path, tokenizer_folder: str
) -> None:
    """Oracle: the store of the same settings in Python."""
    wanted = mixed(two, tmp_path / "a", tokenizer_folder, max_tokens=3200)
    shared = (
        "--tokenizer",
        tokenizer_folder,
        "--ctx-len",
        32,
        "--held-out-fraction",
        0.1,
        "--max-tokens",
        3200,
    )
    told = call("tokenize", f"{two[0]}:0.7", f"{two[1]}:0.3", *shared, "-o", tmp_path / "b")
    assert "of the tokens (70.00% asked), b.jsonl" in told
    listed = "".join(
        f"- {{dataset: {file}, share: {s}, name: {n}}}\n"
        for file, s, n in zip(two, (7, 3), "xy", strict=True)
    )
    (tmp_path / "mix.yaml").write_text(listed)
    call("tokenize", "--mix", tmp_path / "mix.yaml", *shared, "-o", tmp_path / "c")
    found = [TokenStore(tmp_path / name) for name in "bc"]
    assert [store.content for store in found] == [wanted.content] * 2
    assert found[1].manifest.sources == ("x", "y")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["a:0.7", "b"], "'b' has none: add it"),
        (["a:0.7"], "a share has no effect on one dataset"),
        (["a:1", "a:2"], "two datasets are called 'a'"),
        (["a:0", "b:1"], "share of a must be above 0"),
    ],
)
def test_shares_that_are_none(words: list[str], told: str) -> None:
    """Oracle: each message, which says what to write."""

    def made() -> TokenizeConfig:
        return build(TokenizeConfig, {**named(words, None), "tokenizer": "t", "out": "o"}, "tokenize")

    with pytest.raises(ConfigError, match=told):
        made()


def test_texts_and_rows_of_ids_do_not_mix(
    two: tuple[Path, Path], tmp_path: Path, tokenizer_folder: str
) -> None:
    """Oracle: a message that names the rows of ids."""
    ids = tmp_path / "ids.jsonl"
    ids.write_text('{"input_ids": [5, 6, 7]}\n' * 9)
    with pytest.raises(ConfigError, match=r"ids\.jsonl holds rows of ids, others texts"):
        mixed((two[0], ids), tmp_path / "out", tokenizer_folder)


LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=30)


@given(st.lists(st.tuples(LENGTHS, st.floats(0.01, 10)), min_size=2, max_size=4))
def test_every_source_is_within_a_document_of_its_share(sources: list[tuple[list[int], float]]) -> None:
    """Oracle: the definition, after every document: tokens per share differ by a document's at most."""

    def documents(number: int, lengths: list[int]) -> Iterator[Document]:
        return (Document(number, i, [0] * n) for i, n in enumerate(lengths))

    mix = Mix([documents(n, each) for n, (each, _) in enumerate(sources)], [share for _, share in sources])
    total_share = sum(mix.shares)
    taken: list[list[int]] = [[] for _ in sources]
    for document in mix:
        mix.n_tokens[document.source] += len(document.ids)
        taken[document.source].append(document.source_index)
        total = sum(mix.n_tokens)
        for n, share, (lengths, _) in zip(mix.n_tokens, mix.shares, sources, strict=True):
            assert n <= share / total_share * total + max(lengths)
    assert all(indices == list(range(len(indices))) for indices in taken)
    assert mix.ran_out is not None
    assert len(taken[mix.ran_out]) == len(sources[mix.ran_out][0])

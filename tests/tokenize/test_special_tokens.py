"""Special tokens: written out in a text, at the starts of rows and documents, between documents."""

from pathlib import Path
from typing import Any

import pytest
from packing import jsonl, tokenize, word_tokenizer

from saemill.common.errors import ConfigError, DataError
from saemill.common.models.tokenizer import load_tokenizer
from saemill.common.stores.tokens import TokenStore

TEXTS = ["one two <|endoftext|> three four five", *[f"plain words number {i}" for i in range(20)]]


def packed(folder: Path, tokenizer: str, **values: Any) -> TokenStore:
    file = jsonl(folder / "a.jsonl", TEXTS)
    return tokenize(file, folder / "out", tokenizer, **{"ctx_len": 8, "held_out_fraction": 0.0} | values)


@pytest.mark.parametrize(("rule", "splits"), [(None, True), ("text", True), ("special", False)])
def test_a_text_that_writes_one_out(
    tmp_path: Path,
    tokenizer_folder: str,
    gpt: Any,
    rule: Any,
    splits: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Oracle: transformers' own ids, with and without `split_special_tokens`."""
    store = packed(tmp_path, tokenizer_folder, special_tokens_in_text=rule)
    ids = []
    for text in TEXTS:
        ids += [*gpt(text, add_special_tokens=False, split_special_tokens=splits)["input_ids"], 0]
    assert store.rows(0, store.n_rows).reshape(-1).tolist() == ids[: store.n_tokens]
    assert store.manifest.n_special_documents == 1
    told = "read as plain text" if splits else "read as the token"
    assert f"1 document with a special token written out in the text: {told}" in capsys.readouterr().out


def test_one_that_is_refused(tmp_path: Path, tokenizer_folder: str) -> None:
    """Oracle: the row that writes it out; nothing is left at the output."""
    with pytest.raises(DataError, match=r"row 0 of .*writes out the special token '<\|endoftext\|>'"):
        packed(tmp_path, tokenizer_folder, special_tokens_in_text="refuse")
    assert not list(tmp_path.glob("out*"))


def test_a_tokenizer_that_cannot_read_it_as_text(tmp_path: Path) -> None:
    """Oracle: a vocabulary of whole words, which has the token as a word; by default it is the token."""
    words = {"<unk>": 0, "<eos>": 1, **{word: i for i, word in enumerate(["one", "two", "three", "four"], 2)}}
    tokenizer = word_tokenizer(tmp_path / "words", words)
    file = jsonl(tmp_path / "a.jsonl", ["one two <eos> three four one two"] * 4)
    with pytest.raises(ConfigError, match="makes a token of '<eos>' in plain text too; choose special"):
        tokenize(file, tmp_path / "out", tokenizer, ctx_len=8, special_tokens_in_text="text")
    store = tokenize(file, tmp_path / "out", tokenizer, ctx_len=8, held_out_fraction=0.0)
    assert store.rows(0, 1).tolist() == [[2, 3, 1, 4, 5, 2, 3, 1]]


def test_starts_and_separators(tmp_path: Path, tokenizer_folder: str, gpt: Any) -> None:
    """Oracle: naive packing: a row's first id, a document's first, one after it or none."""
    texts = [gpt(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in TEXTS]
    cases: list[tuple[dict[str, Any], list[int], list[int], list[int]]] = [
        ({"row_start": "bos"}, [0], [], [0]),
        ({"row_start": 7, "document_start": 9, "separator": None}, [7], [9], []),
        ({"separator": 11}, [], [], [11]),
    ]
    for number, (values, first, before, after) in enumerate(cases):
        store = packed(tmp_path / str(number), tokenizer_folder, **values)
        ids = [token for text in texts for token in (*before, *text, *after)]
        body = 8 - len(first)
        wanted = [[*first, *ids[i : i + body]] for i in range(0, len(ids) - body + 1, body)]
        assert store.rows(0, store.n_rows).tolist() == wanted
        n_kept = store.documents["n_tokens"].to_pylist()
        assert sum(n_kept) == store.n_tokens


def test_a_row_and_a_document_of_one_start(tmp_path: Path, tokenizer_folder: str) -> None:
    """Oracle: no row begins with the id twice, as in SAELens' pretokenizer."""
    store = packed(tmp_path, tokenizer_folder, row_start=7, document_start=7)
    rows = store.rows(0, store.n_rows).tolist()
    assert all(row[0] == 7 for row in rows)
    assert not any(row[:2] == [7, 7] for row in rows)
    assert any(7 in row[1:] for row in rows)


def test_tokens_that_there_are_not(tmp_path: Path, tokenizer_folder: str) -> None:
    """Oracle: each message."""
    with pytest.raises(ConfigError, match="separator sep: the tokenizer has no such token"):
        packed(tmp_path, tokenizer_folder, separator="sep")
    n_ids = load_tokenizer(tokenizer_folder, None)[1].vocab_size
    with pytest.raises(ConfigError, match=f"row_start must be an id of the tokenizer, got {n_ids}"):
        packed(tmp_path, tokenizer_folder, row_start=n_ids)
    ids = tmp_path / "ids.jsonl"
    ids.write_text('{"input_ids": [5, 6, 7, 8]}\n' * 9)
    for values in ({"separator": None}, {"special_tokens_in_text": "text"}):
        with pytest.raises(ConfigError, match="has no effect on rows"):
            tokenize(ids, tmp_path / "b", tokenizer_folder, **{"ctx_len": 4} | values)

"""Corpora of few documents: what is held out, and what is told where nothing can be."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from texts import random_texts

from saemill.common.errors import DataError
from saemill.common.stores.permutation import combine
from saemill.common.stores.tokens import TokenStore
from saemill.tokenize.config import TokenizeConfig
from saemill.tokenize.held_out import chosen_for_a_row, is_held_out, largest_fraction
from saemill.tokenize.run import run


def tokenize(folder: Path, texts: list[str], tokenizer: str, **values: Any) -> TokenStore:
    """A store of these texts, anew."""
    number = len(list(folder.glob("*.jsonl")))
    file = folder / f"{number}.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    values = {"ctx_len": 16} | values
    return run(TokenizeConfig(dataset=str(file), tokenizer=tokenizer, out=folder / f"out{number}", **values))


def rank(text: str) -> int:
    return combine(xxhash.xxh3_64_intdigest(text.encode()))


def never_held_out(n: int) -> list[str]:
    """Texts none of which is held out at 5%."""
    return [text for text in random_texts(4 * n, seed=5) if rank(text) > 2**64 // 10][:n]


def test_some_documents_are_held_out_of_a_small_corpus(
    tmp_path: Path, tokenizer_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the documents of the smallest hashes until they fill a row; the same again on a second try, in
    another order and from a stream."""
    texts = never_held_out(12)
    stores = [
        tokenize(tmp_path, texts, tokenizer_folder, **values)
        for values in ({}, {}, {"shuffle_seed": 7}, {"streaming": True}, {"num_proc": 1})
    ]
    assert "gave no held-out row: of the smallest hashes, 1 document more held out" in capsys.readouterr().out
    assert stores[0].fingerprint == stores[1].fingerprint
    for store in stores:
        table = store.documents.filter(store.documents["held_out"])
        held = [texts[i] for i in table["source_index"].to_pylist()]
        ordered = sorted(texts, key=rank)
        assert sorted(held, key=rank) == ordered[: len(held)]
        assert 1 <= store.held_out_R.sum() <= store.n_rows // 2
        assert f"({len(held)} of 12 documents, chosen by a hash of their text)" in store.how_held_out
    none = tokenize(tmp_path, texts, tokenizer_folder, held_out_fraction=0.0)
    assert none.held_out_R.sum() == 0


@pytest.mark.parametrize("max_tokens", [128, 200, 333])
def test_some_are_held_out_within_max_tokens(tmp_path: Path, tokenizer_folder: str, max_tokens: int) -> None:
    """Oracle: one held-out row at least among the rows that the limit allows."""
    store = tokenize(tmp_path, never_held_out(12), tokenizer_folder, max_tokens=max_tokens)
    assert store.n_rows == max_tokens // 16
    assert 1 <= store.held_out_R.sum() < store.n_rows


def test_where_no_row_can_be_held_out_it_is_told(
    tmp_path: Path, tokenizer_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: one long document and a short one, copies of one text, and one document: all are stored; the
    row length that the message names gives a held-out row."""
    long, short = never_held_out(200)[7] * 20, "green hills"
    store = tokenize(tmp_path, [long, short], tokenizer_folder, ctx_len=64)
    told = capsys.readouterr().out
    assert store.held_out_R.sum() == 0
    (longest,) = re.findall(r"Lower --ctx-len to (\d+) or less", told)
    assert tokenize(tmp_path, [long, short], tokenizer_folder, ctx_len=int(longest)).held_out_R.sum() > 0
    for texts in ([long], [long] * 5):
        assert tokenize(tmp_path, texts, tokenizer_folder, ctx_len=64).held_out_R.sum() == 0
        assert "No row is held out: no document can be spared" in capsys.readouterr().out


@pytest.mark.parametrize("n", [1, 2, 5])
def test_all_held_out_is_refused_with_a_fraction_that_works(
    tmp_path: Path, tokenizer_folder: str, n: int
) -> None:
    """Oracle: the fraction that the message names leaves a row to train on."""
    texts = [text for text in random_texts(400, seed=2) if rank(text) < 2**64 // 2][:n]
    with pytest.raises(DataError, match="nothing is left to train on") as caught:
        tokenize(tmp_path, texts, tokenizer_folder, held_out_fraction=0.9)
    (fraction,) = re.findall(r"lower --held-out-fraction to (\S+) or less", str(caught.value))
    store = tokenize(tmp_path, texts, tokenizer_folder, held_out_fraction=float(fraction))
    assert (~store.held_out_R).sum() > 0


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.9])
def test_too_little_text_names_a_row_length_that_works(
    tmp_path: Path, tokenizer_folder: str, fraction: float
) -> None:
    """Oracle: the settings that the message names make a store."""
    texts = never_held_out(2)
    with pytest.raises(DataError, match="too little text for one row of 256") as caught:
        tokenize(tmp_path, texts, tokenizer_folder, ctx_len=256, held_out_fraction=fraction)
    (longest,) = re.findall(r"lower --ctx-len to (\d+) or less", str(caught.value))
    fraction = 0.0 if "--held-out-fraction to 0" in str(caught.value) else fraction
    store = tokenize(tmp_path, texts, tokenizer_folder, ctx_len=int(longest), held_out_fraction=fraction)
    assert (~store.held_out_R).sum() > 0


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 60)), min_size=1, max_size=20), st.integers(1, 50)
)
def test_what_is_chosen(documents: list[tuple[int, int]], n_needed: int) -> None:
    """Oracle: the conditions themselves, counted here: half of the tokens and a row stay to train on."""
    chosen = chosen_for_a_row(documents, n_needed)
    held = sum(n for text_hash, n in documents if text_hash in chosen)
    total = sum(n for _, n in documents)
    lengths: dict[int, int] = {}
    for text_hash, n in documents:
        lengths[text_hash] = lengths.get(text_hash, 0) + n
    spare = min(total // 2, total - n_needed)
    assert held <= max(0, spare)
    assert bool(chosen) == any(n <= spare for n in lengths.values())
    if held < n_needed:
        assert len(chosen) <= 1


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(1, 60)), min_size=1), st.integers(1, 50))
def test_the_largest_fraction(documents: list[tuple[int, int]], n_needed: int) -> None:
    """Oracle: the tokens of documents that the fraction, and one a little larger, leave."""

    def left(fraction: float) -> int:
        return sum(n for text_hash, n in documents if not is_held_out(text_hash, fraction))

    fraction = largest_fraction(documents, n_needed)
    if left(0) < n_needed:
        assert fraction == 0
    else:
        assert left(fraction) >= n_needed > left(fraction + 0.002) or fraction + 0.002 >= 1


def test_odd_corpora(tmp_path: Path, tokenizer_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: counts by hand: copies, one huge document, empty ones, rows of one token, and separators that
    are written in a text, which are tokens of their own and end no document."""
    texts = never_held_out(6)
    copies = tokenize(tmp_path, texts * 3, tokenizer_folder)
    sides = copies.documents.to_pydict()
    by_text: dict[str, set[bool]] = {}
    for index, side in zip(sides["source_index"], sides["held_out"], strict=True):
        by_text.setdefault((texts * 3)[index], set()).add(side)
    assert all(len(found) == 1 for found in by_text.values()), "copies are on the same side"
    huge = tokenize(tmp_path, [texts[0] * 500, "", "  "], tokenizer_folder)
    assert (huge.manifest.n_documents, huge.manifest.n_empty_documents) == (1, 2)
    assert "from 1 document (2 more are empty)" in capsys.readouterr().out
    assert tokenize(tmp_path, texts, tokenizer_folder, ctx_len=1).ctx_len == 1
    with pytest.raises(DataError, match=r"has no text: 2 documents \(2 of them empty\)"):
        tokenize(tmp_path, ["", "\n"], tokenizer_folder)
    written = tokenize(tmp_path, ["green <|endoftext|> hills " * 9], tokenizer_folder, held_out_fraction=0)
    assert np.unique(written.document_of(np.arange(written.n_tokens))).tolist() == [0]

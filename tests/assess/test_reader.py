"""Addresses as text: pieces of whole characters, and a token between its neighbours."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import bert_tokenizer

from saemill.assess.firing import AROUND, Fires
from saemill.assess.reader import Pieces, Reader
from saemill.common.stores.activations import ActivationStore
from saemill.demo import MODEL


def pieces(folder: str) -> tuple[Pieces, Any]:
    tokens: Any = SimpleNamespace(tokenizer_folder=Path(folder))
    return Pieces(tokens), transformers.AutoTokenizer.from_pretrained(folder)


BYTE_LEVEL = pieces(str(MODEL))


@settings(max_examples=60)
@given(st.text(st.sampled_from("ab é漢👩‍🚀e\u0301\n\u202e\ufffd <>&"), min_size=1, max_size=12))
def test_pieces_of_bytes_are_the_text(text: str) -> None:
    """Oracle: the text that was tokenized; no character is cut, so its own U+FFFD are the only ones."""
    cut, tokenizer = BYTE_LEVEL
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = cut.of(ids)
    assert "".join(piece for _, piece in found) == text
    assert sum(n for n, _ in found) == len(ids)


def test_half_a_character_is_one_piece() -> None:
    """Oracle: the first byte of two: U+FFFD, as the tokenizer decodes it."""
    cut, tokenizer = BYTE_LEVEL
    (first, *_) = tokenizer.encode("漢", add_special_tokens=False)
    assert cut.of([first]) == [(1, tokenizer.decode([first]))]
    texts = [tokenizer.decode([number]) for number in range(len(tokenizer))]
    odd = next(number for number, text in enumerate(texts) if len(text) > 1 and text.endswith("\ufffd"))
    assert cut.of([odd, odd]) == [(1, texts[odd])] * 2


def test_words_of_wordpiece_keep_their_spaces(tmp_path: Path) -> None:
    """Oracle: the text; BERT's tokenizer has no spaces in its pieces, only marks where words go on."""
    cut, tokenizer = pieces(bert_tokenizer(tmp_path))
    ids = tokenizer.encode("the cats sat over", add_special_tokens=False)
    assert [piece for _, piece in cut.of(ids)] == [" the", " cat", "s", " sat", " over"]


def everywhere(row: int) -> Fires:
    """A latent that fires on all of a row, on each token one more than on that before."""
    addresses = row * 16 + np.arange(16)
    return Fires(0, addresses, np.arange(1, 17, dtype=np.float32), addresses.astype(np.uint64), 1, 16)


def test_a_context_is_the_text_around_the_address(store: ActivationStore) -> None:
    """Oracle: the tokenizer's decoding of the row, specials left out, cut at the document's start; each
    token's activation by its place in the row."""
    reader = Reader(store.tokens)
    tokenizer = transformers.AutoTokenizer.from_pretrained(store.tokens.tokenizer.name)
    for row in range(2, 12):
        for position in (0, 8, 15):
            ids = [int(i) for i in store.tokens.rows(row, row + 1)[0]]
            documents = store.tokens.document_of(row * 16 + np.arange(16))
            inside = [i for i in range(16) if documents[i] == documents[position]]
            inside = [i for i in inside if (ids[i] != 0 or i == position) and abs(i - position) <= AROUND]
            context = reader.context(everywhere(row), position)
            place: Any = context.place
            text = tokenizer.decode([ids[i] for i in inside])
            assert "".join(place.tokens).replace("\ufffd", "") == text.replace("\ufffd", "")
            if len(place.tokens) == len(inside):
                assert context.values == tuple(float(1 + i) for i in inside)
                assert context.activation == 1 + position
                assert place.tokens[place.at] in tokenizer.decode([ids[0], ids[position]])

"""Tokens that are whole words: letters alone, that neither continue a word nor are continued."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saemill.assess.reader import Pieces
from saemill.common.stores.tokens import TokenStore

LEAST_LETTERS = 2
JOINS = "'’"
"""Characters that make two tokens one word, as letters do."""


@dataclass(frozen=True, slots=True)
class Words:
    """Whole words of some rows."""

    addresses_N: NDArray[np.int64]
    """Ascending."""
    texts_N: NDArray[np.str_]
    """The words, without spaces."""


class Vocabulary:
    """What each token id is, as far as whole words go.

    Args:
        tokens: with the tokenizer.
    """

    def __init__(self, tokens: TokenStore) -> None:
        self._pieces = Pieces(tokens)
        n = tokens.tokenizer.vocab_size
        self._known_V = np.zeros(n, bool)
        self._begins_V, self._joins_V, self._goes_on_V = (np.zeros(n, bool) for _ in range(3))
        """Whether a token begins with a space; continues a word where it follows one; may be continued."""
        self._word_V = np.full(n, "", object)
        """The word that a token is, or an empty text."""

    def find(self, ids_RS: NDArray[np.int64], addresses_RS: NDArray[np.int64]) -> Words:
        """Find the whole words of rows; the last token of each, whose next is not there, is none.

        Args:
            ids_RS: whole rows.
            addresses_RS: of their tokens.
        """
        for number in np.unique(ids_RS)[~self._known_V[np.unique(ids_RS)]].tolist():
            self._learn(number)
        before_RS = np.zeros(ids_RS.shape, bool)
        before_RS[:, 1:] = ~self._goes_on_V[ids_RS[:, :-1]]
        after_RS = np.zeros(ids_RS.shape, bool)
        after_RS[:, :-1] = ~self._joins_V[ids_RS[:, 1:]]
        word_RS = self._word_V[ids_RS]
        whole_RS = (word_RS != "") & (self._begins_V[ids_RS] | before_RS) & after_RS
        return Words(addresses_RS[whole_RS], word_RS[whole_RS].astype(np.str_))

    def _learn(self, number: int) -> None:
        text = self._pieces.text(number)
        word = text.strip()
        self._known_V[number] = True
        self._begins_V[number] = text[:1].isspace()
        self._joins_V[number] = _joins(text[:1])
        self._goes_on_V[number] = _joins(text[-1:])
        if word.isalpha() and len(word) >= LEAST_LETTERS and not text[-1:].isspace():
            self._word_V[number] = word


def _joins(character: str) -> bool:
    return character.isalnum() or (bool(character) and character in JOINS)

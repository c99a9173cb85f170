"""Addresses as text: a token between its neighbours, or an embedded passage."""

from typing import Any

import numpy as np
import transformers

from saemill.assess.by_source import names_of
from saemill.assess.firing import AROUND, Fires
from saemill.common.hub import loading
from saemill.common.stores.features import Context, Passage, Snippet
from saemill.common.stores.passages import PassageStore
from saemill.common.stores.tokens import TokenStore

NO_CHARACTER = "\ufffd"
"""What stands in decoded text for bytes that are no character."""
MOST_TOKENS_PER_CHARACTER = 4


class Pieces:
    """Texts of token ids, spaces included, whichever way the tokenizer writes them.

    A tokenizer drops the space before the first word that it decodes; so each token is decoded behind
    another one, whose text is then cut off. Tokens that are parts of one character are decoded together.
    """

    def __init__(self, tokens: TokenStore) -> None:
        folder = str(tokens.tokenizer_folder)
        with loading("tokenizer", folder):
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self._before = self._tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._prefix = self._decode([])
        self._known: dict[tuple[int, ...], str] = {}

    def _decode(self, ids: list[int]) -> str:
        whole = self._tokenizer.decode([*self._before, *ids], clean_up_tokenization_spaces=False)
        return str(whole)

    def text(self, *ids: int) -> str:
        """Decode tokens that follow one another."""
        if ids not in self._known:
            whole = self._decode(list(ids))
            is_behind = whole.startswith(self._prefix)
            self._known[ids] = whole[len(self._prefix) :] if is_behind else self._tokenizer.decode(list(ids))
        return self._known[ids]

    def of(self, ids: list[int]) -> list[tuple[int, str]]:
        """Cut tokens into pieces of whole characters: how many tokens each is, and its text."""
        pieces, start = [], 0
        while start < len(ids):
            n, text = 1, self.text(ids[start])
            if NO_CHARACTER in text:
                n, text = self._whole(ids[start : start + MOST_TOKENS_PER_CHARACTER])
            pieces.append((n, text))
            start += n
        return pieces

    def _whole(self, ids: list[int]) -> tuple[int, str]:
        """Find the fewest tokens from the first on that are whole characters; where none are, the most that
        are one broken character, or U+FFFD itself."""
        tried = [(n, self.text(*ids[:n])) for n in range(1, len(ids) + 1)]
        broken = [(n, text) for n, text in tried if text == NO_CHARACTER] or tried[:1]
        return next((found for found in tried if NO_CHARACTER not in found[1]), broken[-1])


class Reader:
    """Reads tokens with the tokenizer that the token store carries."""

    def __init__(self, tokens: TokenStore) -> None:
        self.tokens, self.pieces = tokens, Pieces(tokens)
        self._special = set(tokens.tokenizer.special_ids)
        self._sources = names_of(tokens)

    def place(self, address: int) -> Snippet:
        """Show the token at an address with its neighbours in the same row and document."""
        return self._snippet(address)[0]

    def context(self, fires: Fires, at: int) -> Context:
        """Show a token at which a latent fires.

        Args:
            fires: the places where it does.
            at: which of them.
        """
        snippet, steps = self._snippet(int(fires.addresses_N[at]))
        around_A = fires.around(at).tolist()
        values = tuple(_rounded(_most([around_A[AROUND + step] for step in own])) for own in steps)
        return Context(activation=float(fires.acts_N[at]), values=values, place=snippet)

    def _snippet(self, address: int) -> tuple[Snippet, list[list[int]]]:
        """Read a token with its neighbours; and how far from it the tokens of each piece are."""
        ctx_len = self.tokens.ctx_len
        row, position = divmod(address, ctx_len)
        around = range(max(0, position - AROUND), min(ctx_len, position + AROUND + 1))
        ids = self.tokens.rows(row, row + 1)[0].tolist()
        documents = self.tokens.document_of(row * ctx_len + np.asarray(around)).tolist()
        document = documents[around.index(position)]
        inside = [at for at, own in zip(around, documents, strict=True) if own == document]
        shown = [at for at in inside if at == position or ids[at] not in self._special]
        texts, steps = [], []
        for n, text in self.pieces.of([ids[at] for at in shown]):
            texts.append(text)
            steps.append([at - position for at in shown[:n]])
            shown = shown[n:]
        snippet = Snippet(
            address=address,
            document=document,
            source=self._sources[document] if self._sources else None,
            tokens=tuple(texts),
            at=next(i for i, own in enumerate(steps) if 0 in own),
        )
        return snippet, steps


def _most(values: list[float]) -> float:
    """Return the number furthest from 0; a list of one is the rule."""
    return values[0] if len(values) == 1 else max(values, key=abs)


def _rounded(value: float) -> float:
    """Round to four significant digits: as many as are shown."""
    return float(f"{value:.4g}") if value else 0.0


class PassageReader:
    """Reads passages."""

    def __init__(self, passages: PassageStore) -> None:
        self.passages = passages

    def place(self, address: int) -> Passage:
        """Show the passage at an address, whole."""
        id_, text = self.passages.passage(address)
        return Passage(address=address, id=id_, text=text)

    def context(self, fires: Fires, at: int) -> Context:
        """Show a passage on which a latent fires."""
        place = self.place(int(fires.addresses_N[at]))
        return Context(activation=float(fires.acts_N[at]), values=(), place=place)


def reader_of(text: TokenStore | PassageStore) -> Reader | PassageReader:
    """Make the reader of a store."""
    return PassageReader(text) if isinstance(text, PassageStore) else Reader(text)

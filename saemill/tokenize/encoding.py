"""Documents become token ids, in this process or in several."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from typing import Any

from saemill.common.errors import ConfigError
from saemill.common.models.chat import ChatTemplate, Message, Span, WrittenOut
from saemill.common.models.special_tokens import Rule, WrittenSpecials
from saemill.common.models.tokenizer import load_tokenizer
from saemill.tokenize.source import Batch
from saemill.tokenize.words import words_at

OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Characters that no text has, put around a special token that a message writes out."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """How documents become ids; a process of its own makes its tokenizer from this."""

    tokenizer: str
    """Hub id or folder."""
    revision: str | None
    rule: Rule | None
    template: str | None
    """Chat template; None for the tokenizer's own."""
    has_chats: bool
    has_words: bool
    """Whether words of texts are labelled."""


class Encoder:
    """A tokenizer with what it does to special tokens in texts and to conversations.

    Raises:
        ConfigError: the tokenizer has no chat template for conversations, cannot read special tokens as
            text, or does not tell the characters of its tokens where they are needed.
    """

    def __init__(self, encoding: Encoding, tokenizer: Any) -> None:
        if (encoding.has_chats or encoding.has_words) and not tokenizer.is_fast:
            what = "conversations" if encoding.has_chats else "labels of words"
            raise ConfigError(
                f"the tokenizer {encoding.tokenizer!r} does not tell which characters a token is of, which "
                f"{what} need; name one with a tokenizer.json"
            )
        self.tokenizer = tokenizer
        self.specials = WrittenSpecials(tokenizer, encoding.rule)
        self.chat = ChatTemplate(tokenizer, encoding.template) if encoding.has_chats else None

    def __call__(self, batch: Batch) -> Batch:
        """Tokenize a batch: the same with its `input_ids`; of conversations also `texts` and `roles`, of
        labelled words `token_words`."""
        if batch.conversations is not None:
            return self._conversations(batch, batch.conversations)
        if batch.texts is None:
            return batch
        special = [self.specials.check(text, batch.where(place)) for place, text in enumerate(batch.texts)]
        as_text = any(special) and self.specials.rule == "text"
        if batch.words is None:
            ids = self._encoded(batch.texts, as_text)["input_ids"]
            return replace(batch, input_ids=ids, special=special)
        encoded = self._encoded(batch.texts, as_text, return_offsets_mapping=True)
        found = map(words_at, batch.words, encoded["offset_mapping"])
        return replace(batch, input_ids=encoded["input_ids"], special=special, token_words=list(found))

    def _encoded(self, text: str | list[str], as_text: bool, **options: Any) -> Any:
        """Tokenize; special tokens that are written out as plain text, or as the tokenizer does of itself."""
        split = {"split_special_tokens": True} if as_text else {}
        return self.tokenizer(text, add_special_tokens=False, verbose=False, **split, **options)

    def _conversations(self, batch: Batch, conversations: list[list[Message]]) -> Batch:
        texts, ids, roles, special = [], [], [], []
        for place, messages in enumerate(conversations):
            where = batch.where(place)
            special.append(any([self.specials.check(message["content"], where) for message in messages]))
            made = self._conversation(messages, where) if messages else ("", [], [])
            texts.append(made[0])
            ids.append(made[1])
            roles.append(made[2])
        return replace(batch, texts=texts, input_ids=ids, roles=roles, special=special)

    def _conversation(self, messages: list[Message], where: str) -> tuple[str, list[int], list[str | None]]:
        """Write a conversation out and tokenize it: its text, its ids, and each id's role."""
        assert self.chat is not None
        if self.specials.rule == "text":
            messages = [message | {"content": self._marked(message["content"])} for message in messages]
        written, literals = _unmarked(self.chat.write_out(messages, where))
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, stop, is_literal in literals:
            encoded = self._encoded(written.text[start:stop], is_literal, return_offsets_mapping=True)
            ids += encoded["input_ids"]
            offsets += [(start + first, start + last) for first, last in encoded["offset_mapping"]]
        return written.text, ids, _roles(offsets, written.spans)

    def _marked(self, text: str) -> str:
        """Put marks around special tokens that a message writes out."""
        return self.specials.pattern.sub(f"{OPEN}\\g<0>{CLOSE}", text)


def _unmarked(marked: WrittenOut) -> tuple[WrittenOut, list[tuple[int, int, bool]]]:
    """Take the marks out of a text.

    Returns: the conversation without them, and the pieces of its text, whether each was marked.
    """
    text, spans = marked.text, marked.spans
    if OPEN not in text:
        return marked, [(0, len(text), False)]
    pieces, start = [], 0
    for place, piece in enumerate(text.replace(CLOSE, OPEN).split(OPEN)):
        if piece:
            pieces.append((start, start + len(piece), place % 2 == 1))
        start += len(piece)
    n_marks = [0]
    for character in text:
        n_marks.append(n_marks[-1] + (character in (OPEN, CLOSE)))
    moved = [(start - n_marks[start], stop - n_marks[stop], role) for start, stop, role in spans]
    return WrittenOut(text.replace(OPEN, "").replace(CLOSE, ""), moved), pieces


def _roles(offsets: list[tuple[int, int]], spans: list[Span]) -> list[str | None]:
    """Find each token's role: that of the last message with a character of it; None where none has."""
    roles: list[str | None] = [None] * len(offsets)
    place = 0
    for start, stop, role in sorted(spans):
        while place and offsets[place - 1][1] > start:  # a token that the message before had a part of
            place -= 1
        while place < len(offsets) and offsets[place][0] < stop:
            if offsets[place][1] > start and offsets[place][0] < offsets[place][1]:
                roles[place] = role
            place += 1
    return roles


@dataclass(slots=True)
class Encoders:
    """Encoders of one process or of several, which read ahead by no more than two batches each."""

    encoding: Encoding
    here: Encoder
    num_proc: int
    pool: ProcessPoolExecutor | None = field(init=False, default=None)

    def __enter__(self) -> "Encoders":
        if self.num_proc > 1:
            self.pool = ProcessPoolExecutor(
                self.num_proc, get_context("spawn"), _load_in_worker, (self.encoding,)
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def encode(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Tokenize batches, in order; those of ids stay as they are."""
        if self.pool is None:
            yield from map(self.here, batches)
            return
        waiting: deque[Future[Batch]] = deque()
        for batch in batches:
            waiting.append(self.pool.submit(_encode_in_worker, batch))
            if len(waiting) > 2 * self.num_proc:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


_worker: dict[str, Encoder] = {}


def _load_in_worker(encoding: Encoding) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = load_tokenizer(encoding.tokenizer, encoding.revision)[0]
    _worker["encoder"] = Encoder(encoding, tokenizer)


def _encode_in_worker(batch: Batch) -> Batch:
    return _worker["encoder"](batch)

"""Labelled words as datasets hold them: lists of words and of their labels, checked, and found in the text.

Most corpora that are labelled word by word, in CoNLL's or Universal Dependencies' manner, have a column of
words and, as long as each of its lists, columns of labels.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from saemill.common.errors import DataError
from saemill.tokenize.columns import Column, LabelColumn, text_of

NO_LABEL = ("", "_")
"""Labels that stand for none; the second is CoNLL-U's."""
NO_CLASS = -1
"""Number that `datasets` gives to what is of no class."""


@dataclass(frozen=True, slots=True)
class LabelledWords:
    """A text with labels of its words."""

    text: str
    spans: list[tuple[int, int]]
    """Characters start..stop of each word, ascending."""
    labels: list[list[str | None]]
    """Of each column, the label of each word; None of a word without one."""


def words_of(example: dict[str, Any], column: Column, where: str) -> LabelledWords:
    """Read a row's words and labels, and find the words in its text; null is a row without words.

    Args:
        example: the row.
        column: its columns; where that of the text is that of the words, they are joined by spaces.
        where: the row, for messages.

    Raises:
        DataError: it holds no list of words, or not one label for each, or its text does not hold the words.
    """
    assert column.words is not None
    words = example[column.words]
    if words is None:
        words = []
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise DataError(
            f"{where} must have a list of words in its column {column.words}, got {words!r:.60}; mend or "
            "remove that row"
        )
    is_made_of_them = column.name == column.words
    text = text_of(" ".join(words) if is_made_of_them else example[column.name], where)
    labels = [_labels(example[each.name], each, len(words), where) for each in column.labels]
    return LabelledWords(text, _spans(text, words, where, column.words), labels)


def _labels(value: Any, column: LabelColumn, n_words: int, where: str) -> list[str | None]:
    """Read the labels of a row's words."""
    values = [] if value is None else value
    if not isinstance(values, list) or len(values) != n_words:
        got = f"{len(values)} labels" if isinstance(values, list) else f"{values!r:.60}"
        raise DataError(
            f"{where} has {n_words} words, but its column {column.name} has {got}; mend or remove that row"
        )
    return [_label(each, column, where) for each in values]


def _label(value: Any, column: LabelColumn, where: str) -> str | None:
    """Read a label: its name, or the number of its class."""
    if value is None or value in NO_LABEL or (column.classes is not None and value == NO_CLASS):
        return None
    if type(value) is int and column.classes is not None and 0 <= value < len(column.classes):
        value = column.classes[value]
        return None if value in NO_LABEL else value
    if type(value) not in (int, str) or column.classes is not None:
        raise DataError(
            f"{where} has no label in its column {column.name}, but {value!r:.60}: a label is a text or the "
            "number of a class; mend or remove that row"
        )
    return text_of(str(value), f"the column {column.name} of {where}")


def _spans(text: str, words: Sequence[str], where: str, column: str) -> list[tuple[int, int]]:
    """Find words in a text, one behind the other; no letter or digit may stand outside of them.

    Else a word might be found within one that is not listed, and each label after it be another word's; or a
    list that was cut short leave the end of its text without labels.
    """
    spans: list[tuple[int, int]] = []
    end = 0
    for number, word in enumerate(words):
        start = text.find(word, end)
        if start < 0 or any(map(str.isalnum, text[end:start])):
            raise DataError(
                f"{where}: its text goes on with {text[end:].lstrip()[:30]!r} where word {number} of its "
                f"column {column} is {word!r:.40}; mend or remove that row, or say --text-column {column}, "
                "which makes the words, joined by spaces, the text"
            )
        end = start + len(word)
        spans.append((start, end))
    if any(map(str.isalnum, text[end:])):
        raise DataError(
            f"{where}: its text goes on with {text[end:].lstrip()[:30]!r} behind the last word of its column "
            f"{column}; mend or remove that row, or say --text-column {column}: then the words, joined by "
            "spaces, are the text"
        )
    return spans


def words_at(words: LabelledWords, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Find the word of each token: the one that its first character lies in which is no white space.

    Args:
        words: with their places.
        offsets: characters start..stop of each token.

    Returns: the word's number for each; -1 of a token of none.
    """
    text, starts = words.text, [start for start, _ in words.spans]
    found = []
    for start, stop in offsets:
        first = next((place for place in range(start, stop) if not text[place].isspace()), None)
        number = -1 if first is None else bisect_right(starts, first) - 1
        found.append(number if number >= 0 and first is not None and first < words.spans[number][1] else -1)
    return found

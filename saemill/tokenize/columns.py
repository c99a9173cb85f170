"""The column that holds the documents: chosen by name, refused by type.

A document is a text, or a row of token ids of a dataset that is tokenized already. Nothing else is turned
into text: what Python writes for a list or a number is nobody's document.
"""

from dataclasses import dataclass, replace
from typing import Any

import datasets

from saemill.common import records
from saemill.common.config import nearest
from saemill.common.errors import ConfigError, DataError

IDS = ("input_ids", "tokens")
"""Columns that are tried where there is no column of texts."""
MASK = "attention_mask"
TEXT = "text"
"""Column of texts that is read by default."""
TEXTS = ("string", "large_string", "string_view", "null")
LISTS = (datasets.List, datasets.LargeList)
CHAT = "Read conversations with --chat-column {}"


@dataclass(frozen=True, slots=True)
class LabelColumn:
    """A column that holds a label of each word."""

    name: str
    classes: tuple[str, ...] | None
    """Names of the labels, where the dataset numbers them."""


@dataclass(frozen=True, slots=True)
class Column:
    """The column that holds the documents."""

    name: str
    holds_ids: bool
    """Whether its rows are token ids, not texts."""
    masked: bool
    """Whether an attention mask stands beside the ids."""
    holds_chats: bool = False
    """Whether its rows are conversations."""
    source: str | None = None
    """Column that names each document's source."""
    words: str | None = None
    """Column of each text's words; where it is also `name`, the words make the text."""
    labels: tuple[LabelColumn, ...] = ()
    """Columns that label these words."""

    @property
    def needed(self) -> list[str]:
        """Names of the columns that are read."""
        others = (
            MASK if self.masked else None,
            self.source,
            self.words,
            *(each.name for each in self.labels),
        )
        return list(dict.fromkeys([self.name, *(name for name in others if name)]))


def choose(
    features: Any,
    text_column: str,
    dataset: str,
    *,
    chat_column: str | None = None,
    source_column: str | None = None,
    words_column: str | None = None,
    word_labels: tuple[str, ...] = (),
) -> Column:
    """Choose the column of documents, and those beside it.

    Args:
        features: the columns' types, as `datasets` has them.
        text_column: the one to read; where it is absent, a column of token ids is read.
        dataset: its name, for messages.
        chat_column: one of conversations, to read in its place.
        source_column: one that names each document's source.
        words_column: one of lists of words. Where there is no column of texts, or this is named as that, the
            words make the texts.
        word_labels: those that label the words.

    Raises:
        ConfigError: there is no such column, or it holds something else.
    """
    if words_column is None:
        made = _of_documents(features, text_column, dataset, chat_column)
    else:
        made = _of_words(features, text_column, dataset, words_column, word_labels)
    if source_column is None:
        return made
    if source_column not in features or source_column == made.name:
        other = [name for name in features if name != made.name]
        raise ConfigError(
            f"{dataset} has no column of sources {source_column!r}; {nearest(source_column, other)}"
        )
    if not _may_be_text(features[source_column]):
        raise ConfigError(
            f"column {source_column!r} of {dataset} holds {_description(features[source_column])}, not the "
            "names of sources; name another with --source-column, or leave it out"
        )
    return replace(made, source=source_column)


def _of_documents(features: Any, text_column: str, dataset: str, chat_column: str | None) -> Column:
    if chat_column is not None:
        return _of_chats(features, chat_column, dataset)
    column = text_column if text_column in features else None
    column = column or next((name for name in IDS if name in features and _may_be_ids(features[name])), None)
    if column is None:
        chats = [name for name in features if _is_chat(features[name])]
        chat = f" {CHAT.format(chats[0])}." if chats else ""
        raise ConfigError(
            f"{dataset} has no column {text_column!r}; it has {', '.join(features)}. Name one with "
            f"--text-column.{chat}"
        )
    feature = features[column]
    holds_ids = _is_list_of(feature, "int") or (column in IDS and _may_be_ids(feature))
    if not holds_ids and not _may_be_text(feature):
        raise ConfigError(
            f"column {column!r} of {dataset} holds {_description(feature)}, not texts. "
            f"{_advice(features, column)}"
        )
    return Column(column, holds_ids, holds_ids and MASK in features)


def _of_chats(features: Any, chat_column: str, dataset: str) -> Column:
    """Choose the column of conversations."""
    if chat_column not in features:
        raise ConfigError(f"{dataset} has no column {chat_column!r}; {nearest(chat_column, features)}")
    feature = features[chat_column]
    messages = feature.feature if isinstance(feature, LISTS) else feature
    if not _is_chat(feature) and not isinstance(messages, datasets.Json):  # which leaves it to each row
        raise ConfigError(
            f"column {chat_column!r} of {dataset} holds {_description(feature)}, not conversations: lists of "
            "messages, each with role and content, or from and value. Name another with --chat-column"
        )
    return Column(chat_column, holds_ids=False, masked=False, holds_chats=True)


def _of_words(
    features: Any, text_column: str, dataset: str, words_column: str, word_labels: tuple[str, ...]
) -> Column:
    """Choose the columns of texts, of their words and of the words' labels."""
    for name in (words_column, *word_labels):
        if name not in features:
            raise ConfigError(f"{dataset} has no column {name!r}; {nearest(name, features)}")
        feature = features[name]
        kind = "any" if isinstance(feature, datasets.Json) else _kind_of_list(feature)
        if kind is None or (name == words_column and kind not in ("text", "any")):
            held, flag = ("words", "--words-column") if name == words_column else ("labels", "--word-labels")
            raise ConfigError(
                f"column {name!r} of {dataset} holds {_description(feature)}, not lists of {held}; name "
                f"another with {flag}"
            )
    labels = tuple(_label_column(features, name, dataset) for name in word_labels)
    if text_column == words_column or (text_column == TEXT and TEXT not in features):
        text_column = words_column
    elif text_column not in features or not _may_be_text(features[text_column]):
        raise ConfigError(
            f"{dataset} has no column of texts {text_column!r}; name one with --text-column, or say "
            f"--text-column {words_column}, which makes the words, joined by spaces, the text"
        )
    return Column(text_column, holds_ids=False, masked=False, words=words_column, labels=labels)


def _label_column(features: Any, name: str, dataset: str) -> LabelColumn:
    """Take a column of labels, whose name becomes an array's."""
    try:
        records.single(name)
    except ValueError:
        raise ConfigError(
            f"column {name!r} of {dataset} cannot be the name of an array; rename it in the dataset"
        ) from None
    return LabelColumn(name, _classes(features[name]))


def _kind_of_list(feature: Any) -> str | None:
    """Tell what a list holds: text, or number, of a class too; None of what is neither, or no list."""
    inner = feature.feature if isinstance(feature, LISTS) else None
    if isinstance(inner, datasets.Value) and inner.dtype in TEXTS:
        return "text"
    return "number" if isinstance(inner, datasets.ClassLabel) or _is_list_of(feature, "int") else None


def _classes(feature: Any) -> tuple[str, ...] | None:
    """List the names of a column's classes, if they are numbered."""
    inner = getattr(feature, "feature", None)
    return tuple(inner.names) if isinstance(inner, datasets.ClassLabel) else None


def text_of(value: Any, where: str) -> str:
    """Return a document's text; null is an empty one.

    Raises:
        DataError: it is no text, or none that UTF-8 can hold.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{where} holds no text, but {value!r:.60}; write it as text, or name another column with "
            "--text-column"
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where} holds half of a surrogate pair, which is no Unicode text; mend that row"
        ) from None
    return value


def _may_be_text(feature: Any) -> bool:
    """Tell whether the type is text, or one that leaves it to each value."""
    if isinstance(feature, datasets.Value):
        return feature.dtype in TEXTS
    return isinstance(feature, datasets.Json)


def _may_be_ids(feature: Any) -> bool:
    """Tell whether a column that is named as ids are may hold some. Each row is checked when it is read."""
    return not _may_be_text(feature) or isinstance(feature, datasets.Json)


def _is_list_of(feature: Any, kind: str) -> bool:
    """Tell whether the type is a list of numbers of a kind (`int`, `float`)."""
    inner = feature.feature if isinstance(feature, LISTS) else None
    return isinstance(inner, datasets.Value) and inner.dtype.removeprefix("u").startswith(kind)


def _description(feature: Any) -> str:
    """Describe what a column of this type holds."""
    if _is_chat(feature):
        return "chat messages"
    if isinstance(feature, LISTS):
        return f"lists of {_description(feature.feature)}"
    if isinstance(feature, dict):
        return f"groups of fields ({', '.join(feature)})"
    if isinstance(feature, datasets.ClassLabel):
        return "numbers of classes"
    if not isinstance(feature, datasets.Value):
        return f"values of the type {type(feature).__name__}"
    names = {"string": "texts", "bool": "true and false", "binary": "bytes", "large_binary": "bytes"}
    kind = feature.dtype
    if kind in names:
        return names[kind]
    dates = kind.startswith(("timestamp", "date", "time", "duration"))
    return f"dates ({kind})" if dates else f"numbers ({kind})"


def _is_chat(feature: Any) -> bool:
    inner = feature.feature if isinstance(feature, LISTS) else None
    return isinstance(inner, dict) and bool({"role", "from"} & set(inner))


def _advice(features: Any, column: str) -> str:
    """Advise what to do in place of a column that holds no texts."""
    if _is_chat(features[column]):
        return f"{CHAT.format(column)}."
    texts = [
        name
        for name, feature in features.items()
        if isinstance(feature, datasets.Value) and feature.dtype in TEXTS[:3]
    ]
    if texts:
        return f"Name a column of texts with --text-column: {', '.join(texts)}."
    return "It has no column of texts: write them into one, or give token ids in a column `input_ids`."

"""What is to be told of an example: labels that the corpus itself brings.

Of a word its capital, its ending, its length, its first letter, and what a column of the corpus calls it; of
a token of a chat whose message it is of; of a document its source.
"""

from dataclasses import dataclass
from string import ascii_lowercase

import numpy as np
from numpy.typing import NDArray

from saemill.assess.by_source import sources_of
from saemill.assess.evalset import EvalSet
from saemill.assess.probes.examples import TEST, TRAIN, VALIDATION, Examples
from saemill.common.log import counted
from saemill.common.stores import word_labels
from saemill.common.stores.tokens import TokenStore

SUFFIXES = ("ed", "ing", "ly", "s", "tion")
LONG = 7
"""Letters of a long word."""
MOST_SOURCES = 8
MOST_NAMES = 20
"""Most labels of a column that are probed for, the commonest."""
LEAST_GROUPS = {TRAIN: 10, VALIDATION: 3, TEST: 5}
"""Fewest groups, with and without the label, in each part."""
PARTS = {TRAIN: "fitted to", VALIDATION: "chosen by", TEST: "tried on"}


@dataclass(frozen=True, slots=True)
class Label:
    """A yes or no for each example."""

    name: str
    y_N: NDArray[np.bool_]
    missing: str | None = None
    """Why it cannot be probed for: too few groups have it, or have it not."""


def surface_labels(examples: Examples) -> list[Label]:
    """Label words by their surface; the type is the word without its capitals, so that a capital is seen on
    words that were never fitted to."""
    words = examples.words_N.tolist()
    labels = {"capitalised": [word[:1].isupper() for word in words]}
    labels |= {f"ends in -{end}": [_ends(word.casefold(), end) for word in words] for end in SUFFIXES}
    labels[f"{LONG} letters or more"] = [len(word) >= LONG for word in words]
    return [_label(name, np.array(y, bool), examples) for name, y in labels.items()]


def letter_labels(examples: Examples) -> list[Label]:
    """Label words by their first letter, a to z."""
    first_N = np.array([word[:1].casefold() for word in examples.words_N.tolist()], np.str_)
    return [_label(f"begins with {letter}", first_N == letter, examples) for letter in ascii_lowercase]


def column_labels(examples: Examples, tokens: TokenStore) -> list[Label]:
    """Label words as their column of the corpus does, one label against all others, the commonest first."""
    assert examples.column is not None
    if not len(examples.addresses_N):
        none = "it labels none of the words that are measured"
        return [Label(examples.column, np.zeros(0, bool), none)]
    number_N = word_labels.at(tokens.labels[examples.column], examples.addresses_N)
    numbers, counts = np.unique(number_N, return_counts=True)
    common = numbers[np.argsort(-counts, kind="stable")][:MOST_NAMES]
    names = next(each.names for each in tokens.manifest.labels if each.column == examples.column)
    return [
        _label(f"{examples.column} {names[number - 1]}", number_N == number, examples)
        for number in common.tolist()
    ]


def document_labels(examples: Examples, evalset: EvalSet) -> list[Label]:
    """Label tokens by the source of their document, the commonest sources first, and by the role of their
    message; none where there is one source and no chat."""
    labels = []
    sources = sources_of(evalset)
    if sources:
        source_N = np.array([sources[unit] for unit in evalset.units(examples.addresses_N).tolist()], np.str_)
        names, counts = np.unique(source_N, return_counts=True)
        common = names[np.argsort(-counts, kind="stable")][:MOST_SOURCES]
        labels += [_label(f"source {name}", source_N == name, examples) for name in common.tolist()]
    if isinstance(evalset.text, TokenStore) and evalset.text.manifest.roles:
        role_N = evalset.text.roles.at(examples.addresses_N)
        labels += [
            _label(f"role {name}", role_N == number, examples)
            for number, name in enumerate(evalset.text.manifest.roles, 1)
        ]
    return labels


def _ends(word: str, end: str) -> bool:
    """Tell whether a word has an ending behind two letters or more; -ss is not -s."""
    return word.endswith(end) and len(word) >= len(end) + 2 and not (end == "s" and word.endswith("ss"))


def _label(name: str, y_N: NDArray[np.bool_], examples: Examples) -> Label:
    for part, least in LEAST_GROUPS.items():
        for value, words in ((True, "with"), (False, "without")):
            here = (examples.part_N == part) & (y_N == value)
            n = len(np.unique(examples.group_N[here]))
            if n < least:
                what = counted(n, examples.split_by)
                return Label(
                    name, y_N, f"only {what} {words} it among those that are {PARTS[part]}; it needs {least}"
                )
    return Label(name, y_N)


def shuffled(label: Label, examples: Examples, seed: int) -> NDArray[np.bool_]:
    """Give each group the labels of another one of its part: what a probe makes of no meaning at all.

    Labels are moved group by group, so that one which had seen the groups before would still tell them. Of
    groups with several labels some may be lost; then other groups are drawn, until each part has both.
    """
    generator = np.random.default_rng(seed)
    y_N = label.y_N.copy()
    for part in (TRAIN, VALIDATION, TEST):
        here = np.flatnonzero(examples.part_N == part)
        here = here[np.argsort(examples.group_N[here], kind="stable")]
        drawn_N = _moved(label.y_N[here], examples.group_N[here], generator)
        while drawn_N.all() or not drawn_N.any():
            drawn_N = _moved(label.y_N[here], examples.group_N[here], generator)
        y_N[here] = drawn_N
    return y_N


def _moved(
    y_N: NDArray[np.bool_], group_N: NDArray[np.int64], generator: np.random.Generator
) -> NDArray[np.bool_]:
    """Move labels between groups, which are sorted; those of a smaller one are repeated."""
    _, first_G, n_G = np.unique(group_N, return_index=True, return_counts=True)
    pieces = np.split(y_N, first_G[1:])
    order = generator.permutation(len(pieces))
    return np.concatenate([np.resize(pieces[other], n) for other, n in zip(order, n_G, strict=True)])

"""The tokens that probes are fitted to and tried on, each in one part of three.

Parts share no group: no word type where labels are of words, no document where they are of documents. Split
by occurrence instead, a probe only has to remember the words: that lifts it far above what it knows of
others.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from saemill.assess.evalset import EvalSet
from saemill.assess.probes.words import Vocabulary
from saemill.common.stores import word_labels
from saemill.common.stores.permutation import hashed

SEED = 31
PER_WORD = 6
"""Most examples of a word type."""
PER_DOCUMENT = 64
"""Most examples of a document."""
TRAIN, VALIDATION, TEST = 0, 1, 2
ENDS = (0.5, 0.7)
"""Shares of the groups up to which they are fitted to, and chosen by; the others are tried on."""
SplitBy = Literal["word type", "document"]


@dataclass(frozen=True, slots=True)
class Examples:
    """Some tokens, or passages, by ascending address."""

    split_by: SplitBy
    addresses_N: NDArray[np.int64]
    group_N: NDArray[np.int64]
    """Number of each one's group, from 0 on."""
    part_N: NDArray[np.int64]
    """0 to fit, 1 to choose, 2 to try."""
    words_N: NDArray[np.str_]
    """The words; empty texts where groups are documents."""
    key_G: NDArray[np.uint64]
    """Hash of each group's word type, or of its document: the same among other examples."""
    column: str | None = None
    """Column of the corpus that labels each of them; None where the labels are not a column's."""

    @property
    def n_groups(self) -> int:
        """Count the groups."""
        return int(self.group_N.max(initial=-1)) + 1


def word_examples(
    evalset: EvalSet, vocabulary: Vocabulary, max_tokens: int, most: int, column: str | None = None
) -> Examples:
    """Choose whole words: at most `PER_WORD` of each type, which is the word in small letters.

    Args:
        evalset: the tokens.
        vocabulary: tells words.
        max_tokens: tokens that they are looked for in.
        most: most examples; beyond that types are left out, by a hash.
        column: words that this column of the corpus does not label are left out.
    """
    addresses, words = [], []
    for batch in evalset.batches(max_tokens):
        rows = np.unique(batch // evalset.tokens.ctx_len)
        ids_RS = np.concatenate([evalset.tokens.rows(row, row + 1) for row in rows]).astype(np.int64)
        addresses_RS = rows[:, None] * evalset.tokens.ctx_len + np.arange(evalset.tokens.ctx_len)
        found = vocabulary.find(ids_RS, addresses_RS)
        kept = np.isin(found.addresses_N, batch, assume_unique=True)
        if column is not None:
            kept &= word_labels.at(evalset.tokens.labels[column], found.addresses_N) > 0
        addresses.append(found.addresses_N[kept])
        words.append(found.texts_N[kept])
    address_N = np.concatenate([np.zeros(0, np.int64), *addresses])
    word_N = np.concatenate([np.zeros(0, np.str_), *words])
    types, type_N = np.unique([word.casefold() for word in word_N.tolist()], return_inverse=True)
    keys = np.array([xxhash.xxh3_64_intdigest(word.encode(), SEED) for word in types.tolist()], np.uint64)
    examples = _examples("word type", address_N, type_N, keys, word_N, PER_WORD, most)
    return replace(examples, column=column)


def document_examples(evalset: EvalSet, max_tokens: int, most: int) -> Examples:
    """Choose tokens, or passages: at most `PER_DOCUMENT` of each text; `most` as above."""
    address_N = np.concatenate([np.zeros(0, np.int64), *evalset.batches(max_tokens)])
    documents, group_N = np.unique(evalset.units(address_N), return_inverse=True)
    keys = hashed(documents.astype(np.uint64), SEED)
    return _examples("document", address_N, group_N, keys, np.full(len(address_N), ""), PER_DOCUMENT, most)


def _examples(
    split_by: SplitBy,
    address_N: NDArray[np.int64],
    group_N: NDArray[np.int64],
    key_G: NDArray[np.uint64],
    word_N: NDArray[np.str_],
    most_each: int,
    most: int,
) -> Examples:
    """Keep some of each group, drawn by a hash of their addresses, and as many groups as there is room
    for."""
    order = np.lexsort((hashed(address_N.astype(np.uint64), SEED), group_N))
    first_N = np.searchsorted(group_N[order], np.arange(len(key_G)))
    rank_N = np.arange(len(order)) - first_N[group_N[order]]
    order = order[rank_N < most_each]
    n_G = np.bincount(group_N[order], minlength=len(key_G))
    by_key = np.argsort(key_G, kind="stable")
    fits_G = np.zeros(len(key_G), bool)
    fits_G[by_key[np.cumsum(n_G[by_key]) <= most]] = True
    chosen = np.sort(order[fits_G[group_N[order]]])
    chosen = chosen[np.argsort(address_N[chosen], kind="stable")]
    groups, group = np.unique(group_N[chosen], return_inverse=True)
    # One hash chooses the groups, another their part.
    share_G = hashed(key_G, SEED + 1).astype(np.float64) / 2.0**64
    part_N = np.searchsorted(ENDS, share_G[group_N[chosen]], side="right")
    return Examples(split_by, address_N[chosen], group, part_N, word_N[chosen], key_G[groups])

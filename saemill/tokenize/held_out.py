"""Which documents are held out: a share of them by a hash, and a few more where that gives no row.

A document is held out where its hash, as a share of 2^64, is below the fraction: so the same text is on the
same side in every corpus. A small corpus may have no such document, or too little text in them for one row;
then more are held out, in the order of their hashes.
"""

import math
from collections import defaultdict
from collections.abc import Iterable

from saemill.common.stores.permutation import combine


def is_held_out(text_hash: int, fraction: float) -> bool:
    """Tell whether the fraction holds a document out."""
    return combine(text_hash) < fraction * 2**64


def chosen_for_a_row(documents: Iterable[tuple[int, int]], n_needed: int) -> frozenset[int]:
    """Choose hashes of documents to hold out so that they fill one row.

    Documents are chosen in the order of their hashes until they fill a row. A document is skipped if it would
    leave less than half of all tokens, or less than a row, to train on.

    Args:
        documents: (hash, number of tokens) of each; copies of a text go together.
        n_needed: tokens that fill a row.

    Returns: none where no document can be spared; where they do not fill a row, the first that can.
    """
    n_tokens: dict[int, int] = defaultdict(int)
    for text_hash, n in documents:
        n_tokens[text_hash] += n
    total = sum(n_tokens.values())
    n_spare = min(total // 2, total - n_needed)
    chosen, n_held = [], 0
    for text_hash in sorted(n_tokens, key=combine):
        if n_held >= n_needed:
            break
        if n_held + n_tokens[text_hash] <= n_spare:
            chosen.append(text_hash)
            n_held += n_tokens[text_hash]
    return frozenset(chosen if n_held >= n_needed else chosen[:1])


def largest_fraction(documents: Iterable[tuple[int, int]], n_needed: int) -> float:
    """Compute the largest fraction, rounded down, that leaves a row to train on; 0 where none does.

    Args:
        documents: (hash, number of tokens) of each.
        n_needed: tokens that fill a row.
    """
    n_left = 0
    for text_hash, n in sorted(documents, key=lambda document: combine(document[0]), reverse=True):
        n_left += n
        if n_left >= n_needed:
            return math.floor(combine(text_hash) / 2**64 * 1000) / 1000
    return 0.0

"""The k largest entries of each row, in loops that numba compiles.

Groups of entries are searched first, by their largest: the k-th largest of these is a lower bound of the k-th
largest entry, and few entries reach it.
"""

import numpy as np
from numba import njit
from torch import Tensor

from saemill.common.loops.kth import ALL_BITS, count, kth, nearly_kth
from saemill.common.loops.numbers import COMPILED, array, bits_of, float_of, wide

MOST_PER_GROUP = 16
GROUPS_PER_CODE = 8
"""Fewest groups for each of the k codes: of fewer, most would be searched."""
LANES = 128
"""Groups that are worked on together."""
MOST = np.int32(0x7E800000)
"""Bits of 2^126. Entries beyond it, infinity and NaN count as it: sums of two keys are finite."""


def largest(rows_TN: Tensor, idx_TK: Tensor) -> None:
    """Fill in the places of the k largest entries of each row, in no particular order; of equal ones some.

    Entries below 0 count as 0. Infinity and NaN are larger than all up to 2^126.

    Args:
        rows_TN: float32 or bfloat16.
        idx_TK: int64, filled with different places in each row.
    """
    _largest(array(rows_TN), array(idx_TK))


@njit(**COMPILED)
def _largest(rows, idx):
    n_entries, k = rows.shape[1], idx.shape[1]
    group = group_size(n_entries, k)
    maxima = np.zeros(-(-n_entries // (group * LANES)) * LANES, np.float32)
    candidates = np.empty(n_entries + len(maxima), np.int64)  # at its end the groups searched
    key, kept = np.empty(n_entries, np.float32), np.empty(k, np.float32)
    for t in range(len(rows)):
        if group > 1:
            _group_maxima(rows[t], group, maxima)
            least = nearly_kth(maxima, len(maxima), k, np.float32(0))
            n = _reaching(rows[t], group, maxima, least, candidates, key)
        else:
            n = _all(rows[t], candidates, key)
        keep(candidates, key, key, n, k, kept, idx[t])
        if kept[k - 1] == 0:
            _fill(rows[t], kept, idx[t])


@njit(**COMPILED)
def group_size(n_entries, k):
    """Choose the entries per group: more make fewer groups, but more of those searched hold nothing."""
    group = MOST_PER_GROUP
    while group > 1 and n_entries < GROUPS_PER_CODE * k * group:
        group //= 2
    return group


@njit(**COMPILED)
def _bits(number):
    """Return the bits of the float32 that an entry is ranked by, from 0 to `MOST`; as numbers they have the
    same order, and only maxima of integers are vectorised."""
    return min(max(np.int32(bits_of(wide(number))), np.int32(0)), MOST)


@njit(**COMPILED)
def _group_maxima(row, group, maxima):
    """Find the largest entry of each group. Its entries are LANES apart, so that a vector holds as many
    groups."""
    bits = maxima.view(np.int32)
    for first in range(0, len(row), group * LANES):
        most = bits[first // group : first // group + LANES]
        most[:] = 0
        for start in range(first, min(first + group * LANES, len(row)), LANES):
            here = row[start : start + LANES]
            for lane in range(len(here)):
                most[lane] = max(most[lane], _bits(here[lane]))


@njit(**COMPILED)
def _all(row, candidates, key):
    """List all entries, and what they are ranked by. Returns: how many."""
    for place in range(len(row)):
        candidates[place] = place
        key[place] = float_of(np.uint32(_bits(row[place])))
    return len(row)


@njit(**COMPILED)
def _reaching(row, group, maxima, least, candidates, key):
    """List the entries that are no less than `least`, and what they are ranked by. Returns: how many."""
    n, m, block = 0, 0, group * LANES
    groups = candidates[len(candidates) - len(maxima) :]
    for j in range(len(maxima)):  # no branch: which groups these are is hard to foretell
        groups[m] = j
        m += 1 if maxima[j] >= least else 0
    for i in range(m):
        first = groups[i] // LANES * block + groups[i] % LANES
        for place in range(first, min(first + block, len(row)), LANES):
            number = float_of(np.uint32(_bits(row[place])))
            candidates[n] = place
            key[n] = number
            n += 1 if number >= least else 0
    return n


@njit(**COMPILED)
def keep(candidates, key, exact, n, k, val, idx):
    """Keep the k largest of n keys above 0, with their exact values; of equal ones the first. Slots behind
    them are 0, of place 0."""
    low, high = kth(key, n, k, ALL_BITS)
    n_ties = k - count(key, n, high)
    m = 0
    for i in range(n):
        tied = key[i] < high
        if key[i] > 0 and key[i] >= low and m < k and (not tied or n_ties > 0):
            n_ties -= np.int64(tied)
            val[m] = exact[i]
            idx[m] = candidates[i]
            m += 1
    val[m:] = 0
    idx[m:] = 0


@njit(**COMPILED)
def _fill(row, kept, idx):
    """Fill slots that are not used with places of entries of 0 or less, which all others are."""
    place = 0
    for i in range(len(kept)):
        if kept[i] == 0:
            while _bits(row[place]) > 0:
                place += 1
            idx[i] = place
            place += 1

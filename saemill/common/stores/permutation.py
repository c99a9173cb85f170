"""Keyed permutations: every shuffle in saemill, computed from its key and never stored.

They are part of the on-disk format (rows are permuted inside a shard), so they are defined here by
arithmetic on 64-bit integers rather than by a library's generator, whose stream may change between
versions. A test pins the values.
"""

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mix(value: int) -> int:
    """Apply SplitMix64's finaliser (Steele, Lea and Flood 2014): a bijection of 64-bit integers."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def combine(*key: int) -> int:
    """Combine a sequence of integers into one 64-bit seed; order matters."""
    seed = 0
    for value in key:
        seed = mix(seed ^ mix(value & _MASK))
    return seed


def hashes(n: int, *key: int) -> NDArray[np.uint64]:
    """Compute `n` 64-bit hashes, number i being `mix(combine(key) + i)`.

    Returns: uint64 [n].
    """
    return hashed(np.arange(n, dtype=np.uint64), *key)


def hashed(values: NDArray[np.uint64], *key: int) -> NDArray[np.uint64]:
    """Hash each value, as `mix(combine(key) + value)`. uint64, of the same shape."""
    with np.errstate(over="ignore"):
        value = values + np.uint64(combine(*key)) + np.uint64(_GOLDEN)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


def permutation(n: int, *key: int) -> NDArray[np.int64]:
    """Compute the permutation of 0..n-1 that sorts `hashes(n, *key)`.

    Returns: int64 [n]; entry j is the element that comes to place j.
    """
    return np.argsort(hashes(n, *key), kind="stable")


def inverse(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Invert a permutation: entry i is the place to which element i came. int64 [n]."""
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    return places

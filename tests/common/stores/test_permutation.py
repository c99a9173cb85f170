"""Keyed permutations: their values are part of the on-disk format and must never change."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saemill.common.stores.permutation import combine, hashes, inverse, mix, permutation

TWO64 = 2**64
parts = st.integers(-(2**70), 2**70)
keys = st.lists(parts, max_size=4)


def splitmix64(state: int) -> int:
    """The first output of SplitMix64 seeded with `state`, in unbounded integers."""
    z = (state + 0x9E3779B97F4A7C15) % TWO64
    z = (z ^ (z // 2**30)) * 0xBF58476D1CE4E5B9 % TWO64
    z = (z ^ (z // 2**27)) * 0x94D049BB133111EB % TWO64
    return z ^ (z // 2**31)


def test_published_values() -> None:
    """Oracle: the first five outputs of SplitMix64 with seed 1234567, as published on Rosetta Code."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    states = [(1234567 + i * 0x9E3779B97F4A7C15) % TWO64 for i in range(5)]
    assert [mix(state) for state in states] == published
    assert [splitmix64(state) for state in states] == published


def test_pinned_values() -> None:
    """Oracle: values recorded when the format was made; stores on disk depend on them."""
    assert [mix(value) for value in (0, 1, TWO64 - 1)] == [
        16294208416658607535,
        10451216379200822465,
        16490336266968443936,
    ]
    assert combine() == 0
    assert combine(0) == 12035550249420947055
    assert combine(1, 2) == 15671754871817308195
    assert combine(2, 1) == 1759269079544140422
    assert combine(-1) == 6755974106381971767
    assert hashes(3).tolist() == [16294208416658607535, 10451216379200822465, 10905525725756348110]
    assert hashes(3, 42).tolist() == [7138415436909018950, 13151335708014940318, 15971753952969932961]
    assert permutation(10).tolist() == [3, 5, 7, 4, 1, 2, 8, 9, 6, 0]
    assert permutation(10, 42).tolist() == [3, 6, 8, 0, 4, 9, 7, 1, 2, 5]
    assert permutation(8, 7, 1).tolist() == [2, 5, 4, 6, 0, 1, 3, 7]
    assert permutation(1000, 42)[:5].tolist() == [21, 825, 658, 368, 555]


@given(st.integers(0, TWO64 - 1))
def test_mix_is_splitmix64(value: int) -> None:
    """Oracle: SplitMix64 in plain integers with division and remainder."""
    assert mix(value) == splitmix64(value)


@given(keys)
def test_combine_is_a_chain_of_mixes(key: list[int]) -> None:
    """Oracle: the definition, with SplitMix64 in plain integers."""
    seed = 0
    for part in key:
        seed = splitmix64(seed ^ splitmix64(part % TWO64))
    assert combine(*key) == seed


@given(st.integers(0, 300), keys)
def test_hashes_are_mixes(n: int, key: list[int]) -> None:
    """Oracle: number i is SplitMix64 of combine(key) + i, wrapped at 2^64."""
    found = hashes(n, *key)
    assert found.dtype == np.uint64
    assert found.tolist() == [splitmix64((combine(*key) + i) % TWO64) for i in range(n)]


@given(keys, parts, parts)
def test_combine_tells_last_parts_apart(key: list[int], first: int, second: int) -> None:
    """Oracle: every step is a bijection, so seeds are equal exactly where the parts are (mod 2^64)."""
    same = first % TWO64 == second % TWO64
    assert (combine(*key, first) == combine(*key, second)) is same


@given(st.integers(0, 3000), keys)
def test_permutation_is_a_bijection_that_sorts(n: int, key: list[int]) -> None:
    """Oracle: the places 0..n-1 occur once each, and the hashes ascend along them."""
    order = permutation(n, *key)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))
    assert np.all(np.diff(hashes(n, *key)[order].astype(object)) > 0)


@given(st.permutations(range(50)), st.integers(0, 500), keys)
def test_inverse(any_order: list[int], n: int, key: list[int]) -> None:
    """Oracle: going there and back is the identity, both ways."""
    for order in (np.array(any_order), permutation(n, *key)):
        back = inverse(order)
        assert back.dtype == order.dtype
        assert np.array_equal(order[back], np.arange(len(order)))
        assert np.array_equal(back[order], np.arange(len(order)))


@given(st.lists(keys, min_size=2, max_size=2, unique_by=lambda key: tuple(part % TWO64 for part in key)))
def test_other_keys_other_orders(two: list[list[int]]) -> None:
    """Oracle: two random orders of 200 are equal with probability 1/200!, so never."""
    first, second = (permutation(200, *key) for key in two)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("key", [(), (0,), (1,), (42, 7)])
def test_permutation_mixes(key: tuple[int, ...]) -> None:
    """Oracle: for a random order of n = 10,000 the mean of |place - element| is n / 3 with a standard
    deviation of √(2n / 45) (Spearman's footrule); five of them are allowed."""
    n = 10_000
    distance = np.abs(permutation(n, *key) - np.arange(n)).mean()
    assert abs(distance - n / 3) < 5 * np.sqrt(2 * n / 45)

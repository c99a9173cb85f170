"""The k-th largest of some float32 numbers, 0 or more, by bisection: a count per step, which vectorises."""

import numpy as np
from numba import njit

from saemill.common.loops.numbers import COMPILED, bits_of, float_of, largest

ALL_BITS = np.uint32(0xFFFFFFFF)
BFLOAT16_BITS = np.uint32(0xFFFF0000)
STEPS = 9
"""Bisection steps for a bound that need not be sharp."""


@njit(**COMPILED)
def count(numbers, n, bound):
    """Count which of the first n numbers reach the bound. In float32, exact up to 2^24, since numba would
    make integers 64 bits wide."""
    total = np.float32(0)
    for i in range(n):
        total += np.float32(1) if numbers[i] >= bound else np.float32(0)
    return total


@njit(**COMPILED)
def nearly_kth(numbers, n, k, low):
    """Find a bound that k of the first n numbers reach, close below the k-th largest; `low` if fewer reach
    it."""
    high = max(low, largest(numbers, n))
    for _ in range(STEPS):
        middle = (low + high) * np.float32(0.5)
        if count(numbers, n, middle) >= k:
            low = middle
        else:
            high = middle
    return low


@njit(**COMPILED)
def kth(numbers, n, k, mask):
    """Find bounds (low, high) around the k-th largest of n numbers; 0 stands for those below it.

    Fewer than k reach `high`. Just k reach `low`, or it is 0, or between the two lies one number, which
    several entries share. `mask` has the bits that the numbers may use: fewer are searched sooner.
    """
    low, high = np.float32(0), float_of((bits_of(largest(numbers, n)) | ~mask) + np.uint32(1))
    n_low = count(numbers, n, low)
    while n_low > k:
        middle = float_of(bits_of((low + high) * np.float32(0.5)) & mask)
        if not low < middle < high:
            break
        n_middle = count(numbers, n, middle)
        if n_middle >= k:
            low, n_low = middle, n_middle
        else:
            high = middle
    return low, high

"""How well explanations tell where latents fire: balanced accuracy, with intervals."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from saemill.assess.sums import Bootstrap, Ratio
from saemill.common.stores.assessments import Figure

Z = 1.959963984540054
"""Quantile of the normal distribution for 95%."""


def balanced_accuracy(fires: Sequence[bool], said: Sequence[bool | None]) -> Figure:
    """Compute the mean of the shares of firing and of silent contexts that were told right.

    The interval is the one of Agresti and Caffo (2000) for two shares, each with one context more that was
    told right and one that was told wrong: with a few contexts of each it holds the true figure as often as
    it says, or more often. Contexts whose answer could not be read do not count.

    Args:
        fires: of each context whether the latent fires in it.
        said: what was said of it; None where the answer could not be read.
    """
    value = middle = variance = 0.0
    for side, word in ((True, "firing"), (False, "silent")):
        right = [
            told == side
            for is_firing, told in zip(fires, said, strict=True)
            if is_firing == side and told is not None
        ]
        if not right:
            why = "no answer on one could be read" if side in fires else "there is none in other documents"
            return Figure(value=None, reason=f"no {word} context was judged: {why}")
        value += sum(right) / len(right) / 2
        n = len(right) + 2
        share = (sum(right) + 1) / n
        middle, variance = middle + share / 2, variance + share * (1 - share) / n / 4
    half = Z * math.sqrt(variance)
    return Figure(value=value, lo=max(0.0, middle - half), hi=min(1.0, middle + half))


class Means(NamedTuple):
    """Means over latents."""

    score: Figure
    """Of how well their explanations tell where they fire."""
    shuffled: Figure
    """The same by another latent's explanation."""
    difference: Figure
    """Of the difference, over the latents that have both."""


def means(pairs: Sequence[tuple[Figure, Figure]]) -> Means:
    """Compute the means over latents of their scores by their own explanations and by others'."""
    values = [(own.value, other.value) for own, other in pairs]
    both = [(own, other) for own, other in values if isinstance(own, float) and isinstance(other, float)]
    return Means(
        mean([own for own, _ in values if isinstance(own, float)]),
        mean([other for _, other in values if isinstance(other, float)]),
        mean([own - other for own, other in both]),
    )


def mean(values: Sequence[float]) -> Figure:
    """Compute the mean over latents; its interval resamples latents, where they are enough for that."""
    above = np.array(values, np.float64)
    figure = Bootstrap(np.ones(len(above), bool), "latent").figure(
        Ratio(above, np.ones(len(above)), "no latent has a score")
    )
    return Figure(**figure)

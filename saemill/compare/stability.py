"""How stable latents are: in how many of the SAEs that differ in the seed alone each is found again.

A latent is found in another SAE where the two are each other's nearest and more similar than the threshold
(Paulo and Belrose 2025, arXiv 2501.16615, with mutual nearest latents in place of an assignment). Latents
that every seed finds are a matter of the text and the model; of others a single seed shows a choice of many.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from saemill.compare.dictionaries import Dictionary, differing
from saemill.compare.matching import Side
from saemill.compare.pair import Matched

Pair = tuple[Dictionary, Dictionary, Matched]


@dataclass(frozen=True, slots=True)
class Stability:
    """One SAE's latents beside the SAEs of other seeds."""

    name: str
    numbers_F: NDArray[np.int64]
    """Latents that were compared, by their numbers."""
    found_F: NDArray[np.int64]
    """Number of other seeds in which each is found."""
    similarity_F: NDArray[np.float64]
    """Mean similarity to the nearest latents of other seeds."""
    n_others: int
    by_chance: float
    """Share of latents that are found in a random dictionary in place of another seed."""

    def entry(self) -> dict[str, Any]:
        """Summarise it for comparison.json: `found_in` counts latents by the number of seeds, from 0."""
        return {
            "dictionary": self.name,
            "n_others": self.n_others,
            "n_latents": len(self.found_F),
            "found_in": np.bincount(self.found_F, minlength=self.n_others + 1).tolist(),
            "by_chance": self.by_chance,
        }

    def table(self) -> pa.Table:
        """Tabulate a row per latent."""
        n = len(self.numbers_F)
        return pa.table(
            {
                "dictionary": pa.array([self.name] * n).dictionary_encode(),
                "latent": self.numbers_F,
                "n_others": np.full(n, self.n_others),
                "found_in": self.found_F,
                "mean_similarity": self.similarity_F,
            }
        )


def stabilities(pairs: Sequence[Pair], threshold: float) -> list[Stability]:
    """Find how stable the latents of each SAE are; none of one that no other differs from in the seed alone.

    Args:
        pairs: all pairs, matched.
        threshold: similarity from which on mutual nearest latents are the same.
    """
    sides: dict[str, list[tuple[NDArray[np.int64], Side, float]]] = {}
    for a, b, matched in pairs:
        if differing(a, b) != ["seed"]:
            continue
        chance = list(matched.chance.values())[-1]
        for of, own, by_chance in zip((matched.a, matched.b), matched.sides, chance, strict=True):
            share = float(_found(by_chance, threshold).mean())
            sides.setdefault(of.name, []).append((of.numbers, own, share))
    return [
        Stability(
            name=name,
            numbers_F=each[0][0],
            found_F=np.sum([_found(side, threshold) for _, side, _ in each], axis=0, dtype=np.int64),
            similarity_F=np.mean([side.nearest_similarity for _, side, _ in each], axis=0, dtype=np.float64),
            n_others=len(each),
            by_chance=float(np.mean([share for *_, share in each])),
        )
        for name, each in sides.items()
    ]


def _found(side: Side, threshold: float) -> NDArray[np.bool_]:
    """Tell which latents are found in the other SAE. bool [F]."""
    found: NDArray[np.bool_] = side.mutual & (side.nearest_similarity > threshold)
    return found

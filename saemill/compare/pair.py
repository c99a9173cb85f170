"""One pair of dictionaries: matched, beside what matches by chance, and summed up."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from saemill.compare.matching import Blocks, Side, match

THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(6, 20))
"""Thresholds of the curve of shared latents: 0.3, 0.35, …, 0.95."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
EDGES = np.linspace(-1, 1, 41)
"""Edges of the histograms' bins."""


@dataclass(frozen=True, slots=True)
class Latents:
    """The latents of a dictionary that are compared, by their numbers in it."""

    name: str
    numbers: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Matched:
    """A pair matched."""

    a: Latents
    b: Latents
    sides: tuple[Side, Side]
    chance: Mapping[str, tuple[Side, Side]]
    """The same with a random dictionary in place of B, by its kind."""

    @classmethod
    def of(
        cls, a: Latents, b: Latents, blocks: Blocks, chance: Mapping[str, Blocks], assign: bool
    ) -> "Matched":
        """Match a pair.

        Args:
            blocks: similarities of A and B.
            chance: those of A and a random dictionary in place of B, by its kind.
            assign: find the one-to-one assignment too.
        """
        n_a, n_b = len(a.numbers), len(b.numbers)
        by_chance = {kind: match(random, n_a, n_b, assign) for kind, random in chance.items()}
        return cls(a, b, match(blocks, n_a, n_b, assign), by_chance)

    def entry(self, threshold: float) -> dict[str, Any]:
        """Summarise the pair for comparison.json."""
        result = _figures(self.sides, threshold)
        chance = {kind: _figures(sides, threshold) for kind, sides in self.chance.items()}
        return {
            "a": self.a.name,
            "b": self.b.name,
            "n_latents": [len(self.a.numbers), len(self.b.numbers)],
            **result,
            "chance": chance,
            "mean_max_adjusted": [
                {kind: _adjusted(value, figures["mean_max"][i]) for kind, figures in chance.items()}
                for i, value in enumerate(result["mean_max"])
            ],
        }

    def table(self) -> pa.Table:
        """Tabulate a row per latent of either dictionary: its nearest in the other, and its match."""
        directions = ((self.a, self.b, self.sides[0]), (self.b, self.a, self.sides[1]))
        return pa.concat_tables([_rows(own, other, side) for own, other, side in directions])


def _adjusted(value: float, by_chance: float) -> float | None:
    """Rescale a similarity to 0 for chance and 1 for the same dictionary; None where chance matches all."""
    return (value - by_chance) / (1 - by_chance) if by_chance < 1 else None


def _figures(sides: tuple[Side, Side], threshold: float) -> dict[str, Any]:
    """Summarise a matching; shares are of the smaller set."""
    smaller = min(sides, key=lambda side: len(side.nearest))
    mutual = smaller.nearest_similarity[smaller.mutual]
    n = len(smaller.nearest)
    return {
        "mean_max": [float(side.nearest_similarity.mean()) for side in sides],
        "mutual_nearest": {
            "share": len(mutual) / n,
            "share_above": float((mutual > threshold).sum() / n),
            **_distribution(mutual, n),
        },
        "nearest": [_distribution(side.nearest_similarity, len(side.nearest)) for side in sides],
        "assignment": _assigned(smaller.match_similarity, threshold),
    }


def _assigned(similarity: NDArray[np.float32] | None, threshold: float) -> dict[str, Any] | None:
    if similarity is None:
        return None
    return {
        "mean": float(similarity.mean()),
        "share_above": float((similarity > threshold).mean()),
        **_distribution(similarity, len(similarity)),
    }


def _distribution(similarity: NDArray[np.float32], n: int) -> dict[str, Any]:
    """Compute quantiles, a histogram over `EDGES`, and the share of n latents above each of `THRESHOLDS`."""
    at = QUANTILES if len(similarity) else ()
    return {
        "quantiles": {str(q): float(np.quantile(similarity, q)) for q in at},
        "histogram": np.histogram(similarity, EDGES)[0].tolist(),
        "shares": {str(t): float((similarity > t).sum() / n) for t in THRESHOLDS},
    }


def _rows(own: Latents, other: Latents, side: Side) -> pa.Table:
    n = len(own.numbers)
    columns: dict[str, Any] = {
        "dictionary": pa.array([own.name] * n).dictionary_encode(),
        "other": pa.array([other.name] * n).dictionary_encode(),
        "latent": own.numbers,
        "nearest": other.numbers[side.nearest],
        "nearest_similarity": side.nearest_similarity,
        "mutual": side.mutual,
    }
    if side.match is not None and side.match_similarity is not None:
        none = side.match < 0
        columns["match"] = pa.array(other.numbers[side.match], mask=none)
        columns["match_similarity"] = pa.array(side.match_similarity, mask=none)
    return pa.table(columns)

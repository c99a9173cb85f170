"""Statistics of a site as its records hold them: numbers in JSON, float64 vectors in base64."""

from typing import Annotated

import numpy as np
import torch
from pydantic import AfterValidator, Field

from saemill.common.records import Count, Positive, Record, decode_array, encode_array
from saemill.common.stores.norms import N_BINS, NormSketch
from saemill.common.stores.statistics import Moments, Statistics


def _finite(text: str) -> str:
    if not np.isfinite(decode_array(text, "f8")).all():
        raise ValueError("holds NaN or infinity")
    return text


Doubles = Annotated[str, AfterValidator(_finite)]
"""Finite float64 values in base64."""
Distances = dict[int, Count]
"""Counts as in `Statistics.distances`."""
Lengths = dict[Annotated[int, Field(ge=0, lt=N_BINS)], Positive]
"""Counts as in `NormSketch.counts`."""


def check_lengths(width: int, *vectors: str) -> None:
    """Refuse vectors of another length than a site's width.

    Raises:
        ValueError: one is.
    """
    for vector in vectors:
        if (n_values := len(decode_array(vector, "f8"))) != width:
            raise ValueError(f"a vector has {n_values:,} values, expected {width:,}")


class SiteStatistics(Record):
    """Moments over the training positions, by the store's own mask."""

    n_tokens: Positive
    mean: Doubles
    variance: Doubles
    mean_squared_norm: Annotated[float, Field(ge=0)]
    distances: Distances
    lengths: Lengths | None = None
    """Counts by norm. None where a shard was recorded before saemill kept norms."""

    @classmethod
    def of(cls, moments: Moments, sketch: NormSketch | None) -> "SiteStatistics":
        """Make the record of some moments, and of the same rows' norms if those are known.

        Raises:
            StoreError: no row was counted.
        """
        return cls.of_statistics(moments.statistics(), sketch)

    @classmethod
    def of_statistics(cls, statistics: Statistics, sketch: NormSketch | None = None) -> "SiteStatistics":
        """Make the record of some statistics, and of the same rows' norms if those are known."""
        return cls(
            n_tokens=statistics.n_tokens,
            mean=encode_array(np.asarray(statistics.mean_D)),
            variance=encode_array(np.asarray(statistics.variance_D)),
            mean_squared_norm=statistics.mean_squared_norm,
            distances=dict(statistics.distances),
            lengths=sketch.counts if sketch else None,
        )

    def statistics(self) -> Statistics:
        """Return the statistics that were recorded."""
        mean_D, variance_D = (
            torch.from_numpy(decode_array(text, "f8").copy()) for text in (self.mean, self.variance)
        )
        return Statistics(self.n_tokens, mean_D, variance_D, self.mean_squared_norm, self.distances)

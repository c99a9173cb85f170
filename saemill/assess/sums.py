"""Per-document sums, from which every figure and its interval follow.

Tokens of one document are not independent, so intervals come from resampling documents (Poisson
bootstrap, 2,000 draws, percentiles), numerator and denominator together; two variants are compared
on the same draws.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saemill.common.log import counted
from saemill.common.world import Group

N_DRAWS = 2000
LEAST_DOCUMENTS = 30
SEED = 20

Figure = dict[str, Any]
"""`value`, `lo`, `hi` (95%), or `value: null` with a `reason`."""


@dataclass(slots=True)
class DocumentSums:
    """Named sums per document; documents appear as they are met."""

    names: list[str]
    rows: dict[int, NDArray[np.float64]] = field(default_factory=dict)

    def add(self, units_T: NDArray[Any], columns: dict[str, Any]) -> None:
        """Add per-token values. units_T: each token's document; columns: name → float array [T]."""
        documents, group = np.unique(units_T, return_inverse=True)
        for name, values in columns.items():
            sums = np.bincount(group, np.asarray(values, np.float64), len(documents))
            place = self.names.index(name)
            for document, value in zip(documents.tolist(), sums, strict=True):
                row = self.rows.get(document)
                if row is None:
                    row = self.rows[document] = np.zeros(len(self.names))
                row[place] += value

    def merge(self, everyone: Group) -> None:
        """Add up the sums of all processes; a document that one of them has alone keeps its bits."""
        parts, self.rows = everyone.share(self.rows), {}
        for part in parts:
            for document, row in part.items():
                known = self.rows.get(document)
                self.rows[document] = row if known is None else known + row

    def column(self, name: str) -> NDArray[np.float64]:
        """One sum for every document, in ascending order of document. [n_documents]."""
        place = self.names.index(name)
        return np.array([self.rows[document][place] for document in sorted(self.rows)])


class Bootstrap:
    """Draws of documents, the same for every figure of one assessment.

    Args:
        n_documents: how many there are.
    """

    def __init__(self, n_documents: int) -> None:
        self.n_documents = n_documents
        self.enough = n_documents >= LEAST_DOCUMENTS
        generator = np.random.default_rng(SEED)
        shape = (N_DRAWS, n_documents if self.enough else 0)
        self.weights = generator.poisson(1.0, shape).astype(np.float32)

    def draws(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        """The resampled totals of one column. [2000]."""
        return np.asarray(self.weights @ sums, np.float64)

    def figure(self, value: float, draws: NDArray[np.float64]) -> Figure:
        """A value with its 95% interval, or with the reason for which there is none."""
        if not np.isfinite(value):
            return absent("not finite on these tokens")
        if not self.enough:
            reason = f"only {counted(self.n_documents, 'document')}; an interval needs {LEAST_DOCUMENTS}"
            return {"value": value, "lo": None, "hi": None, "reason": reason}
        lo, hi = np.nanpercentile(draws, [2.5, 97.5])
        return {"value": value, "lo": float(lo), "hi": float(hi)}

    def ratio(self, numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> Figure:
        """Σ numerator / Σ denominator over documents."""
        value = float(numerator.sum() / denominator.sum())
        if not self.enough:
            return self.figure(value, np.zeros(0))
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.figure(value, self.draws(numerator) / self.draws(denominator))


def absent(reason: str) -> Figure:
    """A figure that was not or could not be computed."""
    return {"value": None, "reason": reason}

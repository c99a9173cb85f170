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

Ratio = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Numerator and denominator per document, [n_documents] each."""


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
        return np.array([self.rows[document][place] for document in self.documents])

    @property
    def documents(self) -> list[int]:
        """All documents, ascending."""
        return sorted(self.rows)


class Bootstrap:
    """Draws of documents, the same for every figure of one assessment.

    Args:
        among: bool [n_documents], the documents that count.
    """

    def __init__(self, among: NDArray[np.bool_]) -> None:
        self.among, self.n_documents = among, int(among.sum())
        self.enough = self.n_documents >= LEAST_DOCUMENTS
        generator = np.random.default_rng(SEED)
        shape = (N_DRAWS, self.n_documents if self.enough else 0)
        self.weights = generator.poisson(1.0, shape).astype(np.float32)

    def _figure(self, value: float, draws: NDArray[np.float64]) -> Figure:
        """A value with its 95% interval, or with the reason for which there is none."""
        if not np.isfinite(value):
            return absent("not finite on these tokens")
        if not self.enough:
            reason = f"only {counted(self.n_documents, 'document')}; an interval needs {LEAST_DOCUMENTS}"
            return {"value": value, "lo": None, "hi": None, "reason": reason}
        lo, hi = np.nanpercentile(draws, [2.5, 97.5])
        return {"value": value, "lo": float(lo), "hi": float(hi)}

    def ratio(self, numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> Figure:
        """Σ numerator / Σ denominator over documents. [n_documents] each."""
        above, below = numerator[self.among], denominator[self.among]
        with np.errstate(invalid="ignore", divide="ignore"):
            draws = (self.weights @ above) / (self.weights @ below) if self.enough else np.zeros(0)
            return self._figure(float(above.sum() / below.sum()), draws)

    def figures(self, ratios: dict[str, Ratio]) -> dict[str, Figure]:
        """Each of some named ratios."""
        return {name: self.ratio(*ratio) for name, ratio in ratios.items()}


class Split:
    """Some documents, in one half of which the best variant is chosen and in the other reported.

    What is chosen for its figures looks better on the same documents than it is. A bit of the text's
    hash tells the halves; where one would be empty, both are all documents.

    Args:
        documents: their text hashes, ascending.
    """

    def __init__(self, documents: list[int]) -> None:
        odd = np.array(documents, np.uint64) % 2 == 1
        self.overlap = bool(odd.all() or not odd.any())
        self.chosen_on = odd | self.overlap
        self.all, self.reported_on = Bootstrap(odd | True), Bootstrap(~odd | self.overlap)

    def loss(self, ratio: Ratio) -> float:
        """Σ numerator / Σ denominator over the documents on which the best is chosen."""
        above, below = (float(column[self.chosen_on].sum()) for column in ratio)
        return above / below if below else np.inf


def absent(reason: str) -> Figure:
    """A figure that was not or could not be computed."""
    return {"value": None, "reason": reason}

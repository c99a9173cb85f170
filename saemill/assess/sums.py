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
NOT_FINITE = "a value of it is not finite"

Figure = dict[str, Any]
"""`value`, `lo`, `hi` (95%), or `value: null` with a `reason`."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """A figure as Σ above / Σ below over documents. It is defined where the sum below is positive."""

    above: NDArray[np.float64]
    """[n_documents]."""
    below: NDArray[np.float64]
    """[n_documents]."""
    undefined: str = "there is nothing to divide by"
    """Why there is no figure where the sum below is 0 or less."""


@dataclass(slots=True)
class DocumentSums:
    """Named sums per document, in the order in which documents come."""

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
        gathered, self.rows = everyone.all_gather_objects(self.rows), {}
        for rows in gathered:
            for document, row in rows.items():
                known = self.rows.get(document)
                self.rows[document] = row if known is None else known + row

    def only(self, names: list[str]) -> "DocumentSums":
        """Keep some of the sums, in this order."""
        places = [self.names.index(name) for name in names]
        return DocumentSums(names, {document: row[places] for document, row in self.rows.items()})

    def concat(self, other: "DocumentSums") -> "DocumentSums":
        """Join these sums with the other's, which are of the same documents."""
        rows = {document: np.concatenate([row, other.rows[document]]) for document, row in self.rows.items()}
        return DocumentSums(self.names + other.names, rows)

    def column(self, name: str) -> NDArray[np.float64]:
        """Return one sum for every document, in ascending order of document. [n_documents]."""
        place = self.names.index(name)
        return np.array([self.rows[document][place] for document in self.documents])

    @property
    def documents(self) -> list[int]:
        """List all documents, ascending."""
        return sorted(self.rows)


class Bootstrap:
    """Draws of documents, the same for every figure of one assessment.

    Args:
        among: bool [n_documents], the documents that count.
        noun: what messages call a document.
    """

    def __init__(self, among: NDArray[np.bool_], noun: str = "document") -> None:
        self.among, self.n_documents, self.noun = among, int(among.sum()), noun
        self.enough = self.n_documents >= LEAST_DOCUMENTS
        generator = np.random.default_rng(SEED)
        shape = (N_DRAWS, self.n_documents if self.enough else 0)
        self.weights = generator.poisson(1.0, shape).astype(np.float32)

    def figure(self, ratio: Ratio) -> Figure:
        """Compute Σ above / Σ below over the documents, with its 95% interval. Where it has no meaning it is
        null or without an interval: never NaN, nor what rounding makes of 0 / 0."""
        above, below = ratio.above[self.among], ratio.below[self.among]
        total_above, total_below = float(above.sum()), float(below.sum())
        if not (np.isfinite(total_above) and np.isfinite(total_below)):
            return absent(NOT_FINITE)
        if total_below <= 0:
            return absent(ratio.undefined)
        value = total_above / total_below
        if not self.enough:
            reason = f"only {counted(self.n_documents, self.noun)}; an interval needs {LEAST_DOCUMENTS}"
            return {"value": value, "lo": None, "hi": None, "reason": reason}
        drawn_above, drawn_below = self.weights @ above, self.weights @ below
        if n_undefined := int((drawn_below <= 0).sum()):
            reason = f"in {n_undefined:,} of {N_DRAWS:,} draws of {self.noun}s {ratio.undefined}"
            return {"value": value, "lo": None, "hi": None, "reason": reason}
        lo, hi = np.percentile(drawn_above / drawn_below, [2.5, 97.5])
        return {"value": value, "lo": float(lo), "hi": float(hi)}

    def figures(self, ratios: dict[str, Ratio]) -> dict[str, Figure]:
        """Compute each of some named ratios."""
        return {name: self.figure(ratio) for name, ratio in ratios.items()}


class Split:
    """Some documents, in one half of which the best variant is chosen and in the other reported.

    A variant chosen for its figures looks better on the same documents than it is. A bit of the text's
    hash separates the halves; where one would be empty, both are all documents.

    Args:
        documents: their text hashes, ascending.
        noun: what messages call a document.
    """

    def __init__(self, documents: list[int], noun: str = "document") -> None:
        odd = np.array(documents, np.uint64) % 2 == 1
        self.overlap = bool(odd.all() or not odd.any())
        self.chosen_on = odd | self.overlap
        self.all = Bootstrap(odd | True, noun)
        self.reported_on = Bootstrap(~odd | self.overlap, noun)

    def loss(self, ratio: Ratio) -> float:
        """Compute Σ above / Σ below over the documents on which the best is chosen; infinite where
        undefined."""
        above, below = (float(column[self.chosen_on].sum()) for column in (ratio.above, ratio.below))
        return above / below if below > 0 and np.isfinite(above) else np.inf


def absent(reason: str) -> Figure:
    """Return a figure that was not or could not be computed."""
    return {"value": None, "reason": reason}


def number(figure: Figure, digits: int = 3) -> str:
    """Format a figure's value, or an en dash."""
    value = figure["value"]
    if value is None:
        return "–"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.{digits}f}"

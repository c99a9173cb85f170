"""Figures per source: the same sums, over the documents of one source at a time."""

import numpy as np

from saemill.assess.evalset import EvalSet
from saemill.assess.reconstruction import Reconstruction
from saemill.assess.splicing import Splicing
from saemill.assess.sums import Bootstrap, DocumentSums, Figure, Ratio, absent
from saemill.common.stores.passages import PassageStore
from saemill.common.stores.tokens import TokenStore

NOT_MEASURED = "no document of it is among those measured"


class BySource:
    """What each SAE's figures are on the documents of each source; of one source there is nothing to tell.

    Args:
        reconstruction: what was measured.
        splicing: the losses, or why there are none.
        noun: what messages call a document.
    """

    def __init__(self, reconstruction: Reconstruction, splicing: Splicing | str, noun: str) -> None:
        self.reconstruction, self.splicing = reconstruction, splicing
        known = sources_of(reconstruction.evalset)
        self.draws = _draws(known, reconstruction.sums, noun)
        self.model_draws = {} if isinstance(splicing, str) else _draws(known, splicing.sums, noun)

    def figures(self, name: str) -> dict[str, dict[str, Figure]]:
        """Compute FVU, L0 and ΔCE of one SAE by source."""
        unusable = self.reconstruction.unusable(name)
        found = {}
        for source, draws in self.draws.items():
            ratios = self.reconstruction.ratios(name)
            metrics = {what: _figure(draws, ratios[what]) for what in ("fvu", "l0")}
            metrics["delta_ce"] = self._delta_ce(name, source)
            found[source] = dict.fromkeys(metrics, absent(unusable)) if unusable else metrics
        return found

    def _delta_ce(self, name: str, source: str) -> Figure:
        if isinstance(self.splicing, str):
            return absent(self.splicing)
        draws = self.model_draws[source]
        return self.splicing.metrics(name, draws)["delta_ce"] if draws.n_documents else absent(NOT_MEASURED)


def sources_of(evalset: EvalSet) -> dict[int, str]:
    """Map each document's text hash to the name of its source, the first of a text that several have; empty
    where documents are of one source."""
    text = evalset.text
    names: dict[int, str] = {}
    if text.manifest.sources:
        for text_hash, source in zip(text.documents["text_hash"].to_pylist(), names_of(text), strict=True):
            names.setdefault(text_hash, source)
    return names


def names_of(tokens: TokenStore | PassageStore) -> list[str]:
    """List the name of each document's source; empty where documents are of one source."""
    names = tokens.manifest.sources
    return [names[number] for number in tokens.documents["source"].to_pylist()] if names else []


def _draws(known: dict[int, str], sums: DocumentSums, noun: str) -> dict[str, Bootstrap]:
    """Make the draws of each source's documents, in the order in which sources are first found."""
    of_each = np.array([known[document] for document in sums.documents] if known else [], np.str_)
    names = dict.fromkeys(known.values())
    return {str(name): Bootstrap(of_each == name, noun) for name in names}


def _figure(draws: Bootstrap, ratio: Ratio) -> Figure:
    return draws.figure(ratio) if draws.n_documents else absent(NOT_MEASURED)

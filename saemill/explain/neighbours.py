"""Places where a latent is silent and one much like it fires: what an explanation is hard to tell by.

Places drawn at random are easy to tell from those where a latent fires, since few of them are anything like
these. Where a latent with a similar decoder row fires, the text often is (Delphi's `neighbours`, Paulo et al.
2024, arXiv 2410.13928). The firings of all latents concerned are found in one pass over the cache's first
tokens.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from saemill.assess.evalset import EvalSet
from saemill.assess.firing import AROUND, Fires, Firing
from saemill.assess.reader import reader_of
from saemill.common.sae.sae import Sae
from saemill.common.stores.features import Latent
from saemill.explain.silent import Case

SEARCHED_TOKENS = 100_000
"""Tokens, or passages, in which places are looked for."""


class Neighbours:
    """Where latents and those with the most similar decoder rows fire.

    Args:
        sae: the SAE.
        evalset: where activations and texts come from.
        latents: those to be explained.
    """

    def __init__(self, sae: Sae, evalset: EvalSet, latents: Sequence[Latent]) -> None:
        numbers = {near.latent for latent in latents for near in latent.nearest}
        every = sorted(numbers | {latent.latent for latent in latents})
        self._firing = Firing(sae, every, evalset).run(evalset.context_chunks(SEARCHED_TOKENS))
        self._reader, self._ctx_len = reader_of(evalset.text), evalset.text.ctx_len
        self._last_row = int(self._firing.addresses_T.max(initial=0)) // self._ctx_len
        """Row that may have been searched in part."""

    def of(self, latent: Latent, taken: set[int], n: int) -> list[Case]:
        """Choose places where a latent is silent and one of those nearest to it fires, the same number of
        each as far as there are so many.

        Args:
            latent: the latent.
            taken: documents that are used already, by the hashes of their texts; those of the places are
                added.
            n: most places; of each document one.
        """
        own = self._firing.of(latent.latent)
        firing = {near.latent: self._firing.of(near.latent) for near in latent.nearest}
        places = [
            (rank, number, at)
            for number, fires in firing.items()
            for rank, at in enumerate(self._where_silent(own, fires).tolist())
        ]
        cases: list[Case] = []
        for _, number, at in sorted(places, key=lambda place: place[0]):
            document = int(firing[number].documents_N[at])
            if len(cases) < n and document not in taken:
                taken.add(document)
                place = self._reader.place(int(firing[number].addresses_N[at]))
                cases.append(Case(place, fires=False, neighbour=number))
        return cases

    def _where_silent(self, own: Fires, near: Fires) -> NDArray[np.int64]:
        """Sample the firings of a neighbour around which, at the tokens that are shown, the latent does not
        fire. Indices, in random order."""
        sampled = near.sampled()
        addresses_N = near.addresses_N[sampled]
        row_N = addresses_N // self._ctx_len
        first_N = np.maximum(addresses_N - AROUND, row_N * self._ctx_len)
        last_N = np.minimum(addresses_N + AROUND, (row_N + 1) * self._ctx_len - 1)
        n_own_N = np.searchsorted(own.addresses_N, last_N, "right") - np.searchsorted(
            own.addresses_N, first_N
        )
        was_searched_N = row_N < self._last_row
        chosen: NDArray[np.int64] = sampled[(n_own_N == 0) & was_searched_N]
        return chosen

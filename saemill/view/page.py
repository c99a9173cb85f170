"""The page with every latent at hand: what is on it, and what it asks for."""

from functools import cached_property
from threading import RLock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saemill.assess.features import Describer
from saemill.assess.reader import PassageReader
from saemill.assess.report.latents import page_of
from saemill.assess.report.page import Live, live_page
from saemill.common.errors import ConfigError
from saemill.common.stores.explanations import Explanations
from saemill.common.stores.features import Features

LEAST_SHARE = 0.1
"""Least share of a latent's activation on the tokens of a word for the word to find it."""


class LivePage:
    """The page of an assessment whose latents are described when they are asked for.

    Args:
        describer: of all latents of the SAE.
        features: the latents that are on the page from the beginning.
        explained: what a language model said of latents, if one was asked.
    """

    def __init__(self, describer: Describer, features: Features, explained: Explanations | None) -> None:
        self._describer, self._features, self._explained = describer, features, explained
        self._said = {each.latent: each for each in explained.latents} if explained else {}
        self._lock = RLock()

    @property
    def n_latents(self) -> int:
        """Number of latents of the SAE."""
        return self._describer.sae.config.num_latents

    def html(self, assessment: dict[str, Any], densities: dict[str, Any], live: Live, most_bytes: int) -> str:
        """Render the page as it is at first.

        Args:
            assessment: the content of `final_assessment.json`.
            densities: variant → share of tokens on which each latent fired, [F].
            live: what can be asked.
            most_bytes: size from which on latents are left out; the search finds them.
        """
        return live_page(assessment, self._features, densities, self._explained, most_bytes, live)

    def latent(self, number: int) -> str:
        """Render a latent.

        Raises:
            ConfigError: there is none of this number.
        """
        self.check(number)
        with self._lock:
            (latent,) = self._describer.latents([number])
            return page_of(latent, self._features, self._said.get(number))

    def largest(self, number: int) -> float:
        """Return the largest activation of a latent; 0 where it never fires."""
        self.check(number)
        return self._describer.firing.of(number).largest

    def check(self, number: int) -> None:
        """Refuse the number of no latent.

        Raises:
            ConfigError: it is.
        """
        if not 0 <= number < self.n_latents:
            raise ConfigError(f"there are latents 0 to {self.n_latents - 1}, got {number}")

    def find(self, word: str) -> list[int]:
        """Find the latents with a tenth or more of their activation on a word, that with the largest share
        first.

        A token counts that is the word but for spaces and capitals; where there is none, every token that
        contains it; a passage counts that contains it.
        """
        with self._lock:
            share_F = self._describer.firing.share_on(self._with(word.strip().lower()))
        order = np.argsort(-share_F, kind="stable")
        return [int(latent) for latent in order if share_F[latent] >= LEAST_SHARE]

    def _with(self, word: str) -> NDArray[np.bool_]:
        """Choose the searched tokens that are a word, or contain it. [T]"""
        texts, place_T = self._texts
        is_it = np.array([text.strip() == word for text in texts], bool)
        return (is_it if is_it.any() else np.array([word in text for text in texts], bool))[place_T]

    @cached_property
    def _texts(self) -> tuple[list[str], NDArray[np.int64]]:
        """The different texts of what was searched, in small letters, and which each token is. [T]"""
        reader, addresses_T = self._describer.reader, self._describer.firing.addresses_T
        if isinstance(reader, PassageReader):
            texts = [(reader.place(address).text or "").lower() for address in addresses_T.tolist()]
            return texts, np.arange(len(texts))
        ctx_len = reader.tokens.ctx_len
        rows_R, row_T = np.unique(addresses_T // ctx_len, return_inverse=True)
        ids_RS = [reader.tokens.rows(row, row + 1)[0] for row in rows_R.tolist()]
        ids_T = np.array(ids_RS)[row_T, addresses_T % ctx_len] if ids_RS else addresses_T
        ids, place_T = np.unique(ids_T, return_inverse=True)
        return [reader.pieces.text(number).lower() for number in ids.tolist()], place_T

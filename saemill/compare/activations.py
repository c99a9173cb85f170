"""What latents do on the same tokens: their codes, and correlations of these."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray

from saemill.common.errors import ConfigError
from saemill.common.sae.sae import Sae
from saemill.common.stores.activations import ActivationStore, keep_locally
from saemill.compare.dictionaries import Dictionary
from saemill.compare.matching import BLOCK_ROWS, Blocks

ROWS_AT_ONCE = 4096
"""Tokens encoded at once."""
MIN_FIRINGS = 10
"""A latent active on fewer of the tokens is not compared: its correlations would be chance."""


@dataclass(frozen=True, slots=True)
class Codes:
    """The codes of one SAE on some tokens."""

    acts_TF: scipy.sparse.csr_array
    """float64, 0 where a latent is not active."""

    @property
    def live(self) -> NDArray[np.int64]:
        """List latents active on `MIN_FIRINGS` tokens or more."""
        firings_F = np.bincount(self.acts_TF.indices, minlength=self.acts_TF.shape[1])
        return np.flatnonzero(firings_F >= MIN_FIRINGS)

    def standardised(self, latents: NDArray[np.int64]) -> "Columns":
        """Return some latents' codes with what their correlations need."""
        acts_TL = scipy.sparse.csc_array(self.acts_TF)[:, latents]
        n = acts_TL.shape[0]
        mean_L = np.asarray(acts_TL.sum(0)).ravel() / n
        squares_L = np.asarray((acts_TL * acts_TL).sum(0)).ravel() / n
        return Columns(acts_TL, mean_L, np.sqrt(np.maximum(squares_L - mean_L**2, np.finfo(float).tiny)))

    def shifted(self) -> "Codes":
        """Shift the codes by half of the tokens: as dense, and unrelated to the codes of the same tokens."""
        half = self.acts_TF.shape[0] // 2
        return Codes(scipy.sparse.csr_array(scipy.sparse.vstack([self.acts_TF[half:], self.acts_TF[:half]])))


@dataclass(frozen=True, slots=True)
class Columns:
    """Some latents' codes [T, L], their means and standard deviations."""

    acts_TL: scipy.sparse.csc_array
    mean_L: NDArray[np.float64]
    deviation_L: NDArray[np.float64]


def correlations(a: Columns, b: Columns) -> Blocks:
    """Compute Pearson correlations of latents' codes over all tokens, those where neither is active
    included."""

    def blocks() -> Iterator[torch.Tensor]:
        b_TL = scipy.sparse.csr_array(b.acts_TL)
        n = b_TL.shape[0]
        for first in range(0, len(a.mean_L), BLOCK_ROWS):
            rows = slice(first, first + BLOCK_ROWS)
            products = (a.acts_TL[:, rows].T @ b_TL).toarray() / n
            covariance = products - np.outer(a.mean_L[rows], b.mean_L)
            correlation = covariance / np.outer(a.deviation_L[rows], b.deviation_L)
            yield torch.from_numpy(correlation.astype(np.float32)).clamp(-1, 1)

    return blocks


def of_pairs(a: Columns, b: Columns) -> NDArray[np.float64]:
    """Compute the correlation of each latent of `a` with the one of `b` in the same place."""
    products_L = np.asarray((a.acts_TL * b.acts_TL).sum(0)).ravel() / a.acts_TL.shape[0]
    correlation: NDArray[np.float64] = (products_L - a.mean_L * b.mean_L) / (a.deviation_L * b.deviation_L)
    return correlation


class Stores:
    """Activation stores of the same tokens, one per model.

    Args:
        paths: their folders or addresses.
        max_tokens: most held-out tokens that are read.
        local_cache: see `keep_locally`.

    Raises:
        ConfigError: their tokens or masks differ, or no row is held out.
    """

    def __init__(self, paths: tuple[Path, ...], max_tokens: int, local_cache: str | None = None) -> None:
        self.stores = [ActivationStore(path) for path in paths]
        keep_locally(self.stores, local_cache)
        first = self.stores[0]
        for store in self.stores[1:]:
            same = store.text.fingerprint == first.text.fingerprint and store.mask == first.mask
            if not same or store.n_tokens != first.n_tokens:
                raise ConfigError(f"{store.path} and {first.path} must hold the same tokens under one mask")
        self.max_tokens = max_tokens
        self.n_tokens = sum(len(offsets) for _, offsets in self._held_out(first))
        if self.n_tokens < 2 * MIN_FIRINGS:
            raise ConfigError(f"{first.path} holds {self.n_tokens} held-out tokens, too few to compare on")

    def check(self, dictionaries: list[Dictionary]) -> None:
        """Refuse SAEs that none of the stores has the activations for."""
        for dictionary in dictionaries:
            self._store_of(dictionary)

    def codes(self, dictionary: Dictionary, device: torch.device) -> Codes:
        """Compute an SAE's codes on the held-out tokens, in the order of the text."""
        store, sae = self._store_of(dictionary), dictionary.load(device)
        site = store.site(dictionary.provenance["site"])
        blocks = []
        for shard, offsets in self._held_out(store):
            x_TD = site.gather(shard, offsets)
            blocks += [_encode(sae, rows_TD.to(device)) for rows_TD in torch.split(x_TD, ROWS_AT_ONCE)]
        return Codes(scipy.sparse.csr_array(scipy.sparse.vstack(blocks)))

    def _held_out(self, store: ActivationStore) -> Iterator[tuple[int, NDArray[np.int64]]]:
        left = self.max_tokens
        for shard in range(store.n_shards):
            offsets = np.flatnonzero(store.keep_addresses(shard, store.mask, held_out=True))[:left]
            if len(offsets):
                yield shard, offsets
            left -= len(offsets)

    def _store_of(self, dictionary: Dictionary) -> ActivationStore:
        """Find the store with the SAE's site, of its model if the SAE says which that is."""
        site, model = (dictionary.provenance.get(key) for key in ("site", "model_fingerprint"))
        for store in self.stores:
            if site in store.sites and model in (None, store.settings.model_fingerprint):
                if store.site(site).width == dictionary.d_in:
                    return store
        raise ConfigError(
            f"none of {', '.join(str(store.path) for store in self.stores)} holds the activations of "
            f"{dictionary.name}: site {site}, d_in {dictionary.d_in}; add a store of its model with --acts"
        )


def _encode(sae: Sae, x_TD: torch.Tensor) -> scipy.sparse.csr_array:
    with torch.inference_mode():
        acts_TK, indices_TK = sae.encode(x_TD.float())
    n, k = acts_TK.shape
    content = (acts_TK.double().cpu().numpy().ravel(), indices_TK.cpu().numpy().ravel())
    codes = scipy.sparse.csr_array((*content, np.arange(0, n * k + 1, k)), shape=(n, sae.config.num_latents))
    codes.eliminate_zeros()
    return codes

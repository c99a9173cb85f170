"""What goes with a latent: other latents, and dimensions of the activations that the SAE reads.

Measured on the first `MAX_TOKENS` unmasked tokens, those on which a latent is not active included: their
codes are kept in memory, as sparse columns.
"""

from dataclasses import dataclass

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from saemill.latents.rows import Chunk, Entries

MAX_TOKENS = 1 << 17
MIN_FIRINGS = 10
"""A latent active on fewer of the tokens has no correlations: they would be chance."""
N_SHOWN = 3
"""Number of partners, as by SAEDashboard's default."""


@dataclass(frozen=True, slots=True)
class Partners:
    """What goes most with a latent, by falling correlation; of a latent without partners all are empty."""

    numbers: list[int]
    pearson: list[float]
    """Pearson correlations."""
    cosine: list[float]
    """Cosines, in which the means are not subtracted."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums over tokens of some variables' values and squares."""

    sum_V: NDArray[np.float64]
    squares_V: NDArray[np.float64]


class Together:
    """Codes of some tokens, and products with what the SAE reads.

    Args:
        n_latents: of the SAE.
        width: of the activations that it reads.
        latents: those that partners are wanted of, ascending; their products with the activations are kept,
            float64 [L, D].
    """

    def __init__(self, n_latents: int, width: int, latents: NDArray[np.int64]) -> None:
        self.n_latents, self.latents, self.n_tokens = n_latents, latents, 0
        self.products_LD = np.zeros((len(latents), width))
        self.x = Moments(np.zeros(width), np.zeros(width))
        self._blocks: list[scipy.sparse.csr_array] = []

    def add(self, chunk: Chunk, entries: Entries) -> None:
        """Count tokens, up to `MAX_TOKENS` in all."""
        n = min(len(chunk.places_T), MAX_TOKENS - self.n_tokens)
        if not n:
            return
        counted = entries.place_N <= chunk.places_T[n - 1]
        token_N = np.searchsorted(chunk.places_T, entries.place_N[counted])
        content = entries.act_N[counted].astype(np.float64), (token_N, entries.latent_N[counted])
        acts_TF = scipy.sparse.csr_array(content, shape=(n, self.n_latents))
        x_TD = chunk.x_TD[:n].double().numpy()
        self.products_LD += acts_TF[:, self.latents].T @ x_TD
        self.x.sum_V[:] += x_TD.sum(0)
        self.x.squares_V[:] += (x_TD**2).sum(0)
        self._blocks.append(acts_TF)
        self.n_tokens += n

    def finish(self) -> "Correlations":
        """Close the counting."""
        acts_TF = scipy.sparse.csc_array(scipy.sparse.vstack(self._blocks))
        return Correlations(self, acts_TF)


class Correlations:
    """Partners of latents, once all tokens are counted."""

    def __init__(self, counted: Together, acts_TF: scipy.sparse.csc_array) -> None:
        self.counted, self.acts_TF = counted, acts_TF
        sums_F = np.asarray(acts_TF.sum(0)).ravel()
        self.f = Moments(sums_F, np.asarray((acts_TF * acts_TF).sum(0)).ravel())
        self.fires_F = np.diff(acts_TF.indptr) >= MIN_FIRINGS

    def of_latents(self, start: int, stop: int) -> list[Partners]:
        """Find the latents that go most with those of the places start..stop in the list asked for."""
        latents = self.counted.latents[start:stop]
        products_LF = (self.acts_TF[:, latents].T @ self.acts_TF).toarray()
        may_be_LF = np.repeat(self.fires_F[None], len(latents), 0)
        may_be_LF[np.arange(len(latents)), latents] = False
        return self._partners(latents, products_LF, self.f, may_be_LF)

    def of_inputs(self, start: int, stop: int) -> list[Partners]:
        """Find the dimensions of what the SAE reads that go most with latents, as `of_latents`."""
        latents, products_LD = self.counted.latents[start:stop], self.counted.products_LD[start:stop]
        return self._partners(latents, products_LD, self.counted.x, np.ones(products_LD.shape, bool))

    def _partners(
        self,
        latents: NDArray[np.int64],
        products_LV: NDArray[np.float64],
        other: Moments,
        may_be_LV: NDArray[np.bool_],
    ) -> list[Partners]:
        n = self.counted.n_tokens
        own = Moments(self.f.sum_V[latents], self.f.squares_V[latents])
        covariance_LV = products_LV / n - np.outer(own.sum_V, other.sum_V) / n**2
        pearson_LV = _quotient(covariance_LV, np.outer(_deviation(own, n), _deviation(other, n)))
        cosine_LV = _quotient(products_LV, np.sqrt(np.outer(own.squares_V, other.squares_V)))
        ranked_LV = np.where(may_be_LV & self.fires_F[latents][:, None], pearson_LV, -np.inf)
        best_LK = np.argpartition(-ranked_LV, min(N_SHOWN, ranked_LV.shape[1] - 1), 1)[:, :N_SHOWN]
        partners = []
        for at, best in enumerate(best_LK):
            shown = best[np.argsort(-ranked_LV[at, best], kind="stable")]
            shown = shown[np.isfinite(ranked_LV[at, shown])]
            values = (pearson_LV[at, shown].tolist(), cosine_LV[at, shown].tolist())
            partners.append(Partners(shown.tolist(), *values))
        return partners


def _deviation(moments: Moments, n: int) -> NDArray[np.float64]:
    """Compute standard deviations; of what does not vary, up to rounding, 0."""
    mean_square_V, mean_V = moments.squares_V / n, moments.sum_V / n
    variance_V: NDArray[np.float64] = mean_square_V - mean_V**2
    deviation_V: NDArray[np.float64] = np.sqrt(np.where(variance_V > 1e-12 * mean_square_V, variance_V, 0))
    return deviation_V


def _quotient(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide, with −∞ where the divisor is 0: no partner."""
    quotient = np.full(above.shape, -np.inf)
    np.divide(above, below, out=quotient, where=below > 0)
    return quotient

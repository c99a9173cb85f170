"""Figures of SAELens' evals and SAEBench's core that an assessment does not have, from the cache and weights.

They are over the tokens of the assessment, in two passes over the cache: the mean, then all else.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saemill.common.errors import ConfigError
from saemill.common.log import progress
from saemill.common.sae.sae import Sae
from saemill.latents.rows import Rows

AT_ONCE = 1024
"""Rows of weights that are compared with all others at once."""


@dataclass(slots=True)
class Sums:
    """Sums over the tokens, and counts of each latent."""

    n_latents: int
    n_tokens: int = 0
    norm_in: float = 0.0
    norm_out: float = 0.0
    squares_out: float = 0.0
    """Σ ‖x̂‖²."""
    inner: float = 0.0
    """Σ x · x̂."""
    l1: float = 0.0
    legacy: float = 0.0
    """Σ (1 − ‖x − x̂‖² / ‖x − x̄‖²), of tokens that are not at the mean."""
    n_legacy: int = 0
    fired_F: NDArray[np.int64] = field(init=False)
    """Tokens on which each latent is active."""
    rows_F: NDArray[np.int64] = field(init=False)
    """Rows in which it is, of the store."""

    def __post_init__(self) -> None:
        self.fired_F, self.rows_F = np.zeros(self.n_latents, np.int64), np.zeros(self.n_latents, np.int64)


def measure(sae: Sae, rows: Rows, max_unmasked: int) -> Sums:
    """Count over the first unmasked tokens of some rows.

    Args:
        sae: an SAE, no transcoder.
        rows: the rows; their ctx is the store's.
        max_unmasked: most tokens.
    """
    site, sums = str(sae.site), Sums(sae.config.num_latents)
    mean_D = torch.zeros(sae.config.d_in, dtype=torch.float64)
    n = 0
    for chunk in rows.chunks(site, max_unmasked):
        mean_D += chunk.x_TD.double().sum(0)
        n += len(chunk.places_T)
    mean_D /= max(1, n)
    with progress(f"measure {site}", n, "tokens") as advance, torch.inference_mode():
        for chunk in rows.chunks(site, max_unmasked):
            _add(sums, sae, chunk.x_TD, mean_D, chunk.places_T // rows.ctx)
            advance(len(chunk.places_T))
    return sums


def _add(sums: Sums, sae: Sae, x_TD: Tensor, mean_D: Tensor, row_T: NDArray[np.int64]) -> None:
    """Count some tokens, of whole rows."""
    read_TD = x_TD.to(sae.W_enc.device, torch.float32)
    codes = sae.encode(read_TD)
    out_TD, x_TD = sae.decode(*codes).double().cpu(), x_TD.double()
    spread_T, error_T = (x_TD - mean_D).square().sum(1), (x_TD - out_TD).square().sum(1)
    apart_T = spread_T > 0
    sums.n_tokens += len(x_TD)
    sums.norm_in += float(torch.linalg.vector_norm(x_TD, dim=1).sum())
    sums.norm_out += float(torch.linalg.vector_norm(out_TD, dim=1).sum())
    sums.squares_out += float(out_TD.square().sum())
    sums.inner += float((x_TD * out_TD).sum())
    sums.l1 += float(codes.top_acts.double().abs().sum())
    sums.legacy += float((1 - error_T[apart_T] / spread_T[apart_T]).sum())
    sums.n_legacy += int(apart_T.sum())
    token, slot = codes.active.nonzero(as_tuple=True)
    latent_N = codes.top_indices[token, slot].cpu().numpy()
    sums.fired_F += np.bincount(latent_N, minlength=sums.n_latents)
    pairs = np.unique(row_T[token.cpu().numpy()] * sums.n_latents + latent_N)
    sums.rows_F += np.bincount(pairs % sums.n_latents, minlength=sums.n_latents)


def of_weights(sae: Sae) -> dict[str, NDArray[np.float64]]:
    """Compute what an SAE's weights alone tell of each latent, by SAEBench's names. [F] each."""
    W_enc, W_dec = sae.W_enc.detach().double(), sae.W_dec.detach().double()
    unit_enc, unit_dec = (torch.nn.functional.normalize(rows, dim=1) for rows in (W_enc, W_dec))
    columns = {
        "encoder_bias": sae.b_enc.detach().double(),
        "encoder_norm": torch.linalg.vector_norm(W_enc, dim=1),
        "encoder_decoder_cosine_sim": (unit_enc * unit_dec).sum(1),
        "max_decoder_cosine_sim": _nearest(unit_dec),
        "max_encoder_cosine_sim": _nearest(unit_enc),
    }
    return {name: values.cpu().numpy() for name, values in columns.items()}


def _nearest(unit_FD: Tensor) -> Tensor:
    """Compute the largest cosine of each row to another one. [F]"""
    rows_FD, largest = unit_FD.float(), []
    for start in range(0, len(rows_FD), AT_ONCE):
        cosine = rows_FD[start : start + AT_ONCE] @ rows_FD.T
        cosine.diagonal(start).fill_(-torch.inf)
        largest.append(cosine.amax(1))
    return torch.cat(largest).double()


def of_densities(density_F: NDArray[np.float64]) -> dict[str, float]:
    """Summarise how often latents are active, by SAEBench's names."""
    total = float(density_F.sum())
    content = {"frac_alive": float((density_F > 0).mean())}
    for percent in (1, 10):
        often = density_F > percent / 100
        content[f"freq_over_{percent}_percent"] = float(often.mean())
        share = float(density_F[often].sum()) / total if total else 0.0
        content[f"normalized_freq_over_{percent}_percent"] = share
    return content


def scalars(sums: Sums) -> dict[str, dict[str, float]]:
    """Return the figures of the sums, in SAELens' groups and by its names.

    Raises:
        ConfigError: one of them is no number.
    """
    n = sums.n_tokens
    if not sums.inner:
        raise ConfigError(
            "relative_reconstruction_bias is no number: reconstructions are zero, or at right angles to "
            "activations; train the SAE again"
        )
    return {
        "reconstruction_quality": {"explained_variance_legacy": sums.legacy / max(1, sums.n_legacy)},
        "shrinkage": {
            "l2_norm_in": sums.norm_in / n,
            "l2_norm_out": sums.norm_out / n,
            "relative_reconstruction_bias": sums.squares_out / sums.inner,
        },
        "sparsity": {"l1": sums.l1 / n},
    }

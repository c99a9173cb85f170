"""Latents that fire on more than a tenth of the tokens, and what they follow.

Such latents are no defect by themselves: many track something that every token has (Sun et al. 2025, “Dense
SAE latents are features, not bugs”, arXiv:2506.15679). Here each is compared with what can be read off the
activations and the weights: its antipode, the position in the row, the length of the activation, the first
principal component.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from saemill.common.sae.sae import Sae

DENSE = 0.1
"""Share of the tokens; a latent that fires on more is dense."""
FOLLOWS = 0.5
"""Least |correlation|, or |cosine|, with which a dense latent counts as following something."""
OPPOSITE = -0.7
"""Largest cosine, of decoder rows and of encoder rows alike, of two latents that are one direction's ends."""
DRIVERS = ("position", "length")
"""What activations are correlated with: log₂(1 + position in the row), and ‖x − mean‖."""


@dataclass(slots=True)
class Drivers:
    """Sums from which the correlations of each latent's activation with the drivers follow.

    An activation is 0 where the latent does not fire.
    """

    n_latents: int
    squares_F: Tensor = field(init=False)
    """Σ f². float64"""
    products_FC: Tensor = field(init=False)
    """Σ f · z of each driver z."""
    of_drivers_C: Tensor = field(init=False)
    """Σ z and Σ z², one after the other. [2, C]"""

    def __post_init__(self) -> None:
        self.squares_F = torch.zeros(self.n_latents, dtype=torch.float64)
        self.products_FC = torch.zeros(self.n_latents, len(DRIVERS), dtype=torch.float64)
        self.of_drivers_C = torch.zeros(2, len(DRIVERS), dtype=torch.float64)

    def add(self, drivers_TC: Tensor) -> None:
        """Count the drivers of some tokens, whose activations were added to the other sums."""
        self.of_drivers_C += torch.stack([drivers_TC.sum(0), drivers_TC.square().sum(0)])

    @property
    def sums(self) -> Iterable[Tensor]:
        """List the sums, which processes add up."""
        return (self.squares_F, self.products_FC, self.of_drivers_C)

    def correlations(self, n: int, sum_F: Tensor) -> NDArray[np.float64]:
        """Compute the correlation of each latent's activation with each driver; NaN where one is constant.

        Args:
            n: tokens.
            sum_F: Σ f of each latent.

        Returns: [F, C].
        """
        z_C, zz_C = self.of_drivers_C
        covariance_FC = n * self.products_FC - sum_F[:, None] * z_C
        spread_F = (n * self.squares_F - sum_F.square()).clamp(min=0)
        spread_C = n * zz_C - z_C.square()
        spread_C = torch.where(spread_C > 1e-9 * n * zz_C, spread_C, 0.0)  # the rest is rounding
        found: NDArray[np.float64] = (covariance_FC / (spread_F[:, None] * spread_C).sqrt()).numpy()
        return found


def drivers_of(position_T: NDArray[np.int64], squared_distance_T: NDArray[np.float64]) -> Tensor:
    """Put together the drivers of some tokens. float64 [T, C]"""
    columns = (np.log2(1.0 + position_T), np.sqrt(squared_distance_T))
    return torch.from_numpy(np.stack(columns, 1))


def describe_dense(
    sae: Sae,
    density_F: NDArray[np.float64],
    correlation_FC: NDArray[np.float64],
    component_D: Tensor | None,
) -> list[dict[str, Any]]:
    """Describe the dense latents of an SAE, those that fire most often first.

    The kind of one is the first that holds: `antipodal`, if it and another are two ends of one direction;
    `position`, `length`, if its activation follows these; `component`, if it writes along the first principal
    component; else `other`.

    Args:
        sae: the SAE.
        density_F: share of the tokens on which each latent fired.
        correlation_FC: of each activation with the drivers.
        component_D: the first principal component; None where it is not known.
    """
    dense = np.flatnonzero(density_F > DENSE)
    dense = dense[np.argsort(-density_F[dense], kind="stable")]
    if not len(dense):
        return []
    decoder_FD = normalize(sae.decoder_rows.float(), dim=1)
    antipodes = _antipodes(decoder_FD, dense)
    encoder_FD = normalize(sae.W_enc.detach().float(), dim=1)
    described = []
    for latent, (antipode, cosine) in zip(dense.tolist(), antipodes, strict=True):
        values: dict[str, Any] = {
            "latent": latent,
            "density": float(density_F[latent]),
            "antipode": antipode,
            "decoder_cosine": cosine,
            "encoder_cosine": float(encoder_FD[latent] @ encoder_FD[antipode]),
        }
        values |= {
            f"with_{name}": float(r) if np.isfinite(r) else None
            for name, r in zip(DRIVERS, correlation_FC[latent], strict=True)
        }
        with_component = None if component_D is None else float(decoder_FD[latent] @ component_D)
        described.append(values | {"with_component": with_component, "kind": ""})
    return [values | {"kind": _kind(values)} for values in described]


def _antipodes(decoder_FD: Tensor, latents: NDArray[np.int64]) -> list[tuple[int, float]]:
    """Find the latent with the most opposite decoder row of each, and the cosine."""
    cosine_LF = decoder_FD[torch.from_numpy(latents).to(decoder_FD.device)] @ decoder_FD.T
    least = cosine_LF.min(1)
    return list(zip(least.indices.tolist(), least.values.tolist(), strict=True))


def _kind(values: dict[str, Any]) -> str:
    """Name what a dense latent follows."""
    if max(values["decoder_cosine"], values["encoder_cosine"]) <= OPPOSITE:
        return "antipodal"
    followed = ("position", "length", "component")
    return next((name for name in followed if abs(values[f"with_{name}"] or 0.0) >= FOLLOWS), "other")

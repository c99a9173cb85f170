"""Figures of an SAE's latents: how often they fire, how their decoder rows lie, what dense ones follow."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from saemill.assess.cosines import cosine_figures, cosines, random_cosines
from saemill.assess.dense import DENSE, describe_dense
from saemill.assess.reconstruction import Reconstruction
from saemill.assess.sums import Figure, absent
from saemill.common.sae.sae import Sae


def latent_figures(measured: Reconstruction, name: str, dead_share: float) -> dict[str, Figure]:
    """Compute the figures of an SAE's latents; one that fires on less than `dead_share` is dead."""
    density, live = measured.density(name), measured.live(name, dead_share)
    w_dec_FD = measured.saes[name].decoder_rows
    rows_FD = w_dec_FD[torch.from_numpy(live).to(w_dec_FD.device)]
    quantiles = np.quantile(density, [0.05, 0.25, 0.5, 0.75, 0.95])
    return {
        "dead_fraction": {"value": float(1 - live.mean())},
        "never_fired": {"value": float((density == 0).mean())},
        "dense_fraction": {"value": float((density > DENSE).mean())},
        "dense_share": _dense_share(density),
        "density_quantiles": {"value": quantiles.tolist()},
    } | cosine_figures(cosines(rows_FD), random_cosines(rows_FD))


def dense_latents(measured: Reconstruction, name: str, pca: Sae | None) -> list[dict[str, Any]]:
    """Describe the dense latents of an SAE; the first principal component is that of the PCA beside it."""
    if measured.unusable(name):
        return []
    component_D = None
    if pca is not None:
        component_D = torch.nn.functional.normalize(pca.decoder_rows[0].float(), dim=0)
    return describe_dense(
        measured.saes[name], measured.density(name), measured.correlations(name), component_D
    )


def _dense_share(density_F: NDArray[np.float64]) -> Figure:
    """Compute the share of all firings that are those of dense latents."""
    if not density_F.any():
        return absent("no latent fired")
    if (mean := float(density_F.mean())) > DENSE / 2:
        return absent(f"on average a latent is active {mean:.1%} of the time, so that dense ones are no sign")
    return {"value": float(density_F[density_F > DENSE].sum() / density_F.sum())}

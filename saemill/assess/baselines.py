"""Baselines of the best variant's figures: a random dictionary and PCA, of the same k.

Where its latents have thresholds, k is its mean L0, rounded: a choice per token that is as large on average.
Both are SAEs, fitted to cached training tokens and measured like any other on the evaluation tokens:

- random: as many latents, unit decoder rows drawn at random, the encoder their transpose; one gain for
  all is fitted by least squares.
- PCA: x̂ = x̄ + V Vᵀ (x − x̄), V the k directions of most variance. As latents ±v, of which one of
  each pair is active.
"""

import torch
from torch import Tensor

from saemill.assess.evalset import EvalSet
from saemill.assess.reconstruction import ROWS_AT_ONCE
from saemill.common.sae.parts import SaeConfig
from saemill.common.sae.sae import Sae

FIT_TOKENS = 1 << 16
SEED = 12


def fit_baselines(best: Sae, k: int, site: str, evalset: EvalSet) -> dict[str, Sae]:
    """Fit the random dictionary and the PCA beside an SAE, alike on every process; by name.

    Args:
        best: says the number of latents, and the device.
        k: how many latents are active per token.
        site: whose activations they reconstruct.
        evalset: gives cached tokens of the site that training saw.
    """
    config, device, d = best.config, best.W_enc.device, len(best.b_dec)
    statistics = evalset.arrays[site].statistics
    mean_D = statistics.mean_D.to(device, torch.float32)
    # Squares of very large or small activations are beyond float32; these are of about 1. Joined sites are
    # each in their own units, as the SAE's error is.
    units_D = evalset.factors.get(site)
    scale = (statistics.total_variance / d) ** 0.5 if units_D is None else (1 / units_D).to(mean_D)
    generator = torch.Generator().manual_seed(SEED)
    drawn_FD = torch.randn(config.num_latents, d, generator=generator).to(device)
    stretch = 1.0 if units_D is None else scale
    random = _sae(torch.nn.functional.normalize(drawn_FD, dim=1), mean_D, k, site, stretch)
    covariance_DD = torch.zeros(d, d, dtype=torch.float64, device=device)
    moments = torch.zeros(2, dtype=torch.float64, device=device)
    with torch.inference_mode():
        for chunk in evalset.training_chunks(FIT_TOKENS):
            for some_TD in torch.split(chunk.x[site], ROWS_AT_ONCE):
                x_TD = some_TD.to(device, torch.float32)
                centred_TD, y_TD = ((z - mean_D) / scale for z in (x_TD, random(x_TD).reconstruction))
                covariance_DD += (centred_TD.T @ centred_TD).double()
                moments += torch.stack([(centred_TD * y_TD).sum(), y_TD.square().sum()]).double()
    if moments[1] > 0:
        random.W_dec.data *= float(moments[0] / moments[1])
    v_KD = torch.linalg.eigh(covariance_DD).eigenvectors.T.flip(0)[:k].float()
    return {
        f"random-k{k}-f{config.num_latents}": random,
        f"pca-k{len(v_KD)}": _sae(torch.cat([v_KD, -v_KD]), mean_D, len(v_KD), site, stretch),
    }


def _sae(rows_FD: Tensor, mean_D: Tensor, k: int, site: str, stretch: Tensor | float) -> Sae:
    """Build an SAE with the same rows as encoder and decoder, in units that are `stretch` of the
    activations'."""
    n, d = rows_FD.shape
    provenance = {"site": site, "tokens_trained": 0, "diverged_at_step": None}
    config = SaeConfig(d_in=d, num_latents=n, k=k, provenance=provenance)
    return Sae(config, rows_FD / stretch, rows_FD.new_zeros(n), rows_FD * stretch, mean_D)

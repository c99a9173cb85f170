"""Dictionaries that nobody trained, beside which every SAE is measured: at each site, of each k.

Both are SAEs, fitted to cached training tokens and measured like any other on the evaluation tokens:

- random: as many latents as the widest SAE of that k, unit decoder rows drawn at random, the encoder their
  transpose; one gain for all is fitted by least squares. A latent of either sign counts as two.
- PCA: x̂ = x̄ + V Vᵀ (x − x̄), V the k directions of most variance. As latents ±v, of which one of
  each pair is active.

An SAE whose latents have thresholds is compared at its mean L0: with a k that is there and within 5% of it,
or with one of its own, rounded.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from saemill.assess.evalset import EvalSet
from saemill.assess.reconstruction import ROWS_AT_ONCE
from saemill.assess.scratch import Scratch
from saemill.common.sae.parts import SaeConfig
from saemill.common.sae.sae import Sae

FIT_TOKENS = 1 << 16
SEED = 12
ALIKE = 0.05
"""Relative difference up to which a mean L0 counts as a k."""


@dataclass(frozen=True, slots=True)
class Baselines:
    """The dictionaries, and which of them each SAE is compared with."""

    saes: dict[str, Sae]
    of: dict[str, dict[str, str]]
    """Name of an SAE, or of one of these → `random` and `pca` → name. A transcoder has no PCA: that knows
    the y which it has to predict."""


def site_of(sae: Sae) -> str:
    """Return the site that an SAE of a run reconstructs, or a transcoder predicts."""
    return str(sae.target_site)


def fit_baselines(saes: Mapping[str, Sae], l0s: Mapping[str, float], evalset: EvalSet) -> Baselines:
    """Fit the random dictionaries and the PCAs beside some SAEs, alike on every process.

    Args:
        saes: name → SAE.
        l0s: name → mean L0, of those without a k.
        evalset: gives cached tokens that training saw.
    """
    sites = {name: site_of(sae) for name, sae in saes.items()}
    fitted: dict[str, Sae] = {}
    of: dict[str, dict[str, str]] = {}
    for site in dict.fromkeys(sites.values()):
        here = {name: sae for name, sae in saes.items() if sites[name] == site}
        ks = _ks(here, l0s)
        widths = {k: max(_ends(here[n]) for n in here if ks[n] == k) for k in set(ks.values())}
        device = next(iter(here.values())).W_enc.device
        random, pca = _fit(site, widths, evalset, device)
        label = f"{site}-" if len(set(sites.values())) > 1 else ""
        names = {
            k: {
                "random": _free(f"{label}random-k{k}-f{widths[k]}", saes),
                "pca": _free(f"{label}pca-k{pca[k].config.k}", saes),
            }
            for k in sorted(widths)
        }
        for k, kinds in names.items():
            fitted |= {kinds["random"]: random[k], kinds["pca"]: pca[k]}
            of |= dict.fromkeys(kinds.values(), kinds)
        for name, sae in here.items():
            kinds = names[ks[name]]
            of[name] = {"random": kinds["random"]} if sae.is_transcoder else kinds
    return Baselines(fitted, of)


def _ends(sae: Sae) -> int:
    """Count the directions that an SAE can add: of latents of either sign both ends."""
    return sae.config.num_latents * (2 if sae.config.is_signed else 1)


def _ks(saes: Mapping[str, Sae], l0s: Mapping[str, float]) -> dict[str, int]:
    """Choose the k of each SAE's baselines: its own, or one near its mean L0."""
    ks = {name: sae.config.k for name, sae in saes.items() if sae.config.k is not None}
    there = set(ks.values())
    for name in sorted(saes.keys() - ks.keys(), key=lambda name: -l0s[name]):
        own = max(1, round(l0s[name]))
        nearest = min(there, key=lambda k: abs(k - l0s[name]), default=own)
        ks[name] = nearest if abs(nearest - l0s[name]) <= ALIKE * l0s[name] else own
        there.add(ks[name])
    return ks


def _free(name: str, taken: Mapping[str, Sae]) -> str:
    """Return the name, told from that of an SAE where one has it already."""
    return _free(f"{name}-untrained", taken) if name in taken else name


def _fit(
    site: str, widths: Mapping[int, int], evalset: EvalSet, device: torch.device
) -> tuple[dict[int, Sae], dict[int, Sae]]:
    """Fit the baselines of a site; `widths` says how many latents the random one of each k has.

    Returns: the random ones and the PCAs, by k.
    """
    statistics = evalset.arrays[site].statistics
    mean_D = statistics.mean_D.to(device, torch.float32)
    d = len(mean_D)
    # Squares of very large or small activations are beyond float32; these are of about 1. Joined sites are
    # each in their own units, as the SAE's error is.
    units_D = evalset.factors.get(site)
    scale = (statistics.total_variance / d) ** 0.5 if units_D is None else (1 / units_D).to(mean_D)
    stretch = 1.0 if units_D is None else scale
    random = {}
    for k, width in widths.items():
        drawn_FD = torch.randn(width, d, generator=torch.Generator().manual_seed(SEED)).to(device)
        random[k] = _sae(torch.nn.functional.normalize(drawn_FD, dim=1), mean_D, k, site, stretch)
    covariance_DD = torch.zeros(d, d, dtype=torch.float64, device=device)
    scratch = Scratch()
    moments = {k: torch.zeros(2, dtype=torch.float64, device=device) for k in random}
    with torch.inference_mode():
        for chunk in evalset.training_chunks(FIT_TOKENS):
            for some_TD in torch.split(chunk.x[site], ROWS_AT_ONCE):
                x_TD = some_TD.to(device, torch.float32)
                centred_TD = (x_TD - mean_D) / scale
                covariance_DD += (centred_TD.T @ centred_TD).double()
                for k, sae in random.items():
                    codes = sae.select(scratch.pre_acts(sae, x_TD))
                    y_TD = (sae.decode(*codes) - mean_D) / scale
                    sums = torch.stack([(centred_TD * y_TD).sum(), y_TD.square().sum()])
                    moments[k] += sums.double()
    for k, sae in random.items():
        if moments[k][1] > 0:
            sae.W_dec.data *= float(moments[k][0] / moments[k][1])
    v_DD = torch.linalg.eigh(covariance_DD).eigenvectors.T.flip(0).float()
    return random, {k: _pca(v_DD[:k], mean_D, site, stretch) for k in widths}


def _pca(v_KD: Tensor, mean_D: Tensor, site: str, stretch: Tensor | float) -> Sae:
    """Build the SAE that projects on some directions."""
    return _sae(torch.cat([v_KD, -v_KD]), mean_D, len(v_KD), site, stretch)


def _sae(rows_FD: Tensor, mean_D: Tensor, k: int, site: str, stretch: Tensor | float) -> Sae:
    """Build an SAE with the same rows as encoder and decoder, in units that are `stretch` of the
    activations'."""
    n, d = rows_FD.shape
    provenance = {"site": site, "tokens_trained": 0, "diverged_at_step": None}
    config = SaeConfig(d_in=d, num_latents=n, k=min(k, n), provenance=provenance)
    return Sae(config, rows_FD / stretch, rows_FD.new_zeros(n), rows_FD * stretch, mean_D)

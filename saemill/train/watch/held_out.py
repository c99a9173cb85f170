"""How well an SAE, in the form in which it will be used, reconstructs held-out activations, or predicts them.

The tokens are the first of the store that are held out and unmasked, with which `saemill assess` begins too;
the definitions are the same. They are read once, past the training stream, which they leave as it is.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from saemill.common.sae.sae import Sae
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.mask import MaskConfig

ONE = torch.ones(1, dtype=torch.float64)
MOST_BYTES = 1 << 28
"""Most bytes of pre-activations at once."""

Figures = dict[str, float | None]
"""Figures by name; None where there is none."""
NAMES = ("eval_fvu", "eval_l0", "eval_dead_fraction")
"""What is measured of every SAE."""


@dataclass(slots=True)
class _Sums:
    """Sums over tokens of an SAE, or of one within it."""

    sae: Sae
    fired_F: Tensor
    """bool, which latents were active."""
    sse_D: Tensor
    """float64, squared errors by dimension."""
    n_active: int = 0

    @classmethod
    def of(cls, sae: Sae) -> "_Sums":
        """Begin at 0."""
        zeros = partial(torch.zeros, device=sae.W_enc.device)
        return cls(
            sae, zeros(sae.config.num_latents, dtype=torch.bool), zeros(len(sae.b_dec), dtype=torch.float64)
        )

    def add(self, pre_TF: Tensor, x_TD: Tensor, target_TD: Tensor) -> None:
        """Count some tokens. What is squared is float64."""
        codes = self.sae.select(pre_TF[:, : self.sae.config.num_latents])
        error_TD = self.sae.decode(*codes, x_TD).double() - target_TD.double()
        active = codes.active
        self.sse_D += error_TD.square().sum(0)
        self.n_active += int(active.sum())
        self.fired_F[codes.top_indices[active]] = True

    def figures(self, suffix: str, squares_D: Tensor, n_tokens: int) -> Figures:
        """Compute the means, with the FVU at each site of a crosscoder or a cross-layer transcoder; its whole
        FVU counts each site in its own units, as training does."""
        config, sse_D = self.sae.config, self.sse_D.cpu()
        units_D = torch.cat([torch.full((p.width,), p.scale**2).double() for p in config.outputs] or [ONE])
        values = (
            _share(sse_D * units_D, squares_D * units_D),
            self.n_active / n_tokens,
            1 - int(self.fired_F.sum()) / config.num_latents,
        )
        figures = {name + suffix: value for name, value in zip(NAMES, values, strict=True)}
        start = 0
        for part in config.outputs:
            own = slice(start, start + part.width)
            figures[f"eval_fvu{suffix}_at_{part.site}"] = _share(sse_D[own], squares_D[own])
            start += part.width
        return figures


def _share(errors_D: Tensor, squares_D: Tensor) -> float | None:
    """Divide the sums; None where there is nothing to explain."""
    return float(errors_D.sum() / squares_D.sum()) if squares_D.sum() > 0 else None


class HeldOut:
    """Some held-out activations of one site, or of one and of that which is predicted from it, in memory as
    they are stored.

    Args:
        store: where they are read.
        sites: their names.
        mask: positions left out.
        max_tokens: how many, at most.
    """

    def __init__(
        self, store: ActivationStore, sites: tuple[str, ...], mask: MaskConfig, max_tokens: int
    ) -> None:
        read = {site: _read(store, site, mask, max_tokens) for site in sites}
        self.x_TD, self.target_TD = read[sites[0]], read[sites[-1]]
        target_TD = self.target_TD.double()
        self.squares_D = (target_TD - target_TD.mean(0)).square().sum(0)
        """Σ(y − ȳ)² by dimension, with y = x of an SAE."""

    def measure(self, sae: Sae) -> Figures:
        """Measure an SAE, and those within it: a Matryoshka's prefixes, and other numbers of active latents.

        Returns: `NAMES`, and the same with `_f<latents>` or `_k<k>` behind them; of a
        crosscoder also `eval_fvu_at_<site>`.
        """
        device, config = sae.W_enc.device, sae.config
        parts = {f"_f{n}": sae.prefix(n) for n in config.prefixes[:-1]}
        parts |= {f"_k{k}": sae.at_k(k) for k in config.ks[:-1]}
        sums = {suffix: _Sums.of(part) for suffix, part in {"": sae, **parts}.items()}
        n_at_once = max(1, MOST_BYTES // (4 * config.num_latents))
        pieces = (torch.split(rows_TD, n_at_once) for rows_TD in (self.x_TD, self.target_TD))
        for piece in zip(*pieces, strict=True):
            x_TD, target_TD = (rows_TD.to(device, torch.float32) for rows_TD in piece)
            pre_TF = sae.pre_acts(x_TD)
            for each in sums.values():
                each.add(pre_TF, x_TD, target_TD)
        figures: Figures = {}
        for suffix, each in sums.items():
            figures |= each.figures(suffix, self.squares_D, len(self.x_TD))
        return figures


def _read(store: ActivationStore, site: str, mask: MaskConfig, max_tokens: int) -> Tensor:
    """Read the first held-out tokens of a site that are not masked. [T, D], as they are stored."""
    array, pieces, left = store.site(site), [], max_tokens
    for shard in range(store.n_shards):
        offsets = np.flatnonzero(store.keep_addresses(shard, mask, held_out=True))[:left]
        if len(offsets):
            pieces.append(array.gather(shard, offsets))
            left -= len(offsets)
        if left == 0:
            break
    return torch.cat(pieces) if pieces else torch.empty(0, array.width, dtype=array.dtype)

"""What the weights of an SAE tell of a latent: its neighbours, and its counterparts in SAEs of other seeds.
Neither activations nor a pass of the model are needed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from saemill.common.sae.sae import Sae
from saemill.common.stores.features import Counterpart, Near

N_NEAREST = 5
AT_ONCE = 512
"""Rows that are compared with all others at once."""
SAME = 0.7
"""Cosine from which on mutual nearest latents of two seeds count as the same (Paulo and Belrose 2025,
arXiv 2501.16615)."""


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The latents of the same SAE whose decoder rows are most similar to one's, and most opposite."""

    nearest: tuple[Near, ...]
    opposite: Near | None


def neighbours(sae: Sae, latents: Sequence[int]) -> list[Neighbours]:
    """Find the neighbours of some latents, by the cosine of decoder rows."""
    rows_FD, found = _unit_rows(sae), []
    n_others = len(rows_FD) - 1
    if not n_others:
        return [Neighbours((), None)] * len(latents)
    for some in torch.split(torch.tensor(latents, dtype=torch.int64), AT_ONCE):
        cosine_LF = (rows_FD[some.to(rows_FD.device)] @ rows_FD.T).cpu()
        own = torch.arange(len(some)), some
        cosine_LF[own] = -torch.inf
        near = cosine_LF.topk(min(N_NEAREST, n_others), 1)
        cosine_LF[own] = torch.inf
        far = cosine_LF.topk(1, 1, largest=False)
        found += [
            Neighbours(_near(numbers, cosines), _near(*furthest)[0])
            for numbers, cosines, *furthest in zip(
                *(near.indices, near.values, far.indices, far.values), strict=True
            )
        ]
    return found


def _near(numbers: Tensor, cosines: Tensor) -> tuple[Near, ...]:
    pairs = zip(numbers.tolist(), cosines.tolist(), strict=True)
    return tuple(Near(latent=latent, cosine=cosine) for latent, cosine in pairs)


def siblings(name: str, saes: Mapping[str, Sae]) -> dict[str, Sae]:
    """Find the SAEs that were trained as this one was but for their seed."""
    traits = _but_for_the_seed(saes[name])
    return {
        other: sae
        for other, sae in saes.items()
        if other != name and traits is not None and _but_for_the_seed(sae) == traits
    }


def _but_for_the_seed(sae: Sae) -> dict[str, object] | None:
    """Return what an SAE was trained by, its seed left out; None where it does not tell."""
    variant = sae.config.provenance.get("variant")
    if not isinstance(variant, dict):
        return None
    return {key: value for key, value in variant.items() if key not in ("name", "seed")}


def counterparts(
    sae: Sae, latents: Sequence[int], others: Mapping[str, Sae]
) -> list[tuple[Counterpart, ...]]:
    """Find the nearest latent of each other SAE, and whether it is nearest the other way round too."""
    rows_FD = _unit_rows(sae)
    found: list[list[Counterpart]] = [[] for _ in latents]
    for name, other in others.items():
        other_FD = _unit_rows(other)
        for start in range(0, len(latents), AT_ONCE):
            some = torch.tensor(latents[start : start + AT_ONCE])
            best = (rows_FD[some.to(rows_FD.device)] @ other_FD.T).max(1)
            back_L = (other_FD[best.indices] @ rows_FD.T).argmax(1).cpu()
            for at, latent in enumerate(best.indices.tolist()):
                counterpart = Counterpart(
                    variant=name,
                    latent=latent,
                    cosine=float(best.values[at]),
                    mutual=bool(back_L[at] == some[at]),
                )
                found[start + at].append(counterpart)
    return [tuple(each) for each in found]


def found_in(sae: Sae, others: Iterable[Sae]) -> NDArray[np.int64]:
    """Count, for each latent, the other SAEs in which it is found: where its nearest decoder row has it as
    its nearest in turn, with a cosine above `SAME`. int64 [F]."""
    rows_FD = _unit_rows(sae)
    count_F = torch.zeros(len(rows_FD), dtype=torch.int64, device=rows_FD.device)
    for other in others:
        other_FD = _unit_rows(other)
        there, back = (
            [(some @ of.T).max(1) for some in torch.split(rows, AT_ONCE)]
            for rows, of in ((rows_FD, other_FD), (other_FD, rows_FD))
        )
        nearest_F = torch.cat([best.indices for best in there])
        cosine_F = torch.cat([best.values for best in there])
        back_F = torch.cat([best.indices for best in back])[nearest_F]
        own_F = torch.arange(len(rows_FD), device=rows_FD.device)
        count_F += (back_F == own_F) & (cosine_F > SAME)
    return count_F.cpu().numpy()


def _unit_rows(sae: Sae) -> Tensor:
    """Return the decoder rows as float32 of unit length; of several sites each in its own units."""
    rows_FD = sae.decoder_rows.float()
    if sae.config.outputs:
        scales = [torch.full((part.width,), part.scale) for part in sae.config.outputs]
        rows_FD = rows_FD * torch.cat(scales).to(rows_FD.device)
    return normalize(rows_FD, dim=1)


def encoder_cosines(sae: Sae, latents: Sequence[int]) -> list[float | None]:
    """Compute the cosines of encoder and decoder rows; None of a transcoder, whose rows are of two spaces,
    and of a crosscoder, whose rows are in several units."""
    if sae.is_transcoder or sae.config.joined:
        return [None] * len(latents)
    rows = (normalize(w[list(latents)].detach().float(), dim=1) for w in (sae.W_enc, sae.W_dec))
    cosine_L = torch.stack(list(rows)).prod(0).sum(1)
    return [float(cosine) for cosine in cosine_L.cpu()]


def norm_shares(sae: Sae) -> Tensor | None:
    """Compute, for each latent of a crosscoder or a cross-layer transcoder, the shares of the sites that it
    writes to in the lengths of the parts of its decoder row, each in its site's own units. [F, sites], 0 of a
    row of zeros; None of other SAEs."""
    sites = sae.config.outputs
    if not sites:
        return None
    parts = zip(torch.split(sae.decoder_rows.double(), [s.width for s in sites], 1), sites, strict=True)
    norms_FL = torch.stack([rows_FD.norm(dim=1) * part.scale for rows_FD, part in parts], 1)
    return norms_FL / norms_FL.sum(1, keepdim=True).clamp(min=1e-300)

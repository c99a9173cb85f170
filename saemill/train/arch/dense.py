"""What the definitions of several architectures share: dense operations, differentiable."""

import torch
from torch import Tensor

from saemill.common.sae.abs_topk import abs_topk
from saemill.common.sae.topk import topk
from saemill.train.backends.architecture import Auxiliary, Losses, Seen
from saemill.train.backends.codes import Groups
from saemill.train.backends.parameters import Parameters
from saemill.train.backends.plain import decode


def keep_largest(pre_TF: Tensor, k: int, n_layers: int = 1) -> Tensor:
    """Rectify the k largest entries of each row, an equal number of each layer's, in their places among
    zeros."""
    of_layers = pre_TF.reshape(-1, pre_TF.shape[1] // n_layers)
    values, places = topk(of_layers, k // n_layers)
    return torch.zeros_like(of_layers).scatter(1, places, values).view_as(pre_TF)


def keep_largest_by_size(pre_TF: Tensor, k: int) -> Tensor:
    """Keep the k entries of each row that are largest by absolute value, in their places among zeros."""
    values, places = abs_topk(pre_TF, k)
    return torch.zeros_like(pre_TF).scatter(1, places, values)


def keep_from(pre_TF: Tensor, cutoff: Tensor) -> Tensor:
    """Keep the entries above 0 that reach the cutoff, among zeros."""
    return torch.where((pre_TF >= cutoff) & (pre_TF > 0), pre_TF, 0)


def auxk(auxiliary: Auxiliary | None, p: Parameters, pre_TF: Tensor, e_TD: Tensor, seen: Seen) -> Tensor:
    """Compute AuxK's loss (Gao et al. 2024, A.2): alpha · share · Σ (ê + e)², ê from the dead latents alone.

    Args:
        auxiliary: its numbers; None gives 0.
        p, pre_TF: parameters and pre-activations.
        e_TD: the error, no gradient flows through it.
        seen: with the dead latents.
    """
    if auxiliary is None or seen.dead.n_in_team == 0:
        return e_TD.new_zeros(())
    dead_S = seen.dead.latents_S
    keep = keep_largest_by_size if auxiliary.is_signed else keep_largest
    codes_TS = keep(pre_TF[:, dead_S], min(auxiliary.k, seen.dead.n_in_team))
    if p.n_layers > 1:
        codes_TF = torch.zeros_like(pre_TF).index_copy(1, dead_S, codes_TS)
        decoded_TE = decode(p._replace(b_D=torch.zeros_like(p.b_D)), codes_TF)
    else:
        decoded_TE = codes_TS @ p.w_dec_FD[dead_S]
    difference_TD = decoded_TE + e_TD.detach()
    return auxiliary.alpha * auxiliary.share(seen.dead) * difference_TD.square().sum()


def grouped(
    groups: Groups | None,
    auxiliary: Auxiliary | None,
    p: Parameters,
    pre_TF: Tensor,
    codes_TF: Tensor,
    y_TE: Tensor,
    seen: Seen,
) -> Losses:
    """Compute the squared error of the codes, with that of each group where there are several, and AuxK.

    AuxK fits what the group that is shown leaves. The codes of that group are those that count as active.
    """
    if groups is None:
        e_TD = decode(p, codes_TF) - y_TE
        return Losses(e_TD.square().sum(), auxk(auxiliary, p, pre_TF, e_TD, seen), codes_TF)
    if groups.by_rank:
        place_TF = codes_TF.detach().argsort(stable=True, dim=1, descending=True).argsort(1)
    else:
        place_TF = torch.arange(codes_TF.shape[1], device=y_TE.device).expand_as(codes_TF)
    kept = [torch.where(place_TF < end, codes_TF, 0) for end in groups.ends]
    errors = [decode(p, codes) - y_TE for codes in kept]
    sse_G = torch.stack([e_TD.square().sum() for e_TD in errors])
    aux = auxk(auxiliary, p, pre_TF, errors[groups.shown], seen)
    error = sse_G @ sse_G.new_tensor(groups.weights)
    return Losses(error, aux, kept[groups.shown], sse_G[groups.shown], sse_G)

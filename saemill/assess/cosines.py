"""What the decoder rows of an SAE are to one another: how similar, how opposite, how mixed.

- `max_decoder_cosine`: the mean, over rows, of the largest cosine to another row.
- `c_dec`: the mean of |cosine| over all pairs. Chanin and Garriga-Alonso (2025, arXiv:2508.16560) find it
  least at the L0 that fits the data: below and above it latents mix features, and their rows grow alike.
- duplicates and antipodes: rows that are nearly the same as another one, or nearly its opposite.

Each beside as many random directions, which are similar too where the space is narrow.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from saemill.assess.sums import Figure, absent
from saemill.common.log import counted

AT_ONCE = 1024
"""Rows that are compared with all others at once."""
DUPLICATE = 0.95
"""Cosine from which on two rows count as the same."""
ANTIPODE = -0.9
"""Cosine down to which two rows count as opposite."""


@dataclass(frozen=True, slots=True)
class Cosines:
    """The cosines between some rows, of which each pair is looked at once."""

    numbers_N: Tensor
    """Places of the rows that have a direction, among those given. int64 [N]"""
    largest_N: Tensor
    """Largest cosine of each to another."""
    smallest_N: Tensor
    """Smallest cosine of each to another."""
    opposite_N: Tensor
    """Place of the row with the smallest cosine, among those given."""
    mean_absolute: float
    """Mean |cosine| over all pairs."""


def cosines(rows_FD: Tensor) -> Cosines | str:
    """Compare all rows with each other, or say why they cannot be; rows of zeros are left out.

    Args:
        rows_FD: decoder rows.
    """
    length_F = torch.linalg.vector_norm(rows_FD.double(), dim=1)
    if not bool(torch.isfinite(length_F).all()):
        return "decoder rows are not finite"
    numbers_N = (length_F > 0).nonzero()[:, 0]
    n = len(numbers_N)
    if n < 2:
        return f"{counted(n, 'live latent')}: a cosine needs two"
    unit_ND = (rows_FD[numbers_N] / length_F[numbers_N, None]).to(rows_FD.dtype)
    largest, smallest, opposite, total = [], [], [], 0.0
    for start in range(0, n, AT_ONCE):
        cosine = unit_ND[start : start + AT_ONCE] @ unit_ND.T
        cosine.diagonal(start).fill_(0)
        total += float(cosine.abs().sum(dtype=torch.float64))
        cosine.diagonal(start).fill_(2)
        least = cosine.min(1)
        smallest.append(least.values)
        opposite.append(numbers_N[least.indices])
        cosine.diagonal(start).fill_(-2)
        largest.append(cosine.amax(1))
    return Cosines(
        numbers_N, torch.cat(largest), torch.cat(smallest), torch.cat(opposite), total / (n * (n - 1))
    )


def cosine_figures(found: Cosines | str, of_random: Cosines | str) -> dict[str, Figure]:
    """Compute the figures of an SAE's live decoder rows, beside those of as many random directions."""
    names = ("max_decoder_cosine", "c_dec")
    shares = ("duplicate_fraction", "antipodal_fraction")
    if isinstance(found, str) or isinstance(of_random, str):
        reason = found if isinstance(found, str) else str(of_random)
        return dict.fromkeys(
            [name for each in names for name in (each, f"{each}_random")], absent(reason)
        ) | (dict.fromkeys(shares, absent(reason)))
    return {
        "max_decoder_cosine": _mean(found.largest_N),
        "max_decoder_cosine_random": _mean(of_random.largest_N),
        "c_dec": {"value": found.mean_absolute},
        "c_dec_random": {"value": of_random.mean_absolute},
        "duplicate_fraction": _mean(found.largest_N > DUPLICATE),
        "antipodal_fraction": _mean(found.smallest_N < ANTIPODE),
    }


def random_cosines(rows_FD: Tensor) -> Cosines | str:
    """Compare as many random directions: what is seen without any structure."""
    generator = torch.Generator().manual_seed(0)
    return cosines(torch.randn(rows_FD.shape, generator=generator).to(rows_FD.device))


def _mean(values_N: Tensor) -> Figure:
    return {"value": float(values_N.double().mean())}

"""Where parameters start: directions, the encoder's gain, the decoder's offset."""

import torch
from torch import Tensor

from saemill.train.backends.base import Parameters, chunks
from saemill.train.backends.sparse import Codes, decode, encode, fold_bias, own_codes
from saemill.train.backends.team import Team

CHUNK_BYTES = {"cpu": 1 << 24}
"""Most bytes of pre-activations at once: what stays in a CPU's last cache."""
MOST_CHUNK_BYTES = 1 << 29
"""The same on other devices: what fills a GPU."""


def unit_rows(n_latents: int, d: int, seed: int) -> Tensor:
    """Draw random directions; the encoder starts as their transpose (Gao et al. 2024). float32 [F, D]."""
    rows = torch.randn(n_latents, d, generator=torch.Generator().manual_seed(seed))
    return rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))


def best_gain(sample_TD: Tensor, p: Parameters, k: int, team: Team) -> Tensor:
    """Compute the factor on the encoder with which the first reconstructions fit best, by least squares.

    Without it k unit directions, each with its full projection, overshoot the more the larger k is,
    and the first steps only undo that.

    Args:
        sample_TD: training activations in training units.
        p: with `b_enc_F` 0; where the team splits the latents, this process's.
        k: active latents per token.
        team: the processes that share the SAE.
    """
    n_latents, n_tokens = len(p.w_enc_FD), len(sample_TD)
    bias_F = fold_bias(p.w_enc_FD, p.b_enc_F, p.b_D)
    chunk_bytes = CHUNK_BYTES.get(sample_TD.device.type, MOST_CHUNK_BYTES)
    scratch_TF = sample_TD.new_empty(max(1, chunk_bytes // (n_latents * sample_TD.itemsize)), n_latents)
    codes = [
        encode(sample_TD[chunk], p.w_enc_FD, bias_F, k, scratch_TF)
        for chunk in chunks(n_tokens, 1, len(scratch_TF))
    ]
    own, _ = own_codes(Codes(*(torch.cat(pieces) for pieces in zip(*codes, strict=True))), team)
    e_TD = team.latents.all_reduce(decode(own, p.w_dec_FD)).add_(p.b_D).sub_(sample_TD)
    raw_TD = e_TD.add_(sample_TD).sub_(p.b_D)
    return ((sample_TD - p.b_D) * raw_TD).sum() / raw_TD.square().sum().clamp(min=1e-12)


def geometric_median(x_TD: Tensor, n_iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """Find the point with the least summed distance to all rows (Weiszfeld 1937). [D]."""
    point_D = x_TD.mean(0)
    for _ in range(n_iterations):
        weight_T = 1 / torch.linalg.vector_norm(x_TD - point_D, dim=1).clamp(min=1e-8)
        new_D = weight_T @ x_TD / weight_T.sum()
        moved = torch.linalg.vector_norm(new_D - point_D) / torch.linalg.vector_norm(new_D).clamp(min=1e-8)
        point_D = new_D
        if moved < tolerance:
            break
    return point_D

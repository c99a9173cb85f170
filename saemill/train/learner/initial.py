"""Where training starts: directions, the encoder's gain, the decoder's offset."""

import torch
from torch import Tensor

from saemill.train.backends import codes
from saemill.train.backends.team import ALONE, Team


def unit_rows(n_latents: int, d: int, seed: int) -> Tensor:
    """Random directions; the encoder starts as their transpose (Gao et al. 2024). float32 [F, D]."""
    rows = torch.randn(n_latents, d, generator=torch.Generator().manual_seed(seed))
    return rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))


def best_gain(
    sample_TD: Tensor, w_enc_FD: Tensor, w_dec_FD: Tensor, b_D: Tensor, k: int, team: Team = ALONE
) -> Tensor:
    """The factor on the encoder with which the first reconstructions fit best, by least squares.

    Without it k unit directions, each with its full projection, overshoot the more the larger k is,
    and the first steps only undo that.
    """
    no_bias_F = torch.zeros_like(w_enc_FD[:, 0])
    weights = codes.Weights(w_enc_FD, no_bias_F, w_dec_FD, b_D, product_FD=w_enc_FD, gathered_FD=w_dec_FD)
    room_TF = codes.room(len(w_enc_FD), sample_TD.dtype, sample_TD.device)
    raw_TD = codes.forward(codes.Batch(sample_TD, sample_TD), weights, k, room_TF, team).e_TD
    raw_TD.add_(sample_TD).sub_(b_D)
    return ((sample_TD - b_D) * raw_TD).sum() / raw_TD.square().sum().clamp(min=1e-12)


def geometric_median(x_TD: Tensor, n_iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the least summed distance to all rows (Weiszfeld 1937). [D]."""
    point_D = x_TD.mean(0)
    for _ in range(n_iterations):
        weight_T = 1 / torch.linalg.vector_norm(x_TD - point_D, dim=1).clamp(min=1e-8)
        new_D = weight_T @ x_TD / weight_T.sum()
        moved = torch.linalg.vector_norm(new_D - point_D) / torch.linalg.vector_norm(new_D).clamp(min=1e-8)
        point_D = new_D
        if moved < tolerance:
            break
    return point_D

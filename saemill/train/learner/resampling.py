"""Dead latents of a ReLU SAE begin again from tokens that it reconstructs badly (Bricken et al. 2023).

As in "Towards Monosemanticity", appendix "Neuron resampling": each dead latent is given a token, drawn with a
probability that grows with the square of its squared error. The token's direction becomes the latent's
decoder row and, at a fifth of the mean length of the other latents' rows, its encoder row; its bias becomes
0, and the optimizer forgets what it knew of the three. Three things the source leaves open, or has otherwise:
tokens are those of the batch at hand; none is drawn twice; a token's direction is that of what the SAE
encodes, x − b, and in a transcoder the decoder row points to what the latents are to predict.

The draw is a function of seed and step, so a run that is resumed, or spread over processes, draws the same.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saemill.common.stores.permutation import combine
from saemill.common.world import Group
from saemill.train.backends.base import Batch, chunks
from saemill.train.backends.plain import pre_activations

if TYPE_CHECKING:
    from saemill.train.learner.learner import Learner

ENCODER_SHARE = 0.2
"""Length of a new encoder row, over the mean length of those that are not dead."""
CHUNK_BYTES = 1 << 26
"""Most bytes of pre-activations at once."""


def resample(learner: "Learner", batch: Batch, step: int) -> None:
    """Let a learner's dead latents begin again: all, but for those beyond the number of tokens with an error.

    Args:
        learner: changed in place; where a team splits its latents, all processes call it together.
        batch: the whole batch.
        step: its number.
    """
    p, group = learner.parameters, learner.backend.team.latents
    alive_F = learner.idle_tokens_F <= learner.dead_after_tokens
    dead_S = (~alive_F).nonzero()[:, 0]
    n_dead_P = group.all_gather(torch.tensor([len(dead_S)]), group.size)
    batch = batch.less_skip(p)
    error_T = _squared_errors(learner, batch)
    drawn_S = _draw(error_T, int(n_dead_P.sum()), combine(learner.variant.seed, step))
    first = int(n_dead_P[: group.rank].sum())
    own_S = drawn_S[first : first + len(dead_S)].to(dead_S.device)
    dead_S = dead_S[: len(own_S)]
    encoder_length = ENCODER_SHARE * _mean_length(p.w_enc_FD, alive_F, group)
    p.w_enc_FD[dead_S] = _unit(batch.x_TD[own_S] - p.offset_D) * encoder_length
    p.w_dec_FD[dead_S] = _unit(batch.target_TE[own_S] - p.b_D) * _mean_length(p.w_dec_FD, alive_F, group)
    p.b_enc_F[dead_S] = 0
    learner.begin_again(dead_S)


def _draw(error_T: Tensor, n: int, key: int) -> Tensor:
    """Draw n tokens, or as many as have an error, none twice, by the squares of their squared errors."""
    weight_T = error_T.double().square().nan_to_num(0, 0, 0).cpu()
    n = min(n, int((weight_T > 0).sum()))
    if n == 0:
        return torch.zeros(0, dtype=torch.int64)
    generator = torch.Generator().manual_seed(key)
    # The n earliest of events with these rates (Efraimidis and Spirakis 2006) are such a draw.
    times_T = torch.empty_like(weight_T).exponential_(generator=generator) / weight_T
    return times_T.argsort(stable=True)[:n]


def _squared_errors(learner: "Learner", batch: Batch) -> Tensor:
    """Compute each token's squared error, of the whole batch on every process. float32 [T]."""
    p, backend, errors = learner.parameters, learner.backend, []
    row_bytes = learner.variant.num_latents * 4  # the same on every process: they exchange in each chunk
    for chunk in chunks(len(batch.x_TD), row_bytes, CHUNK_BYTES):
        codes_TF = torch.relu(pre_activations(p, batch.x_TD[chunk], backend.dtype))
        decoded_TE = backend.team.latents.all_reduce(codes_TF @ p.w_dec_FD)
        errors.append((decoded_TE + p.b_D - batch.target_TE[chunk]).square().sum(1))
    return torch.cat(errors)


def _mean_length(rows_FD: Tensor, alive_F: Tensor, group: Group) -> Tensor:
    """Compute the mean length of the rows of all latents that are not dead; 1 where all are."""
    lengths_F = torch.linalg.vector_norm(rows_FD, dim=1)
    sums = group.all_reduce(torch.stack([lengths_F[alive_F].sum(), alive_F.sum()]))
    mean: Tensor = torch.where(sums[1] > 0, sums[0] / sums[1], 1)
    return mean


def _unit(rows_SD: Tensor) -> Tensor:
    """Bring rows to unit length."""
    unit_SD: Tensor = rows_SD / torch.linalg.vector_norm(rows_SD, dim=1, keepdim=True).clamp(min=1e-12)
    return unit_SD

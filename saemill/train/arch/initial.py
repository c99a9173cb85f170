"""Where parameters start: directions, the encoder's gain, the decoder's offset."""

import torch
from torch import Tensor

from saemill.common.sae import layers
from saemill.train.arch import layered
from saemill.train.backends.architecture import Inference, Sample
from saemill.train.backends.base import chunks
from saemill.train.backends.codes import Codes, Largest
from saemill.train.backends.parameters import Parameters
from saemill.train.backends.sparse import decode, encode, fold_bias, own_codes
from saemill.train.backends.team import Team

CHUNK_BYTES = {"cpu": 1 << 24}
"""Most bytes of pre-activations at once: what stays in a CPU's last cache."""
MOST_CHUNK_BYTES = 1 << 29
"""The same on other devices: what fills a GPU."""
CUTOFF_RANKS = 4
"""Latents of a token, as a multiple of those wanted on the average, among which a common cutoff is sought."""
START_L0 = 64
"""Active latents per token at the start, where a penalty and no number decides how many there are."""
LEAST_SHARE = 16
"""At most one latent in so many is active then."""
RIDGE = 1e-2
"""What a regression adds to the variance of each dimension, which is 1 on the average."""


def start_l0(n_latents: int) -> int:
    """Choose how many latents of a token are active at the start, where no number says so."""
    return max(1, min(START_L0, n_latents // LEAST_SHARE))


def annealed(start: float, end: float, step: int, n_steps: int) -> float:
    """Compute what a number is at a step, that goes from its start to its end by equal factors."""
    if step >= n_steps or start <= end:
        return end
    return float(start * (end / start) ** (step / n_steps))


def warmed(weight: float, step: int, n_steps: int) -> float:
    """Compute a weight at a step, that rises by equal steps until it is whole."""
    return weight * min(1.0, (step + 1) / n_steps) if n_steps else weight


def tied(p: Parameters, n_latents: int, seed: int, sample: Sample, rule: Largest, team: Team) -> None:
    """Fill in random unit rows as the decoder, and as the encoder times the gain that fits best.

    Where y is to be predicted from x, the encoder looks for what its rows are in x: by y ≈ R x their products
    with R. So does that of each layer of a cross-layer transcoder.

    Args:
        p: `b_D` is there already; where the team splits the latents, this process's.
        n_latents: F of the whole SAE.
        seed: of the rows.
        sample: training activations in training units.
        rule: which pre-activations are codes, with which the gain is found.
        team: the processes that share the SAE.
    """
    if p.n_layers > 1:
        layered.directions(p, seed)
        own = zip(layered.parts(sample, p.n_layers), layers.blocks(p.w_dec_FD, p.n_layers), strict=True)
        p.w_enc_FD.copy_(torch.cat([rows_FD @ regression(some) for some, rows_FD in own]))
        layered.scale(p, sample, rule.k)
        return
    rows_FD = unit_rows(n_latents, len(p.b_D), seed)[team.latents.slice_of(n_latents)]
    p.w_dec_FD.copy_(rows_FD)
    is_same = sample.y_TE is sample.x_TD
    p.w_enc_FD.copy_(p.w_dec_FD if is_same else p.w_dec_FD @ regression(sample))
    p.w_enc_FD.mul_(best_gain(sample, p, rule, team))


def regression(sample: Sample) -> Tensor:
    """Compute the matrix of the linear map from x that predicts y best, by least squares. [E, D]

    A little is added to the variance of each dimension (ridge regression): where tokens are few, or lie in
    fewer dimensions than D, it would else learn noise.
    """
    x_TD, y_TE = (rows.double() for rows in sample)
    gram_DD = x_TD.T @ x_TD
    gram_DD.diagonal().add_(RIDGE * len(x_TD))
    map_DE: Tensor = torch.linalg.solve(gram_DD, x_TD.T @ y_TE)
    return map_DE.T.float()


def cutoff(sample: Sample, p: Parameters, k: int, team: Team) -> float:
    """Find the pre-activation that k latents per token pass on the average, 0 if fewer are above 0."""
    if p.n_layers > 1:
        return layered.cutoff(p, sample, k)
    group, n_tokens = team.latents, len(sample.x_TD)
    n_ranks = min(
        CUTOFF_RANKS * k, min(group.all_gather(torch.tensor([len(p.w_enc_FD)]), group.size).tolist())
    )
    own_TK = _codes(sample.x_TD, p, Largest(n_ranks)).val_TK
    every = group.all_gather(own_TK, group.size * n_tokens).view(group.size, n_tokens, n_ranks)
    # Of each token as many as one process alone would look at.
    every = (
        every.transpose(0, 1).flatten(1).topk(min(CUTOFF_RANKS * k, group.size * n_ranks)).values.flatten()
    )
    n_kept = min(k * n_tokens, len(every))
    return float(every.kthvalue(len(every) - n_kept + 1).values)


def tied_with_bias(p: Parameters, n_latents: int, seed: int, sample: Sample, team: Team) -> None:
    """Fill in as `tied`, and the encoder's bias so that `start_l0` latents per token are above 0."""
    n_active = start_l0(n_latents)
    tied(p, n_latents, seed, sample, Largest(n_active), team)
    p.b_enc_F.fill_(-cutoff(sample, p, n_active, team))


def restored(p: Parameters, form: Inference) -> None:
    """Fill in the weights and the encoder's bias of a finished SAE."""
    p.w_enc_FD.copy_(form.w_enc_FD)
    p.b_enc_F.copy_(form.b_enc_F)
    p.w_dec_FD.copy_(form.w_dec_FD)


def unit_rows(n_latents: int, d: int, seed: int) -> Tensor:
    """Draw random directions; the encoder starts as their transpose (Gao et al. 2024). float32 [F, D]."""
    rows = torch.randn(n_latents, d, generator=torch.Generator().manual_seed(seed))
    return rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))


def best_gain(sample: Sample, p: Parameters, rule: Largest, team: Team) -> Tensor:
    """Compute the factor on the encoder with which the first reconstructions fit best, by least squares.

    Without it k unit directions, each with its full projection, overshoot the more the larger k is,
    and the first steps only undo that.

    Args:
        sample: training activations in training units.
        p: with `b_enc_F` 0; where the team splits the latents, this process's.
        rule: which pre-activations are codes.
        team: the processes that share the SAE.
    """
    own, _ = own_codes(_codes(sample.x_TD, p, rule), team)
    e_TD = team.latents.all_reduce(decode(own, p.w_dec_FD)).add_(p.b_D).sub_(sample.y_TE)
    raw_TD = e_TD.add_(sample.y_TE).sub_(p.b_D)
    return ((sample.y_TE - p.b_D) * raw_TD).sum() / raw_TD.square().sum().clamp(min=1e-12)


def _codes(sample_TD: Tensor, p: Parameters, rule: Largest) -> Codes:
    """Find the codes of each token among this process's latents."""
    n_latents, n_tokens = len(p.w_enc_FD), len(sample_TD)
    bias_F = fold_bias(p.w_enc_FD, p.b_enc_F, p.offset_D)
    chunk_bytes = CHUNK_BYTES.get(sample_TD.device.type, MOST_CHUNK_BYTES)
    scratch_TF = sample_TD.new_empty(max(1, chunk_bytes // (n_latents * sample_TD.itemsize)), n_latents)
    codes = [
        encode(sample_TD[chunk], p.w_enc_FD, bias_F, rule, scratch_TF)
        for chunk in chunks(n_tokens, 1, len(scratch_TF))
    ]
    return Codes(torch.cat([some.val_TK for some in codes]), torch.cat([some.idx_TK for some in codes]))


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

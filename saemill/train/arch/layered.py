"""Where the parameters of a cross-layer transcoder start: each layer as a transcoder of its own."""

from collections.abc import Iterator

import torch
from torch import Tensor

from saemill.common.sae import layers
from saemill.train.arch import dense
from saemill.train.backends.architecture import Sample
from saemill.train.backends.base import chunks
from saemill.train.backends.cutoff import Best
from saemill.train.backends.parameters import Parameters
from saemill.train.backends.plain import CHUNK_BYTES, MOST_CHUNK_BYTES, decode, pre_activations
from saemill.train.backends.team import ALONE


def directions(p: Parameters, seed: int) -> None:
    """Fill in random decoders, of unit length over all sites that a latent writes to."""
    rows = torch.randn(p.w_dec_FD.shape, generator=torch.Generator().manual_seed(seed))
    p.w_dec_FD.copy_(layers.unit_rows(rows, p.n_layers))


def parts(sample: Sample, n_layers: int) -> Iterator[Sample]:
    """Yield what each layer's latents read and what they predict, [T, D] and [T, (L − l) E]."""
    x_LTD = sample.x_TD.chunk(n_layers, 1)
    width = sample.y_TE.shape[1] // n_layers
    return (Sample(x_TD, sample.y_TE[:, layer * width :]) for layer, x_TD in enumerate(x_LTD))


def scale(p: Parameters, sample: Sample, k: int) -> None:
    """Multiply the encoder by the gain with which the first predictions fit best, by least squares."""
    each = p.n_layers * max(1, round(k / p.n_layers))
    without_bias = p._replace(b_D=torch.zeros_like(p.b_D))
    along, squares = (torch.zeros((), device=p.b_D.device) for _ in range(2))
    for some, pre_TF in _pre_activations(p, sample):
        raw_TE = decode(without_bias, dense.keep_largest(pre_TF, each, p.n_layers))
        along += ((some.y_TE - p.b_D) * raw_TE).sum()
        squares += raw_TE.square().sum()
    p.w_enc_FD.mul_(along / squares.clamp(min=1e-12))


def cutoff(p: Parameters, sample: Sample, k: int) -> float:
    """Find the pre-activation that k latents per token pass on the average, 0 if fewer are above 0."""
    best = Best(k * len(sample.x_TD), p.b_D.device)
    for _, pre_TF in _pre_activations(p, sample):
        best.add(pre_TF.flatten())
    return float(best.cutoff(ALONE)[0])


def _pre_activations(p: Parameters, sample: Sample) -> Iterator[tuple[Sample, Tensor]]:
    """Yield some tokens at a time with their pre-activations."""
    chunk_bytes = CHUNK_BYTES.get(p.b_D.device.type, MOST_CHUNK_BYTES)
    for chunk in chunks(len(sample.x_TD), len(p.b_enc_F) * 4, chunk_bytes):
        some = Sample(sample.x_TD[chunk], sample.y_TE[chunk])
        yield some, pre_activations(p, some.x_TD, torch.float32)

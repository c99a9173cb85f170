"""Other tools' ways of encoding, folded into the tensors of the `Sae` that computes the same."""

from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 4096
"""Rows that are multiplied at a time in float64."""


class Tensors(NamedTuple):
    """The tensors of `Parts`."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None = None
    W_skip: Tensor | None = None


def scaled(tensors: Tensors, scale: float, scale_out: float | None = None) -> Tensors:
    """Fold the factor by which activations are multiplied before the SAE sees them, and by which its output
    is divided.

    Args:
        tensors: of the SAE that sees scaled activations; W_enc [F, D], W_dec [F, E].
        scale: the factor.
        scale_out: that of what a transcoder predicts, if it is another.
    """
    scale_out = scale if scale_out is None else scale_out
    if scale == scale_out == 1.0:
        return tensors
    W_enc, b_enc, W_dec, b_dec = map(widened, tensors[:4])
    W_skip = tensors.W_skip
    if W_skip is not None:
        W_skip = widened(W_skip) * (scale / scale_out)
    return Tensors(W_enc * scale, b_enc, W_dec / scale_out, b_dec / scale_out, tensors.threshold, W_skip)


def centred(tensors: Tensors) -> Tensors:
    """Fold that the tool does not subtract b_dec before encoding, as `Sae` does, into b_enc."""
    W_enc, b_enc, W_dec, b_dec = map(widened, tensors[:4])
    shift = [rows.double() @ b_dec.double() for rows in torch.split(W_enc, ROWS)]
    b_enc = (b_enc.double() + torch.cat(shift)).to(b_enc.dtype)
    return tensors._replace(W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec)


def widened(weights: Tensor) -> Tensor:
    """Return weights as float32 at least: what is folded is rounded once more, and bfloat16 would let other
    latents through."""
    return weights.to(torch.promote_types(weights.dtype, torch.float32))


def non_negative(threshold_F: Tensor) -> Tensor:
    """Return thresholds as an SAE holds them, float32 and 0 or more.

    Every tool has a ReLU beside the threshold, so that a negative one lets through what 0 does. A NaN stays.
    """
    return threshold_F.float().clamp(min=0).contiguous()


def gated(
    W_enc_FD: Tensor, b_gate_F: Tensor, b_mag_F: Tensor, r_mag_F: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Fold a gate and a magnitude, which share an encoder, into one encoder with thresholds.

    With u = W_enc x: the gate is open where u + b_gate > 0, which is where the magnitude
    exp(r_mag) u + b_mag is above b_mag − exp(r_mag) b_gate.

    Returns: W_enc [F, D], b_enc [F], threshold [F], in the dtype of the arguments.
    """
    gain_F = r_mag_F.exp()
    return W_enc_FD * gain_F[:, None], b_mag_F, b_mag_F - gain_F * b_gate_F


def lengths(W_dec_FD: Tensor) -> Tensor:
    """Measure decoder rows. The bound, which is SAELens', keeps latents without a decoder finite."""
    norms_F: Tensor = W_dec_FD.norm(dim=1)
    return norms_F.clamp(min=1e-8)


def unit_rows(W_enc_FD: Tensor, b_enc_F: Tensor, W_dec_FD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Move the length of decoder rows to the encoder, as the tools themselves do."""
    norms_F = lengths(W_dec_FD)
    return W_enc_FD * norms_F[:, None], b_enc_F * norms_F, W_dec_FD / norms_F[:, None]


def are_unit(W_dec_FD: Tensor) -> bool:
    """Tell whether decoder rows are of unit length, by the measure of dictionary_learning."""
    norms_F = W_dec_FD.norm(dim=1)
    return bool(torch.allclose(norms_F, torch.ones_like(norms_F)))

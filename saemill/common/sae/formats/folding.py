"""Other tools' ways of choosing latents, folded into the threshold of a latent."""

import torch
from torch import Tensor


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


def unit_rows(W_enc_FD: Tensor, b_enc_F: Tensor, W_dec_FD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Move the length of decoder rows to the encoder, as the tools themselves do."""
    # The bound, which is SAELens', keeps latents without a decoder finite.
    norms_F = W_dec_FD.norm(dim=1).clamp(min=1e-8)
    return W_enc_FD * norms_F[:, None], b_enc_F * norms_F, W_dec_FD / norms_F[:, None]


def are_unit(W_dec_FD: Tensor) -> bool:
    """Tell whether decoder rows are of unit length, by the measure of dictionary_learning."""
    norms_F = W_dec_FD.norm(dim=1)
    return bool(torch.allclose(norms_F, torch.ones_like(norms_F)))

"""AuxK (Gao et al. 2024, A.2): dead latents learn to reconstruct what the living ones leave over."""

from typing import NamedTuple

import torch
from torch import Tensor

from saemill.common.topk import topk
from saemill.train.codes import CHUNK_BYTES, Batch, Forward, Weights, chunks


class DeadRows(NamedTuple):
    """Gradients of the dead latents' parameters, float32."""

    dead_S: Tensor
    """int64, the dead latents' numbers, ascending."""
    w_enc_SD: Tensor
    b_enc_S: Tensor
    w_dec_SD: Tensor
    """Without its part along each row."""


def auxk(
    batch: Batch, passed: Forward, dead_S: Tensor, weights: Weights, *, k_aux: int, scale: float
) -> tuple[DeadRows, Tensor]:
    """The k_aux most active dead latents fit the residual −e.

    ê = Σ val · W_dec[idx] over the dead latents' top-k, without bias; L_aux = scale · Σ (ê + e)²
    with e detached. Work is dense, on the dead rows alone, in the dtype of the encoder's product.
    The gradient reaches the encoder and the decoder of the dead latents, and b through the encoder.

    Args:
        batch: T tokens.
        passed: of the same batch.
        dead_S: int64, at least one.
        weights: of the variant.
        k_aux: latents per token; all of the dead ones if there are fewer.
        scale: weight of the squared error.

    Returns: the gradients and L_aux.
    """
    product_TD = batch.product_TD
    dtype = product_TD.dtype
    e_TD, bias_S = passed.e_TD, passed.bias_F[dead_S].to(dtype)
    w_enc_SD, w_dec_SD = weights.product_FD[dead_S], weights.w_dec_FD[dead_S]
    rounded_SD = w_dec_SD.to(dtype)
    grad_enc_SD, grad_dec_SD = torch.zeros_like(w_dec_SD), torch.zeros_like(w_dec_SD)
    grad_bias_S, squares = torch.zeros_like(w_dec_SD[:, 0]), torch.zeros_like(passed.sse)
    row_bytes = len(dead_S) * dtype.itemsize
    for chunk in chunks(len(e_TD), row_bytes, CHUNK_BYTES[e_TD.device.type]):
        acts_tS = _activations(torch.addmm(bias_S, product_TD[chunk], w_enc_SD.T), k_aux)
        difference_tD = torch.addmm(e_TD[chunk].to(dtype), acts_tS, rounded_SD)
        squares += difference_tD.float().square().sum()
        grad_dec_SD += acts_tS.T @ difference_tD
        dpre_tS = (difference_tD @ rounded_SD.T).mul_(acts_tS > 0)
        grad_enc_SD += dpre_tS.T @ product_TD[chunk]
        grad_bias_S += dpre_tS.float().sum(0)
    grad_enc_SD.addr_(grad_bias_S, weights.b_D, alpha=-1)
    along_S1 = (grad_dec_SD * w_dec_SD).sum(1, keepdim=True)
    grad_dec_SD.addcmul_(along_S1, w_dec_SD, value=-1)
    twice = 2 * scale
    rows = DeadRows(dead_S, grad_enc_SD.mul_(twice), grad_bias_S.mul_(twice), grad_dec_SD.mul_(twice))
    return rows, squares * scale


def _activations(pre_TS: Tensor, k_aux: int) -> Tensor:
    """The k_aux largest of each row, rectified, in place among zeros."""
    if pre_TS.shape[1] <= k_aux:
        return pre_TS.relu_()
    values, places = topk(pre_TS, k_aux)
    return torch.zeros_like(pre_TS).scatter_(1, places, values)

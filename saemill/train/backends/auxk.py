"""AuxK (Gao et al. 2024, A.2): dead latents learn to reconstruct what the living ones leave over."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from saemill.common.sae.topk import topk
from saemill.train.backends.codes import Batch, Forward, Weights, chunks
from saemill.train.backends.team import ALONE, Team

CHUNK_BYTES = {"cpu": 1 << 23, "cuda": 1 << 29}
"""Most bytes of pre-activations at once. Larger pieces of a CPU's memory go back to the system in every step,
which then hands out new pages."""
LEAST_TOKENS = 512
"""Of a chunk, whatever its bytes: each adds to gradients of all dead rows."""


class DeadRows(NamedTuple):
    """Gradients of the dead latents' parameters, float32."""

    dead_S: Tensor
    """int64, the dead latents' numbers, ascending, then F in rows without one, whose gradients are 0."""
    w_enc_SD: Tensor
    b_enc_S: Tensor
    w_dec_SD: Tensor
    """Without its part along each row."""


class Ways(NamedTuple):
    """How the parts that are no products are computed."""

    keep_largest: Callable[[Tensor, int], Tensor]
    keep_active: Callable[[Tensor, Tensor], Tensor]


def keep_largest(pre_TS: Tensor, k: int) -> Tensor:
    """The k largest entries of each row, rectified, in their places among zeros."""
    values, places = topk(pre_TS, k)
    return torch.zeros_like(pre_TS).scatter_(1, places, values)


def keep_active(dpre_TS: Tensor, acts_TS: Tensor) -> Tensor:
    """Set, in place, the gradients of inactive latents to 0; the sums over tokens, float32 [S]."""
    return dpre_TS.mul_(acts_TS > 0).float().sum(0)


IN_TORCH = Ways(keep_largest, keep_active)


def auxk(
    batch: Batch,
    passed: Forward,
    dead_S: Tensor,
    weights: Weights,
    *,
    k_aux: int,
    scale: float | Tensor,
    n_dead: int,
    team: Team = ALONE,
    ways: Ways = IN_TORCH,
) -> tuple[DeadRows, Tensor]:
    """The k_aux most active dead latents fit the residual −e.

    ê = Σ val · W_dec[idx] over the dead latents' top-k, without bias; L_aux = scale · Σ (ê + e)²
    with e detached. Work is dense, on the dead rows alone, in the dtype of the encoder's product.
    The gradient reaches the encoder and the decoder of the dead latents, and b through the encoder.

    Args:
        batch: T tokens; where the team splits them, this process's.
        passed: of the same tokens.
        dead_S: int64; where the team splits the latents, this process's, perhaps none. F stands for no
            latent: it is never active and changes nothing.
        weights: of the variant.
        k_aux: latents per token; all of the dead ones if there are fewer.
        scale: weight of the squared error; may lie on the device.
        n_dead: dead latents in the whole team, at least one; those that stand for none included.
        team: the processes to add up with.
        ways: of computing it, by default the functions of this module.

    Returns: the gradients and L_aux, over all tokens of the team.
    """
    product_TD = batch.product_TD
    dtype = product_TD.dtype
    e_TD, bias_S = passed.e_TD, pad(passed.bias_F, (0, 1), value=-torch.inf)[dead_S].to(dtype)
    row_S = dead_S.clamp(max=len(passed.bias_F) - 1)
    w_enc_SD, w_dec_SD = weights.product_FD[row_S], weights.w_dec_FD[row_S]
    rounded_SD = w_dec_SD.to(dtype)
    grad_enc_SD, grad_dec_SD = torch.zeros_like(w_dec_SD), torch.zeros_like(w_dec_SD)
    grad_bias_S, squares = torch.zeros_like(w_dec_SD[:, 0]), torch.zeros_like(passed.sse)
    row_bytes = n_dead * dtype.itemsize  # the same on every process: they meet in each chunk
    for chunk in chunks(len(e_TD), row_bytes, max(CHUNK_BYTES[e_TD.device.type], LEAST_TOKENS * row_bytes)):
        pre_tS = torch.addmm(bias_S, product_TD[chunk], w_enc_SD.T)
        acts_tS = _activations(pre_tS, k_aux, n_dead, team, ways)
        once_tD = e_TD[chunk].to(dtype) if team.latents.rank == 0 else torch.zeros_like(product_TD[chunk])
        difference_tD = team.latents.sum_(torch.addmm(once_tD, acts_tS, rounded_SD))
        squares += torch.linalg.vector_norm(difference_tD, dim=1, dtype=torch.float32).square().sum()
        grad_dec_SD += acts_tS.T @ difference_tD
        dpre_tS = difference_tD @ rounded_SD.T
        grad_bias_S += ways.keep_active(dpre_tS, acts_tS)
        grad_enc_SD += dpre_tS.T @ product_TD[chunk]
    for over_tokens in (grad_enc_SD, grad_dec_SD, grad_bias_S, squares):
        team.tokens.sum_(over_tokens)
    grad_enc_SD.addr_(grad_bias_S, weights.b_D, alpha=-1)
    along_S1 = (grad_dec_SD * w_dec_SD).sum(1, keepdim=True)
    grad_dec_SD.addcmul_(along_S1, w_dec_SD, value=-1)
    twice = 2 * scale
    rows = DeadRows(dead_S, grad_enc_SD.mul_(twice), grad_bias_S.mul_(twice), grad_dec_SD.mul_(twice))
    return rows, squares * scale


def _activations(pre_tS: Tensor, k_aux: int, n_dead: int, team: Team, ways: Ways) -> Tensor:
    """Of each row the entries that are among the team's k_aux largest, rectified, in place among zeros."""
    if n_dead <= k_aux:
        return pre_tS.relu_()
    if team.latents.size == 1:
        return ways.keep_largest(pre_tS, k_aux)
    n_here = pre_tS.shape[1]
    k = min(k_aux, n_here)
    values, places = topk(pre_tS, k) if k < n_here else (pre_tS.relu_(), None)
    mine, _ = team.among_all(pad(values, (0, k_aux - k)))
    values = values.where(mine[:, :k], 0)
    return values if places is None else torch.zeros_like(pre_tS).scatter_(1, places, values)

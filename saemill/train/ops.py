"""The arithmetic of one training step, in plain torch: definitions with their gradients by hand.

Notation, for one variant: x_TD inputs (centred and scaled), b_D = b_dec − centre,
pre = (x − b) W_encᵀ + b_enc, the k largest kept and rectified: values val_TK of latents idx_TK,
x̂ = val · W_dec[idx] + b, e = x̂ − x, L = c · Σ e². With g = 2 c e:

    dval_tk   = ⟨g_t, W_dec[idx_tk]⟩ where val > 0
    dW_dec[f] = Σ val_tk g_t,   dW_enc[f] = Σ dval_tk (x_t − b),   db_enc[f] = Σ dval_tk
    db        = Σ_t g_t − db_enc · W_enc

the sums over pairs with idx_tk = f. Only T·K pairs are touched; nothing of size T·F is kept and
nothing of size T·K·D is made.
"""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from saemill.common.topk import topk

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)

CHUNK_BYTES = 1 << 27
"""Most bytes of pre-activations in memory at once."""


class Codes(NamedTuple):
    """The active latents of a batch."""

    val_TK: Tensor
    """float32, 0 or more."""
    idx_TK: Tensor
    """int64, latents' numbers."""


class Gradients(NamedTuple):
    """Gradients of one variant's parameters, all float32."""

    w_enc_FD: Tensor
    b_enc_F: Tensor
    w_dec_FD: Tensor
    b_D: Tensor


def encode(x_TD: Tensor, w_enc_FD: Tensor, b_enc_F: Tensor, b_D: Tensor, k: int, dtype: torch.dtype) -> Codes:
    """The codes of a batch, by a dense product in `dtype` and an exact top-k.

    The offset b is folded into the bias with the same rounded weights as the product uses; with
    other weights the error per latent would be systematic.

    Args:
        x_TD, w_enc_FD, b_enc_F, b_D: float32.
        k: active latents per token.
        dtype: float32 or bfloat16.
    """
    weights_DF = w_enc_FD.to(dtype).T
    bias_F = b_enc_F - (b_D.to(dtype) @ weights_DF).float()
    rows = max(1, CHUNK_BYTES // (len(w_enc_FD) * dtype.itemsize))
    values, indices = [], []
    for part_TD in torch.split(x_TD.to(dtype), rows):
        value, index = topk(torch.addmm(bias_F.to(dtype), part_TD, weights_DF), k)
        values.append(value.float().relu_())
        indices.append(index)
    return Codes(torch.cat(values), torch.cat(indices))


def decode(codes: Codes, w_dec_FD: Tensor, b_D: Tensor) -> Tensor:
    """x̂_TD = Σ_k val · W_dec[idx] + b, float32."""
    return embedding_bag(codes.idx_TK, w_dec_FD, per_sample_weights=codes.val_TK, mode="sum") + b_D


def code_gradient(g_TD: Tensor, codes: Codes, w_dec_FD: Tensor) -> Tensor:
    """dval_tk = ⟨g_t, W_dec[idx_tk]⟩ where val > 0, else 0. float32 [T, K]."""
    n_tokens, k = codes.idx_TK.shape
    flat = codes.idx_TK.reshape(-1)
    device = flat.device
    offsets = torch.arange(0, n_tokens * k, k, device=device)
    bag_of_pair = torch.arange(n_tokens, device=device).repeat_interleave(k)
    dval = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        g_TD, w_dec_FD, flat, offsets, bag_of_pair, 0, -1
    )
    return torch.where(codes.val_TK > 0, dval.view(n_tokens, k), 0.0)


def gradients(
    x_TD: Tensor, g_TD: Tensor, codes: Codes, w_enc_FD: Tensor, w_dec_FD: Tensor, b_D: Tensor
) -> Gradients:
    """All gradients of one variant from g = ∂L/∂x̂; the pairs are sorted by latent once."""
    n_latents, n_tokens = len(w_enc_FD), len(x_TD)
    k = codes.idx_TK.shape[1]
    dval_TK = code_gradient(g_TD, codes, w_dec_FD)
    flat = codes.idx_TK.reshape(-1)
    order = torch.argsort(flat, stable=True)
    rows = torch.zeros(n_latents + 1, dtype=torch.int64, device=flat.device)
    rows[1:] = torch.bincount(flat, minlength=n_latents).cumsum(0)
    token = order // k

    def per_latent(pairs_TK: Tensor, dense_TD: Tensor) -> Tensor:
        values = pairs_TK.reshape(-1)[order]
        sparse = torch.sparse_csr_tensor(rows, token, values, (n_latents, n_tokens), check_invariants=False)
        product: Tensor = sparse @ dense_TD
        return product

    db_enc_F = torch.zeros(n_latents, device=flat.device).index_add_(0, flat, dval_TK.reshape(-1))
    dw_enc_FD = per_latent(dval_TK, x_TD).addr_(db_enc_F, b_D, alpha=-1)
    dw_dec_FD = per_latent(codes.val_TK, g_TD)
    return Gradients(dw_enc_FD, db_enc_F, dw_dec_FD, g_TD.sum(0) - db_enc_F @ w_enc_FD)


def add_auxk(
    grads: Gradients,
    x_TD: Tensor,
    e_TD: Tensor,
    dead: Tensor,
    w_enc_FD: Tensor,
    b_enc_F: Tensor,
    w_dec_FD: Tensor,
    b_D: Tensor,
    *,
    k_aux: int,
    scale: float,
) -> tuple[Gradients, Tensor]:
    """AuxK (Gao et al. 2024, A.2): the k_aux most active dead latents fit the residual −e.

    ê = Σ val · W_dec[idx] over the dead latents' top-k, without bias; L_aux = scale · Σ (ê + e)²
    with e detached. Work is dense on the dead rows alone. The gradient reaches the encoder and the
    decoder of the dead latents, and b through the encoder.

    Args:
        grads: the main loss's gradients.
        dead: int64 [n_dead], numbers of the dead latents, at least one.
        k_aux: latents per token, cut to n_dead.
        scale: weight of the squared error.

    Returns: the gradients with those of L_aux added, and L_aux.
    """
    w_e, w_d = w_enc_FD[dead], w_dec_FD[dead]
    pre = torch.addmm(b_enc_F[dead], x_TD - b_D, w_e.T)
    value, place = pre.topk(min(k_aux, len(dead)), sorted=False)
    acts = torch.zeros_like(pre).scatter_(1, place, value.relu())
    difference_TD = torch.addmm(e_TD, acts, w_d)
    g_TD = difference_TD * (2 * scale)
    dpre = (g_TD @ w_d.T) * (acts > 0)
    db_enc = dpre.sum(0)
    grads.w_dec_FD.index_add_(0, dead, acts.T @ g_TD)
    grads.w_enc_FD.index_add_(0, dead, dpre.T @ (x_TD - b_D))
    grads.b_enc_F.index_add_(0, dead, db_enc)
    return grads._replace(b_D=grads.b_D - db_enc @ w_e), scale * difference_TD.square().sum()


def project(dw_dec_FD: Tensor, w_dec_FD: Tensor) -> Tensor:
    """The decoder's gradient without its part along each (unit) row, which renorming would undo."""
    along_F1 = (dw_dec_FD * w_dec_FD).sum(1, keepdim=True)
    return torch.addcmul(dw_dec_FD, along_F1, w_dec_FD, value=-1)


def row_lengths(w_dec_FD: Tensor) -> Tensor:
    """Euclidean length of each row, [F, 1]: what decoder rows are divided by after each step."""
    lengths_F1: Tensor = torch.linalg.vector_norm(w_dec_FD, dim=1, keepdim=True)
    return lengths_F1


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

"""Cross-layer transcoders as whole matrices, float64: what their compact weights stand for."""

import torch
from torch import Tensor


def whole_encoder(w_enc_FD: Tensor, n_layers: int) -> Tensor:
    """[F, L D], block by block along the diagonal."""
    return torch.block_diag(*w_enc_FD.chunk(n_layers))


def whole_decoder(w_dec: Tensor, n_layers: int) -> Tensor:
    """[F, L E]: of each latent zeros before its own layer, then its rows one after another, as they come."""
    n_each = 2 * len(w_dec) // (n_layers * (n_layers + 1))
    rows, whole = iter(w_dec), []
    for layer in range(n_layers):
        for _ in range(n_each):
            zeros = [w_dec.new_zeros(w_dec.shape[1])] * layer
            whole.append(torch.cat([*zeros, *(next(rows) for _ in range(n_layers - layer))]))
    return torch.stack(whole)

"""The weights of a cross-layer transcoder: latents that read one layer and write to it and to all later ones.

Its input is the L sites that it reads side by side, [L D], its output the L sites that it predicts, [L E]. It
has F latents, those of layer 0 first, F/L of each layer. None of the zeros of a whole matrix are kept:

    W_enc [F, D]            of a latent of layer l the weights on site l
    W_dec [F (L + 1)/2, E]  of each latent a row for site l, l + 1, …, L − 1: L rows of a latent of layer 0,
                            one of a latent of the last
    W_skip [L E, D]         where there is one, the linear map from each site to its own layer's output

With one layer these are the weights of a transcoder, [F, D] and [F, E].
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def n_rows(n_latents: int, n_layers: int) -> int:
    """Count the rows of W_dec."""
    return n_latents * (n_layers + 1) // 2


def blocks(w_dec: Tensor, n_layers: int) -> list[Tensor]:
    """Cut W_dec into the decoders of the layers' latents: views [F/L, (L − l) E], a row per latent.

    Args:
        w_dec: float [F (L + 1)/2, E].
        n_layers: L.
    """
    n_each = 2 * len(w_dec) // (n_layers * (n_layers + 1))
    sizes = [n_each * (n_layers - layer) for layer in range(n_layers)]
    return [rows.view(n_each, -1) for rows in torch.split(w_dec, sizes)]


def whole_rows(w_dec: Tensor, n_layers: int) -> Tensor:
    """Write each latent's decoder as a row over all sites, 0 at those before its own. [F, L E]"""
    width = w_dec.shape[1]
    rows = [nn.functional.pad(own, (layer * width, 0)) for layer, own in enumerate(blocks(w_dec, n_layers))]
    return torch.cat(rows)


def unit_rows(w_dec: Tensor, n_layers: int) -> Tensor:
    """Divide each latent's decoder by its length over all sites that it writes to; shaped as `w_dec`."""
    rows = [own / torch.linalg.vector_norm(own, dim=1, keepdim=True) for own in blocks(w_dec, n_layers)]
    return torch.cat([own.view(-1, w_dec.shape[1]) for own in rows])


def lengths(w_dec: Tensor, scales: Sequence[float]) -> Tensor:
    """Compute the length of each latent's decoder, each site's part of it times a scale. [F]"""
    n = len(scales)
    each = w_dec.new_tensor(scales)
    rows = [own.view(len(own), n - layer, -1) for layer, own in enumerate(blocks(w_dec, n))]
    parts = [own * each[layer:, None] for layer, own in enumerate(rows)]
    return torch.cat([torch.linalg.vector_norm(own.flatten(1), dim=1) for own in parts])


def skipped(x: Tensor, w_skip: Tensor, n_layers: int) -> Tensor:
    """Compute W_skip x, each layer's output from its own site. [T, L D] → [T, L E], differentiable."""
    x_LTD = x.reshape(len(x), n_layers, -1).transpose(0, 1)
    w_LED = w_skip.view(n_layers, -1, x_LTD.shape[2])
    return torch.bmm(x_LTD, w_LED.mT).transpose(0, 1).flatten(1)


def pre_activations(x: Tensor, w_enc_FD: Tensor, b_enc_F: Tensor, n_layers: int) -> Tensor:
    """Compute W_enc x + b_enc, each layer's latents from its own site. [T, L D] → [T, F], differentiable."""
    n_latents, d = w_enc_FD.shape
    x_LTD = x.view(-1, n_layers, d).transpose(0, 1)
    w_LDF = w_enc_FD.view(n_layers, n_latents // n_layers, d).mT
    b_L1F = b_enc_F.view(n_layers, 1, -1)
    return torch.baddbmm(b_L1F, x_LTD, w_LDF).transpose(0, 1).flatten(1)


def decode(codes_TF: Tensor, w_dec: Tensor, n_layers: int) -> Tensor:
    """Add up what codes write to each site. [T, F] → [T, L E], differentiable, without the bias."""
    width = w_dec.shape[1]
    out = codes_TF.new_zeros(len(codes_TF), n_layers * width)
    own = codes_TF.chunk(n_layers, 1)
    for layer, (codes_Tf, rows) in enumerate(zip(own, blocks(w_dec, n_layers), strict=True)):
        out[:, layer * width :] += codes_Tf @ rows
    return out


def decode_active(acts_TK: Tensor, latents_TK: Tensor, w_dec: Tensor, n_layers: int) -> Tensor:
    """Do the same for active latents in slots: activations and int64 numbers [T, K] → [T, L E].

    At a site the slots of later layers' latents count as unused: 0, of row 0.
    """
    n_each = 2 * len(w_dec) // (n_layers * (n_layers + 1))
    layer_TK, own_TK = latents_TK // n_each, latents_TK % n_each
    # Before layer l there are n_each (L + (L − 1) + …) rows, l of these summands.
    first_TK = n_each * (layer_TK * n_layers - layer_TK * (layer_TK - 1) // 2) + own_TK * (
        n_layers - layer_TK
    )
    sites = []
    for site in range(n_layers):
        writes_TK = layer_TK <= site
        sites.append(
            nn.functional.embedding_bag(
                torch.where(writes_TK, first_TK + site - layer_TK, 0),
                w_dec,
                per_sample_weights=torch.where(writes_TK, acts_TK, 0).to(w_dec.dtype),
                mode="sum",
            )
        )
    return torch.cat(sites, 1)

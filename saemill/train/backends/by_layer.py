"""Codes of a cross-layer transcoder: those of each layer's latents, which read their own site."""

from typing import TYPE_CHECKING

from torch import Tensor

from saemill.train.backends.base import Batch, Weights
from saemill.train.backends.codes import Codes, Largest, side_by_side

if TYPE_CHECKING:
    from saemill.train.backends.sparse import Sparse


def largest(backend: "Sparse", own: Batch, weights: Weights, bias_F: Tensor, rule: Largest) -> Codes:
    """Find the k largest pre-activations of each token, rectified: an equal number of each layer's."""
    n = weights.parameters.n_layers
    if n == 1:
        return backend.largest(own, weights, bias_F, rule)
    layers = zip(_reads(backend, own, n), weights.layers, bias_F.chunk(n), strict=True)
    share = rule._replace(k=rule.k // n)
    return side_by_side([backend.largest(*layer, share) for layer in layers], len(bias_F) // n)


def above(
    backend: "Sparse", own: Batch, weights: Weights, bias_F: Tensor, floor_F: Tensor, most_codes: float
) -> Codes | None:
    """Find the pre-activations above the floors of their latents; None where they are more than so many."""
    n = weights.parameters.n_layers
    if n == 1:
        return backend.above(own, weights, bias_F, floor_F, most_codes)
    found: list[Codes] = []
    numbers = zip(bias_F.chunk(n), floor_F.chunk(n), strict=True)
    layers = zip(_reads(backend, own, n), weights.layers, numbers, strict=True)
    for read, own_weights, (bias, floor) in layers:
        codes = backend.above(read, own_weights, bias, floor, most_codes)
        if codes is None or codes.n_T is None:
            return None
        most_codes -= int(codes.n_T.sum())
        found.append(codes)
    return side_by_side(found, len(bias_F) // n)


def _reads(backend: "Sparse", own: Batch, n_layers: int) -> list[Batch]:
    """Make batches of what the latents of each layer read."""
    return [backend.prepare(x_TD.contiguous()) for x_TD in own.x_TD.chunk(n_layers, 1)]

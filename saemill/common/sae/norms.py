"""Norms that the activation vectors of some tools' SAEs go through before they are encoded, each by itself.

    x̃ = (x − μ) / (σ + ε),   x̂ = σ · decoded + μ

What is computed from x itself is no linear map, so no weights can hold it.
"""

from typing import NamedTuple

from torch import Tensor

LAYER_NORM = "layer_norm"
"""μ the mean of the vector's values, σ their standard deviation (of a sample), ε 10⁻⁵."""
RESCALE = "constant_norm_rescale"
"""μ = 0, σ = ‖x‖ / √D, so that x̃ is of length √D; a vector of zeros stays one."""
NORMS = (LAYER_NORM, RESCALE)
"""Names of the norms, which are SAELens'."""
EPSILON = 1e-5
TINY = 1e-30
"""Least σ of `RESCALE`."""


class Normed(NamedTuple):
    """Activation vectors, and the way back from what is decoded."""

    x: Tensor
    """Vectors x̃ [..., D]."""
    shift: Tensor
    """μ [..., 1]."""
    scale: Tensor
    """σ [..., 1]."""

    def back(self, decoded: Tensor) -> Tensor:
        """Bring what was decoded, [..., D], to the activations' own units."""
        return decoded * self.scale + self.shift


def normed(x: Tensor, norm: str) -> Normed:
    """Put activation vectors [..., D] through a norm, one of `NORMS`."""
    if norm == LAYER_NORM:
        shift, scale = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return Normed((x - shift) / (scale + EPSILON), shift, scale)
    scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
    return Normed(x / scale.clamp(min=TINY), scale.new_zeros(()), scale)

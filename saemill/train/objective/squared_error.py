"""The squared error of the reconstruction, as a mean over tokens."""

from typing import Literal

Loss = Literal["fvu", "mse"]


def per_square(loss: Loss, d: int, scale: float) -> float:
    """Compute what one squared unit of e, as a mean over tokens, adds to the loss.

    `fvu` divides by the site's cached variance, which is D in training units; `mse` is the mean over
    dimensions in the activations' own units.

    Args:
        loss: which of the two.
        d: width of the site.
        scale: training units per unit of the activations.
    """
    return 1 / d if loss == "fvu" else 1 / (d * scale**2)

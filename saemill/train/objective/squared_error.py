"""The squared error of the reconstruction, as a mean over tokens."""

from saemill.train.losses import Loss


def per_square(loss: Loss, d: int, scale: float) -> float:
    """Compute what one squared unit of e, as a mean over tokens, adds to the loss.

    `fvu` divides by the site's cached variance, which is D in training units; `mse` is the mean over
    dimensions in the activations' own units. With `ce` and `kl`, whose loss has no squared error, AuxK and
    penalties are in units of FVU.

    Args:
        loss: which of them.
        d: width of the site.
        scale: training units per unit of the activations.
    """
    return 1 / (d * scale**2) if loss in ("mse", "mse+kl") else 1 / d

"""Clipping of gradients by their norm over all parameters of one SAE."""

AGAINST_ZERO = 1e-6


def shrinkage(squares: float, most_norm: float) -> float:
    """Compute the factor that clips gradients, as torch.nn.utils.clip_grad_norm_ does.

    Args:
        squares: the sum of their squares.
        most_norm: the norm that they are brought down to.
    """
    return min(1.0, most_norm / (float(squares**0.5) + AGAINST_ZERO))

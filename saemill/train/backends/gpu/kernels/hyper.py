"""The numbers of one step that kernels read from the device, so that a captured step can be replayed."""

from enum import IntEnum


class Hyper(IntEnum):
    """Places in the float32 vector `hyper`, of length len(Hyper), one per variant."""

    LR = 0
    BETA1 = 1
    """β₁ of Adam, momentum of SGD."""
    BETA2 = 2
    EPS = 3
    CORRECTION1 = 4
    """1 − beta1^t, t from 1."""
    CORRECTION2 = 5
    """1 − beta2^t."""
    GRADIENT_SCALE = 6
    """∂L/∂x̂ = gradient scale · e."""
    WEIGHT_DECAY = 7
    """Weight decay of w_enc, decoupled."""
    HEALTHY = 8
    """0: the variant has diverged, nothing is changed."""
    REST1 = 9
    """1 − beta1, from doubles: float32 betas would put 5e-5 of error into 1 − 0.999."""
    REST2 = 10
    """1 − beta2."""


def hyper_values(
    *,
    lr: float,
    step: int,
    gradient_scale: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    healthy: float = 1.0,
) -> list[float]:
    """Compute the vector's values for one step of one variant.

    Args:
        lr: of this step.
        step: t, from 1.
        gradient_scale: ∂L/∂x̂ = gradient_scale · e.
        beta1: β₁ of Adam, momentum of SGD.
    """
    if step < 1:
        raise ValueError(f"step counts from 1, got {step}")
    values = {
        Hyper.LR: lr,
        Hyper.BETA1: beta1,
        Hyper.BETA2: beta2,
        Hyper.EPS: eps,
        Hyper.CORRECTION1: 1 - beta1**step,
        Hyper.CORRECTION2: 1 - beta2**step,
        Hyper.GRADIENT_SCALE: gradient_scale,
        Hyper.WEIGHT_DECAY: weight_decay,
        Hyper.HEALTHY: healthy,
        Hyper.REST1: 1 - beta1,
        Hyper.REST2: 1 - beta2,
    }
    return [values[place] for place in Hyper]

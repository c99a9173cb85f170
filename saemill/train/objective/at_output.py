"""What depends on a reconstruction beside its squared error, as backends see it: a gradient at x̂."""

from typing import NamedTuple, Protocol

from torch import Tensor


class AtOutput(NamedTuple):
    """The loss of one batch, and its gradient at x̂, the squared error's left out."""

    gradient_TE: Tensor
    """float32, in training units."""
    squares: float
    """Weight of the squared error in the loss."""
    loss: Tensor
    """The loss, squared error included; without AuxK and penalties."""
    nats: Tensor
    """What the model loses, per predicted token, float32 []."""


class Objective(Protocol):
    """Looks at the reconstructions of a batch."""

    def at(self, xhat_TE: Tensor, squared: Tensor) -> AtOutput:
        """Compute the loss, and its gradient at x̂.

        Args:
            xhat_TE: of the whole batch, float32, in training units.
            squared: its squared error as a loss, [].
        """

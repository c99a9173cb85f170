"""Sign steps with schedule-free averaging (Bernstein et al. 2018; Defazio et al. 2024), as in sparsify.

Three sequences: z takes the steps, x is the average of z, and gradients are taken at y between the two:

    z ← z − lr · sign(gradient at y),   x ← x + (z − x) · lr²_max / Σ lr²_max,   y = z + β (x − z)

The parameters hold y while training goes on, z is kept beside them, and x, which follows from both, is what
the SAE has afterwards.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from saemill.train.memory import zeros

MOMENTUM = 0.95
"""β: the share of the average in the point at which gradients are taken; sparsify's."""


class Signum:
    """Sign SGD in `schedulefree.ScheduleFreeWrapper`; weight decay is decoupled, at y."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = parameters
        self.z = {name: zeros(*p.shape, device=p.device) for name, p in parameters.items()}
        self.n_steps = 0
        self.rates = torch.zeros(2, dtype=torch.float64)
        """The largest rate so far, and the sum of its squares at every step."""
        self.share = 1.0
        """Weight of this step's z in the average."""

    def begin_step(self, lr: float) -> None:
        """Count a step; every row is then updated once. z begins where the parameters are at the first."""
        if self.n_steps == 0:
            for name, z in self.z.items():
                z.copy_(self.parameters[name])
        self.n_steps += 1
        largest = max(lr, float(self.rates[0]))
        self.rates.copy_(torch.tensor([largest, float(self.rates[1]) + largest**2]))
        self.share = largest**2 / float(self.rates[1])

    def update(self, name: str, rows: slice, grad: Tensor, lr: float, weight_decay: float = 0.0) -> None:
        """Step rows of a parameter against the signs of their gradient."""
        p, z = self.parameters[name][rows], self.z[name][rows]
        if weight_decay:
            z.sub_(p, alpha=lr * weight_decay)
            p.sub_(p, alpha=lr * weight_decay * (1 - MOMENTUM))
        p.lerp_(z, 1 - 1 / MOMENTUM)  # from y to x
        z.sub_(grad.sign(), alpha=lr)
        p.lerp_(z, self.share).lerp_(z, 1 - MOMENTUM)

    def end_step(self) -> bool:
        """Do nothing: every row is stepped already."""
        return False

    def forget(self, name: str, rows_S: Tensor) -> None:
        """Begin anew with rows that were replaced: z and the average are where they are."""
        self.z[name][rows_S] = self.parameters[name][rows_S]

    def averages(self) -> dict[str, Tensor]:
        """Compute x."""
        return {name: p.lerp(self.z[name], 1 - 1 / MOMENTUM) for name, p in self.parameters.items()}

    def tensors(self) -> dict[str, list[Tensor]]:
        """List what a checkpoint needs beside `n_steps`, by parameter."""
        kept = {name: [z] for name, z in self.z.items()}
        kept["b"].append(self.rates)
        return kept

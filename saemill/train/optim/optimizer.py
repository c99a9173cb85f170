"""Optimizers that step one block of rows at a time, right where its gradient was made."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from saemill.train.config import ADAM_BETAS
from saemill.train.memory import zeros
from saemill.train.optim.moments import moment

ADAM_EPS = 1e-10
"""The loss is a mean over tokens and dimensions, so its gradients are small: torch's default of
1e-8 would slow rare latents."""
SGD_MOMENTUM = 0.9


class Optimizer(Protocol):
    """The optimizer of one SAE: `begin_step`, an `update` of every row in any order, `end_step`."""

    n_steps: int
    """Steps begun."""

    def begin_step(self, lr: float) -> None:
        """Count a step, whose rate this is."""

    def update(self, name: str, rows: slice, grad: Tensor, lr: float, weight_decay: float = 0.0) -> None:
        """Step rows of a parameter along their gradient, in place."""

    def end_step(self) -> bool:
        """Step what needs the gradients of all rows.

        Returns: whether weights were changed, whose copies and lengths are then to be renewed.
        """

    def forget(self, name: str, rows_S: Tensor) -> None:
        """Begin anew with rows of a parameter that were replaced; int64 numbers."""

    def averages(self) -> Mapping[str, Tensor] | None:
        """Compute the weights that the SAE has after training; None where they are those in training."""

    def tensors(self) -> dict[str, list[Tensor]]:
        """List what a checkpoint needs beside `n_steps`, by parameter."""


class Adam:
    """AdamW (Loshchilov & Hutter 2019), as torch.optim.AdamW with fused=True computes it.

    Args:
        parameters: by name, float32; changed in place.
        moment_format: format of the moments of weights: fp32, bf16 or 8bit.
        betas: β₁ and β₂.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        moment_format: str = "fp32",
        betas: tuple[float, float] = ADAM_BETAS,
    ) -> None:
        self.parameters, self.moment_format, self.betas = parameters, moment_format, betas
        self.first = {name: moment(p, moment_format, signed=True) for name, p in parameters.items()}
        self.second = {name: moment(p, moment_format, signed=False) for name, p in parameters.items()}
        self.n_steps = 0
        self.count = torch.zeros((), device=next(iter(parameters.values())).device)
        """`n_steps` on the device."""

    def begin_step(self, lr: float) -> None:
        """Count a step; every row is then updated once."""
        self.n_steps += 1
        self.count.fill_(self.n_steps)

    def update(
        self, name: str, rows: slice, grad: Tensor, lr: float | Tensor, weight_decay: float = 0.0
    ) -> None:
        """Step rows of a parameter along their gradient; the rate may lie on the device."""
        first, second = self.first[name].read(rows), self.second[name].read(rows)
        torch._fused_adamw_(
            [self.parameters[name][rows]],
            [grad],
            [first],
            [second],
            [],
            [self.count],
            lr=lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=weight_decay,
            eps=ADAM_EPS,
            amsgrad=False,
            maximize=False,
        )
        self.first[name].write(rows, first, self.n_steps)
        self.second[name].write(rows, second, self.n_steps)

    def end_step(self) -> bool:
        """Do nothing: every row is stepped already."""
        return False

    def forget(self, name: str, rows_S: Tensor) -> None:
        """Begin anew with rows that were replaced: their moments are 0."""
        for tensor in (*self.first[name].tensors(), *self.second[name].tensors()):
            tensor[rows_S] = 0

    def averages(self) -> None:
        """Return none: the weights are used as they are."""

    def tensors(self) -> dict[str, list[Tensor]]:
        """List what a checkpoint needs beside `n_steps`, by parameter."""
        return {name: [*self.first[name].tensors(), *self.second[name].tensors()] for name in self.first}


class Sgd:
    """SGD with momentum, as torch.optim.SGD computes it; weight decay is decoupled."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = parameters
        self.momentum = {name: zeros(*p.shape, device=p.device) for name, p in parameters.items()}
        self.n_steps = 0

    def begin_step(self, lr: float) -> None:
        """Count a step; every row is then updated once."""
        self.n_steps += 1

    def update(
        self, name: str, rows: slice, grad: Tensor, lr: float | Tensor, weight_decay: float = 0.0
    ) -> None:
        """Step rows of a parameter along their gradient; the rate may lie on the device."""
        weights = self.parameters[name][rows].mul_(1 - lr * weight_decay)
        along = self.momentum[name][rows].mul_(SGD_MOMENTUM).add_(grad)
        if isinstance(lr, Tensor):  # `alpha` would fetch it from the device
            weights.addcmul_(along, lr, value=-1)
        else:
            weights.add_(along, alpha=-lr)

    def end_step(self) -> bool:
        """Do nothing: every row is stepped already."""
        return False

    def forget(self, name: str, rows_S: Tensor) -> None:
        """Begin anew with rows that were replaced: their momentum is 0."""
        self.momentum[name][rows_S] = 0

    def averages(self) -> None:
        """Return none: the weights are used as they are."""

    def tensors(self) -> dict[str, list[Tensor]]:
        """List what a checkpoint needs beside `n_steps`, by parameter."""
        return {name: [momentum] for name, momentum in self.momentum.items()}

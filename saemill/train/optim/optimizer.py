"""Optimizers that step one block of rows at a time, right where its gradient was made."""

import torch
from torch import Tensor

from saemill.train.config import ADAM_BETAS
from saemill.train.memory import zeros
from saemill.train.optim.moments import moment

ADAM_EPS = 1e-10
"""The loss is a mean over tokens and dimensions, so its gradients are small: torch's default of
1e-8 would slow rare latents."""
SGD_MOMENTUM = 0.9


class Adam:
    """AdamW (Loshchilov & Hutter 2019), as torch.optim.AdamW with fused=True computes it.

    Args:
        leaves: the parameters, float32.
        kept: how the moments of weights are kept: fp32, bf16 or 8bit.
        betas: by how much the two moments are kept at each step.
    """

    def __init__(
        self, leaves: list[Tensor], kept: str = "fp32", betas: tuple[float, float] = ADAM_BETAS
    ) -> None:
        self.leaves, self.betas = leaves, betas
        self.first = [moment(leaf, kept, signed=True) for leaf in leaves]
        self.second = [moment(leaf, kept, signed=False) for leaf in leaves]
        self.n_steps = 0
        self.count = torch.zeros((), device=leaves[0].device)
        """The same on the device."""

    def begin_step(self) -> None:
        """Count a step; every row is then updated once."""
        self.n_steps += 1
        self.count.fill_(self.n_steps)

    def update(
        self, leaf: int, rows: slice, grad: Tensor, lr: float | Tensor, weight_decay: float = 0.0
    ) -> None:
        """Step rows of parameter number `leaf` along their gradient; the rate may lie on the device."""
        first, second = self.first[leaf].read(rows), self.second[leaf].read(rows)
        torch._fused_adamw_(
            [self.leaves[leaf][rows]],
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
        self.first[leaf].write(rows, first, self.n_steps)
        self.second[leaf].write(rows, second, self.n_steps)

    def tensors(self) -> list[list[Tensor]]:
        """What a checkpoint needs beside `n_steps`: the tensors of each parameter."""
        pairs = zip(self.first, self.second, strict=True)
        return [[*first.tensors(), *second.tensors()] for first, second in pairs]


class Sgd:
    """SGD with momentum, as torch.optim.SGD computes it; weight decay is decoupled."""

    def __init__(self, leaves: list[Tensor]) -> None:
        self.leaves = leaves
        self.momentum = [zeros(*leaf.shape, device=leaf.device) for leaf in leaves]
        self.n_steps = 0

    def begin_step(self) -> None:
        """Count a step; every row is then updated once."""
        self.n_steps += 1

    def update(
        self, leaf: int, rows: slice, grad: Tensor, lr: float | Tensor, weight_decay: float = 0.0
    ) -> None:
        """Step rows of parameter number `leaf` along their gradient; the rate may lie on the device."""
        weights = self.leaves[leaf][rows].mul_(1 - lr * weight_decay)
        along = self.momentum[leaf][rows].mul_(SGD_MOMENTUM).add_(grad)
        if isinstance(lr, Tensor):  # `alpha` would fetch it from the device
            weights.addcmul_(along, lr, value=-1)
        else:
            weights.add_(along, alpha=-lr)

    def tensors(self) -> list[list[Tensor]]:
        """What a checkpoint needs beside `n_steps`: the tensors of each parameter."""
        return [[momentum] for momentum in self.momentum]


Optimizer = Adam | Sgd
"""One variant's optimizer."""

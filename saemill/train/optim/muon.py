"""Muon (Jordan et al. 2024): momentum, orthogonalised by a Newton-Schulz iteration, for matrices.

A step of a matrix is scaled by 0.2 √max(F, D), so that its entries are about as large as those of Adam's
steps (Liu et al. 2025); thresholds and biases are stepped by Adam itself, at the same rate. As
torch.optim.Muon computes it with adjust_lr_fn="match_rms_adamw", and as sparsify does.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from saemill.common.world import Group
from saemill.train.memory import zeros
from saemill.train.optim.optimizer import Adam

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration: singular values end between 0.7 and 1.2, and get there quickly."""
N_ITERATIONS = 5
ONE = Group([0], 0)
SMALLEST_NORM = 1e-7
STEP_RMS = 0.2
"""Root mean square of a step's entries, over the rate."""


class Muon:
    """Nesterov momentum of matrices, orthogonalised; weight decay is decoupled.

    Args:
        parameters: by name, float32; changed in place. Of matrices [F, D] this process's rows; those of
            `whole` are in whole on every process.
        n_latents: F of the whole SAE.
        group: the processes that share the rows.
        whole: names of parameters that have no row per latent.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], n_latents: int, group: Group, whole: Collection[str] = ()
    ) -> None:
        self.parameters, self.n_latents, self.group, self.whole = parameters, n_latents, group, whole
        matrices = {name: p for name, p in parameters.items() if p.dim() == 2}
        self.vectors = Adam({name: p for name, p in parameters.items() if p.dim() == 1})
        self.momentum = {name: zeros(*p.shape, device=p.device) for name, p in matrices.items()}
        self.direction = {name: zeros(*p.shape, device=p.device) for name, p in matrices.items()}
        """What is going to be orthogonalised, rows of which are there already."""
        self.decay = dict.fromkeys(matrices, 0.0)
        self.lr = 0.0

    @property
    def n_steps(self) -> int:
        """Return the number of steps begun."""
        return self.vectors.n_steps

    @n_steps.setter
    def n_steps(self, n_steps: int) -> None:
        self.vectors.n_steps = n_steps

    def begin_step(self, lr: float) -> None:
        """Count a step; every row is then updated once."""
        self.vectors.begin_step(lr)
        self.lr = lr

    def update(self, name: str, rows: slice, grad: Tensor, lr: float, weight_decay: float = 0.0) -> None:
        """Step rows of a vector; of a matrix only their momentum."""
        if name in self.vectors.parameters:
            self.vectors.update(name, rows, grad, lr, weight_decay)
            return
        momentum = self.momentum[name][rows].lerp_(grad, 1 - MOMENTUM)
        torch.lerp(grad, momentum, MOMENTUM, out=self.direction[name][rows])
        self.decay[name] = weight_decay

    def end_step(self) -> bool:
        """Step the matrices."""
        for name, direction_FD in self.direction.items():
            p = self.parameters[name]
            n_rows, group = (len(p), ONE) if name in self.whole else (self.n_latents, self.group)
            scale = STEP_RMS * max(n_rows, p.shape[1]) ** 0.5
            p.mul_(1 - self.lr * self.decay[name])
            p.sub_(orthogonalised(direction_FD, n_rows, group), alpha=self.lr * scale)
        return True

    def forget(self, name: str, rows_S: Tensor) -> None:
        """Begin anew with rows that were replaced: their momentum is 0."""
        if name in self.momentum:
            self.momentum[name][rows_S] = 0
        else:
            self.vectors.forget(name, rows_S)

    def averages(self) -> None:
        """Return none: the weights are used as they are."""

    def tensors(self) -> dict[str, list[Tensor]]:
        """List what a checkpoint needs beside `n_steps`, by parameter."""
        return {name: [momentum] for name, momentum in self.momentum.items()} | self.vectors.tensors()


def orthogonalised(matrix_FD: Tensor, n_latents: int, group: Group) -> Tensor:
    """Bring all singular values of a matrix near 1, in bfloat16; its rows may be shared out.

    The products are along the longer side: where the rows are split, only these [D, D] are exchanged.

    Args:
        matrix_FD: this process's rows.
        n_latents: rows of all.
        group: the processes that share them.
    """
    a, b, c = COEFFICIENTS
    turned = n_latents > matrix_FD.shape[1] or group.size > 1
    x = matrix_FD.bfloat16()
    x = x.T if turned else x
    norm = group.all_reduce(x.norm().float().square()).sqrt()
    x.div_(norm.clamp(min=SMALLEST_NORM))
    for _ in range(N_ITERATIONS):
        gram = group.all_reduce((x @ x.T).float()).bfloat16()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if turned else x

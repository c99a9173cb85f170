"""Sign steps with schedule-free averaging, beside the library that sparsify takes them from."""

from typing import Any

import pytest
import torch
from schedulefree import ScheduleFreeWrapper
from torch import Tensor

from saemill.train.optim.signum import MOMENTUM, Signum


class SignSgd(torch.optim.Optimizer):
    """sparsify's base optimizer: steps along signs."""

    def __init__(self, params: list[Tensor], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad.sign(), alpha=-group["lr"])


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("rates", [[0.02] * 30, [0.002 * min(10, i + 1, 30 - i) for i in range(30)]])
def test_steps_and_averages_are_the_librarys(rates: list[float], weight_decay: float) -> None:
    """Oracle: schedulefree's wrapper around sign SGD with sparsify's momentum; rows are renormalised between
    steps as sparsify does. Blocks of rows in place of the whole."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(12, 5, generator=generator)
    target = torch.randn(12, 5, generator=generator)
    theirs, mine = torch.nn.Parameter(start.clone()), start.clone()
    oracle = ScheduleFreeWrapper(SignSgd([theirs], 0.1), weight_decay_at_y=weight_decay, momentum=MOMENTUM)
    oracle.train()
    signum = Signum({"b": mine})
    for lr in rates:
        oracle.param_groups[0]["lr"] = lr
        theirs.grad = theirs.detach() - target
        grad = mine - target
        oracle.step()
        signum.begin_step(lr)
        for rows in (slice(7, 12), slice(0, 7)):
            signum.update("b", rows, grad[rows], lr, weight_decay)
        assert not signum.end_step()
        for p in (theirs.data, mine):
            p /= p.norm(dim=1, keepdim=True)
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-5, atol=1e-6)
    oracle.eval()
    torch.testing.assert_close(signum.averages()["b"], theirs.detach(), rtol=1e-5, atol=1e-6)

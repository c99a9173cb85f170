"""Muon beside torch's own, and with its rows shared out over processes."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from saemill.common.world import Group
from saemill.train.backends.team import ONE
from saemill.train.config import ADAM_BETAS
from saemill.train.optim.muon import Muon, orthogonalised
from saemill.train.optim.optimizer import ADAM_EPS


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (16, 16)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_steps_are_torchs(shape: tuple[int, int], weight_decay: float) -> None:
    """Oracle: torch.optim.Muon for the matrix, torch.optim.Adam for the vector; blocks of rows."""
    generator = torch.Generator().manual_seed(2)
    start, bias = torch.randn(*shape, generator=generator), torch.randn(7, generator=generator)
    theirs, their_bias = torch.nn.Parameter(start.clone()), torch.nn.Parameter(bias.clone())
    matrices: Any = torch.optim.Muon([theirs], 0.1, weight_decay, adjust_lr_fn="match_rms_adamw")
    vectors = torch.optim.Adam([their_bias], 0.1, ADAM_BETAS, ADAM_EPS)
    muon = Muon({"w": start, "b": bias}, shape[0], ONE)
    for step in range(6):
        lr = 0.01 * (6 - step)
        for optimizer in (matrices, vectors):
            optimizer.param_groups[0]["lr"] = lr
        grads = torch.randn(*shape, generator=generator), torch.randn(7, generator=generator)
        theirs.grad, their_bias.grad = (grad.clone() for grad in grads)
        muon.begin_step(lr)
        for rows in (slice(5, None), slice(0, 5)):
            muon.update("w", rows, grads[0][rows], lr, weight_decay)
        muon.update("b", slice(None), grads[1], lr)
        assert muon.end_step()
        matrices.step()
        vectors.step()
        torch.testing.assert_close(start, theirs.detach())
        torch.testing.assert_close(bias, their_bias.detach())


class Shared(Group):
    """Two threads in place of two processes."""

    def __init__(self, rank: int, box: list[Tensor], barrier: threading.Barrier) -> None:
        super().__init__([0, 1], rank)
        self.box, self.barrier = box, barrier

    def all_reduce(self, x: Tensor) -> Tensor:
        self.box[self.rank] = x
        self.barrier.wait()
        total = self.box[0] + self.box[1]
        self.barrier.wait()
        return total


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
def test_rows_may_be_shared_out(shape: tuple[int, int]) -> None:
    """Oracle: the same matrix in one process, up to bfloat16's rounding; singular values near 1."""
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    whole = orthogonalised(matrix, len(matrix), ONE).float()
    box, barrier, parts = [matrix, matrix], threading.Barrier(2), [matrix, matrix]

    def work(rank: int) -> None:
        group = Shared(rank, box, barrier)
        parts[rank] = orthogonalised(matrix[group.slice_of(len(matrix))], len(matrix), group)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    error = torch.cat(parts).float() - whole
    assert float(error.norm() / whole.norm()) < 0.05
    assert 0.5 < float(torch.linalg.svdvals(whole).min()) < float(torch.linalg.svdvals(whole).max()) < 1.3

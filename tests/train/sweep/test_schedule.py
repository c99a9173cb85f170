"""The learning rate's course: torch's schedulers, SAELens' and the factors of before."""

import math
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as torch_schedulers
from training import config

from saemill.common.errors import ConfigError
from saemill.common.stores.activations import ActivationStore
from saemill.train.run import run
from saemill.train.sweep.schedule import Schedule, schedule_of


def of_torch(schedule: Schedule) -> list[float]:
    """The factors by torch's schedulers in a row: warm-up, course, decay."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    n_course, warmup, last = schedule.course_steps, schedule.warmup_steps, schedule.decay_steps
    courses: dict[str, Any] = {
        "constant": lambda: torch_schedulers.ConstantLR(optimizer, 1.0),
        "linear": lambda: torch_schedulers.LinearLR(optimizer, 1.0, schedule.end, total_iters=n_course),
        "cosine": lambda: torch_schedulers.CosineAnnealingLR(optimizer, n_course, eta_min=schedule.end),
        "cosine_restarts": lambda: torch_schedulers.CosineAnnealingWarmRestarts(
            optimizer, n_course // schedule.n_cycles, eta_min=schedule.end
        ),
    }
    parts: list[Any] = [
        torch_schedulers.LinearLR(optimizer, 1 / (warmup + 1), 1.0, total_iters=warmup),
        courses[schedule.course](),
    ]
    milestones = [warmup]
    if schedule.decay == "linear":
        ends = schedule.end * last / (last + 1), schedule.end / (last + 1)
        parts.append(torch_schedulers.LinearLR(optimizer, *ends, total_iters=last - 1))
        milestones.append(schedule.n_steps - last)
    scheduler = torch_schedulers.SequentialLR(optimizer, parts, milestones)
    factors = []
    for _ in range(schedule.n_steps):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize("decay", ["none", "linear"])
@pytest.mark.parametrize("warmup_steps", [1, 12])
@pytest.mark.parametrize(
    ("course", "end", "n_cycles"),
    [
        ("constant", 1.0, 1),
        ("linear", 0.25, 1),
        ("cosine", 0.1, 1),
        ("cosine", 0.5, 1),
        ("cosine_restarts", 0.1, 1),
        ("cosine_restarts", 0.1, 4),
    ],
)
def test_the_factors_are_torchs(
    course: Any, end: float, n_cycles: int, warmup_steps: int, decay: Any
) -> None:
    """Oracle: LinearLR, CosineAnnealingLR and CosineAnnealingWarmRestarts of torch, one after another."""
    n_steps = warmup_steps + 80 + (20 if decay == "linear" else 0)
    schedule = Schedule(n_steps, warmup_steps, decay, 20, course, end, n_cycles)
    mine = [schedule.factor(step) for step in range(n_steps)]
    assert mine == pytest.approx(of_torch(schedule), rel=1e-9, abs=1e-12)
    assert max(mine) == 1


def test_cycles_that_do_not_divide_the_steps_end_low() -> None:
    """Oracle: by hand: three cycles in 100 steps restart at 34 and 67, and the last step is a low one."""
    schedule = Schedule(100, 0, "none", 0, "cosine_restarts", 0.0, 3)
    mine = [schedule.factor(step) for step in range(100)]
    assert [step for step in range(1, 100) if mine[step] > mine[step - 1]] == [34, 67]
    assert mine[99] < 0.01


@pytest.mark.parametrize("decay", ["none", "linear", "cosine"])
@pytest.mark.parametrize(("warmup_steps", "decay_steps"), [(0, 0), (7, 20), (60, 60), (99, 100)])
def test_a_constant_course_has_the_factors_of_before(decay: Any, warmup_steps: int, decay_steps: int) -> None:
    """Oracle: the formula that runs were trained with before there were courses, bit by bit."""

    def before(step: int) -> float:
        factor = min(1.0, (step + 1) / (warmup_steps + 1))
        left = 100 - step
        if decay == "none" or left > decay_steps:
            return factor
        share = left / (decay_steps + 1)
        return factor * (share if decay == "linear" else 0.5 - 0.5 * math.cos(math.pi * share))

    schedule = Schedule(100, warmup_steps, decay, decay_steps)
    assert [schedule.factor(step) for step in range(100)] == [before(step) for step in range(100)]


def test_settings_make_the_schedule(store: ActivationStore, tmp_path: Any) -> None:
    """Oracle: the defaults as docs/training.md has them: cosine to a tenth, then linearly to 0 over a fifth;
    without the decay to 0."""

    def made(**changes: Any) -> Schedule:
        return schedule_of(config(store, tmp_path, max_tokens=256 * 100, **changes), 256 * 100, "tokens")

    assert made() == Schedule(100, 5, "linear", 20)
    assert made(lr_schedule="cosine") == Schedule(100, 5, "linear", 20, "cosine", 0.1)
    assert made(lr_schedule="linear", lr_decay="none").end == 0
    restarts = made(lr_schedule="cosine_restarts", lr_cycles=3, lr_end=0.5, warmup_steps=0)
    assert restarts == Schedule(100, 0, "linear", 20, "cosine_restarts", 0.5, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_end": 0.1}, "lr_end has no effect with lr_schedule constant"),
        ({"lr_schedule": "cosine", "lr_cycles": 2}, "lr_cycles has no effect without lr_schedule cosine_r"),
        ({"lr_schedule": "cosine", "lr_end": 0.0}, "lr_decay linear has no effect with lr_end 0"),
        ({"lr_schedule": "cosine", "lr_end": 1.5}, r"lr_end must be in \[0, 1\]"),
        ({"lr_schedule": "cosine", "lr_decay_fraction": 1.0}, "needs 1 steps from .* has 0 of the run's 24"),
        ({"lr_schedule": "cosine_restarts", "lr_cycles": 20}, "needs 20 steps .* has 18 of"),
    ],
)
def test_schedules_that_mean_nothing_are_refused(
    store: ActivationStore, tmp_path: Any, changes: dict[str, Any], message: str
) -> None:
    """Oracle: the message; nothing was written."""
    with pytest.raises(ConfigError, match=message):
        run(config(store, tmp_path / "r", **changes))
    assert not (tmp_path / "r").exists()

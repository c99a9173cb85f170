"""The learning rate over a run, as a factor on each variant's peak rate."""

import math
from dataclasses import dataclass

from saemill.common.errors import ConfigError
from saemill.train.config import LrDecay, LrSchedule, TrainConfig

MOST_WARMUP_STEPS = 1000


@dataclass(frozen=True, slots=True)
class Schedule:
    """Linear warm-up from 0, then a course, then a decay to 0 over the last steps."""

    n_steps: int
    warmup_steps: int
    decay: LrDecay
    decay_steps: int
    course: LrSchedule = "constant"
    """How the rate goes between warm-up and decay: from 1 down to `end`, with restarts several times."""
    end: float = 1.0
    """The factor at which the course ends and the decay begins."""
    n_cycles: int = 1
    """Times that the course goes down; all but the first begin with a restart."""

    @property
    def course_steps(self) -> int:
        """Return the number of steps between warm-up and decay."""
        return self.n_steps - self.warmup_steps - (0 if self.decay == "none" else self.decay_steps)

    def factor(self, step: int) -> float:
        """Compute the factor for step 0, 1, … n_steps - 1."""
        factor = min(1.0, (step + 1) / (self.warmup_steps + 1))
        left = self.n_steps - step
        if self.decay == "none" or left > self.decay_steps:
            return factor * self._on_course(max(0, step - self.warmup_steps))
        share = left / (self.decay_steps + 1)
        decayed = share if self.decay == "linear" else 0.5 - 0.5 * math.cos(math.pi * share)
        return factor * self.end * decayed

    def _on_course(self, step: int) -> float:
        """Compute the factor for a step after the warm-up."""
        if self.course == "constant":
            return 1.0
        done = step * self.n_cycles % self.course_steps / self.course_steps
        above = 1 - done if self.course == "linear" else 0.5 + 0.5 * math.cos(math.pi * done)
        return self.end + (1 - self.end) * above


def schedule_of(config: TrainConfig, epoch_tokens: int, units: str) -> Schedule:
    """Plan the steps of a run and the learning rate over them.

    Args:
        config: of the run.
        epoch_tokens: tokens of one pass over the store.
        units: what the store holds, in the plural.

    Raises:
        ConfigError: fewer steps than one, or than the course needs; more than a follower reads.
    """
    step_tokens = config.step_tokens
    n_tokens = config.max_tokens or (config.epochs or 1) * epoch_tokens
    n_steps = n_tokens // step_tokens
    if config.follow and n_tokens > epoch_tokens:
        raise ConfigError(
            f"max_tokens {n_tokens:,}: follow goes through the store once, which has {epoch_tokens:,} "
            f"training {units}; leave it out, or train without follow when the store is finished"
        )
    if n_steps == 0:
        raise ConfigError(
            f"{n_tokens:,} training {units} are less than one step of {step_tokens:,}; "
            "lower --batch-size or raise --max-tokens"
        )
    warmup = config.warmup_steps
    if warmup is not None and warmup >= n_steps:
        raise ConfigError(
            f"warmup_steps must be fewer than the run's {n_steps:,} steps, got {warmup:,}; "
            "lower --warmup-steps or train longer"
        )
    schedule = Schedule(
        n_steps=n_steps,
        warmup_steps=min(MOST_WARMUP_STEPS, n_steps // 20) if warmup is None else warmup,
        decay=config.lr_decay,
        decay_steps=round(config.decay_fraction * n_steps),
        course=config.lr_schedule,
        end=config.course_end,
        n_cycles=(config.lr_cycles or 2) if config.lr_schedule == "cosine_restarts" else 1,
    )
    if config.lr_schedule != "constant" and schedule.course_steps < schedule.n_cycles:
        raise ConfigError(
            f"lr_schedule {config.lr_schedule} needs {schedule.n_cycles:,} steps from warm-up to decay, and "
            f"has {max(0, schedule.course_steps):,} of the run's {n_steps:,}; lower warmup_steps, "
            "lr_decay_fraction or lr_cycles, or train longer"
        )
    return schedule

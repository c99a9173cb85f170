"""The learning rate over a run, as a factor on each variant's peak rate."""

import math
from dataclasses import dataclass

from saemill.train.config import LrDecay, LrSchedule


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

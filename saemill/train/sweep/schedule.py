"""The learning rate over a run, as a factor on each variant's peak rate."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Schedule:
    """Linear warm-up from 0, then constant, then a decay to 0 over the last steps."""

    n_steps: int
    warmup_steps: int
    decay: Literal["none", "linear", "cosine"]
    decay_steps: int

    def factor(self, step: int) -> float:
        """Compute the factor for step 0, 1, … n_steps - 1."""
        factor = min(1.0, (step + 1) / (self.warmup_steps + 1))
        left = self.n_steps - step
        if self.decay == "none" or left > self.decay_steps:
            return factor
        share = left / (self.decay_steps + 1)
        return factor * (share if self.decay == "linear" else 0.5 - 0.5 * math.cos(math.pi * share))

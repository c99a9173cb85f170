"""Successive halving: the worse half of like variants is stopped early, its time goes to the rest.

Rules (Jamieson & Talwalkar 2016, with the run's own schedule kept):

- R looks, at 1/2^R, …, 1/4, 1/2 of the run's steps.
- Variants compete within one site and one k: FVU at another site or k says nothing.
- What counts is the metric over the tenth of the steps before the look, on the training stream, which is
  the same for all. Of n variants the ceil(n / 2) with the lowest value go on; a variant that diverged
  comes last, of equals the one that is named first goes on. One alone is never stopped.
- What is stopped is written as it is then, with its step; the rest is dealt to the processes anew.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saemill.common import durable
from saemill.common.errors import ConfigError
from saemill.common.log import say
from saemill.train.variants import Variant

RECORD = "halving.json"
LEAST_STEPS = 10
"""Before the first look."""


@dataclass(slots=True)
class Halving:
    """The looks of one run, and what was stopped at those that are past."""

    path: Path
    """Where the record is kept."""
    variants: list[Variant]
    """All of the run."""
    n_steps: int
    n_looks: int
    metric: str
    past: list[dict[str, Any]] = field(default_factory=list)
    """Per look: `step`, and `stopped`: name → value, best value of its group."""

    def __post_init__(self) -> None:
        if self.n_looks == 0:
            return
        if self.n_steps >> self.n_looks < LEAST_STEPS:
            raise ConfigError(
                f"halving {self.n_looks} looks first at step {self.n_steps >> self.n_looks} of "
                f"{self.n_steps}, {LEAST_STEPS} are the least; lower --halving or train longer"
            )
        if all(len(group) < 2 for group in groups(self.variants)):
            raise ConfigError("halving has no effect: no two variants share a site and k; leave it out")

    def read(self) -> list[dict[str, Any]]:
        """The looks that are past, from the record."""
        past: list[dict[str, Any]] = durable.read_json(self.path) if self.path.exists() else []
        return past

    @property
    def stopped(self) -> dict[str, dict[str, Any]]:
        """Variants stopped so far: `step`, `metric`, `value`, `best`."""
        return {
            name: {"step": look["step"], "metric": self.metric, **values}
            for look in self.past
            for name, values in look["stopped"].items()
        }

    @property
    def alive(self) -> list[Variant]:
        """Those that go on."""
        return [variant for variant in self.variants if variant.name not in self.stopped]

    @property
    def ends(self) -> list[int]:
        """Steps at which to look, those past left out, and the last step."""
        done = {look["step"] for look in self.past}
        looks = [self.n_steps >> i for i in range(self.n_looks, 0, -1)]
        return [*(step for step in looks if step not in done), self.n_steps]

    def choose(self, scores: dict[str, float | None]) -> dict[str, dict[str, float | None]]:
        """The variants to stop.

        Args:
            scores: the metric of every variant that is alive; None where it diverged.

        Returns: per variant its `value` and the `best` of its group.
        """
        found = {}
        for group in groups(self.alive):
            ordered = sorted(group, key=lambda v: _last_if_none(scores[v.name]))
            best = scores[ordered[0].name]
            for variant in ordered[-(-len(group) // 2) :]:
                found[variant.name] = {"value": scores[variant.name], "best": best}
        return found

    def stop(self, step: int, losers: dict[str, dict[str, float | None]]) -> None:
        """Note the look and its outcome; durable when it returns."""
        self.past.append({"step": step, "stopped": losers})
        durable.write_json(self.path, self.past)
        if losers:
            named = ", ".join(f"{name} ({self.metric} {_shown(v['value'])})" for name, v in losers.items())
            say(f"halving at step {step:,}: {named} stopped, {len(self.alive)} go on")


def window(end: int) -> int:
    """The first step that counts for a look at step `end`."""
    return end - max(1, end // 10)


def groups(variants: list[Variant]) -> list[list[Variant]]:
    """Variants that compete: of one site and k, in the run's order."""
    found: dict[tuple[str, int], list[Variant]] = {}
    for variant in variants:
        found.setdefault((variant.site, variant.k), []).append(variant)
    return list(found.values())


def _last_if_none(value: float | None) -> float:
    return math.inf if value is None or math.isnan(value) else value


def _shown(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.4g}"

"""Successive halving: the worse half of like variants is stopped early, its time goes to the rest.

Rules (Jamieson & Talwalkar 2016, with the schedule of the whole run):

- R rungs, at 1/2^R, …, 1/4, 1/2 of the run's steps.
- Variants compete within one site and one k: FVU at another site or k says nothing.
- What counts is the metric over the tenth of the steps before the rung, on the training stream, which is
  the same for all. Of n variants the ceil(n / 2) with the lowest value go on; a variant that diverged
  comes last, of equals the one that is named first goes on. One alone is never stopped.
- What is stopped is written as it is then, with its step; the rest is dealt to the processes anew.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from saemill.common import records
from saemill.common.errors import ConfigError, StoreError
from saemill.common.log import say
from saemill.common.stores import runs
from saemill.common.stores.runs import ANEW, HALVING, Look, Looks, Lost, Stopped
from saemill.train.sweep.variant import Variant

Loser = tuple[float | None, float | None]
"""A variant's metric, and the best of its group; None where it diverged."""
LEAST_STEPS = 10
"""Fewest steps before the first rung."""


@dataclass(slots=True)
class Halving:
    """The rungs of one run, and the variants stopped at past ones."""

    folder: Path
    """Folder of the run, for the record."""
    run: str
    """The hash that names the run."""
    variants: list[Variant]
    """All variants of the run."""
    n_steps: int
    n_rungs: int
    metric: str
    past: list[Look] = field(default_factory=list)
    """Rungs that are past."""

    def __post_init__(self) -> None:
        if self.n_rungs == 0:
            return
        if self.n_steps >> self.n_rungs < LEAST_STEPS:
            raise ConfigError(
                f"halving {self.n_rungs} looks first at step {self.n_steps >> self.n_rungs} of "
                f"{self.n_steps}, {LEAST_STEPS} are the least; lower --halving or train longer"
            )
        if all(len(group) < 2 for group in groups(self.variants)):
            raise ConfigError("halving has no effect: no two variants share a site and k; leave it out")

    def read(self) -> list[Look]:
        """Read the past rungs from the record.

        Raises:
            StoreError: it is damaged, or of another run.
        """
        past = list(runs.looks(self.folder))
        known = {variant.name for variant in self.variants}
        steps, names = [rung.step for rung in past], [name for rung in past for name in rung.stopped]
        if (
            steps != self._rung_steps[: len(past)]
            or not known.issuperset(names)
            or len(set(names)) < len(names)
        ):
            raise StoreError(f"{self.folder / HALVING} does not fit the run's settings. {ANEW}")
        return past

    @property
    def stopped(self) -> dict[str, Stopped]:
        """Return the variants stopped so far."""
        return {
            name: Stopped(step=rung.step, metric=self.metric, value=lost.value, best=lost.best)
            for rung in self.past
            for name, lost in rung.stopped.items()
        }

    @property
    def cfgs(self) -> dict[str, str]:
        """Return the checksums of their SAEs' cfg.json."""
        return {name: lost.cfg for rung in self.past for name, lost in rung.stopped.items()}

    @property
    def alive(self) -> list[Variant]:
        """List the variants that go on."""
        return [variant for variant in self.variants if variant.name not in self.stopped]

    @property
    def ends(self) -> list[int]:
        """List the steps of the rungs, those past left out, and the last step."""
        done = {rung.step for rung in self.past}
        return [*(step for step in self._rung_steps if step not in done), self.n_steps]

    @property
    def _rung_steps(self) -> list[int]:
        return [self.n_steps >> i for i in range(self.n_rungs, 0, -1)]

    def choose(self, scores: dict[str, float | None]) -> dict[str, Loser]:
        """Choose the variants to stop.

        Args:
            scores: the metric of every variant that is alive; None where it diverged.

        Returns: per variant its value, and the best of its group.
        """
        losers = {}
        for group in groups(self.alive):
            ordered = sorted(group, key=lambda v: _last_if_none(scores[v.name]))
            best = scores[ordered[0].name]
            for variant in ordered[-(-len(group) // 2) :]:
                losers[variant.name] = scores[variant.name], best
        return losers

    def stop(self, step: int, losers: dict[str, Loser], cfgs: dict[str, str]) -> None:
        """Record the rung and its outcome; durable when it returns.

        Args:
            step: the rung's.
            losers: as `choose` returns them.
            cfgs: the checksums of their SAEs' cfg.json.
        """
        stopped = {
            name: Lost(value=_finite(value), best=_finite(best), cfg=cfgs[name])
            for name, (value, best) in losers.items()
        }
        self.past.append(Look(step=step, stopped=stopped))
        records.write(self.folder / HALVING, Looks(run=self.run, looks=tuple(self.past)))
        if losers:
            names = ", ".join(
                f"{name} ({self.metric} {_shown(lost.value)})" for name, lost in stopped.items()
            )
            say(f"halving at step {step:,}: {names} stopped, {len(self.alive)} go on")


def window(end: int) -> int:
    """Return the first step that counts for a rung at step `end`."""
    return end - max(1, end // 10)


def groups(variants: list[Variant]) -> list[list[Variant]]:
    """Group variants that compete, in the run's order: those of one site and target, architecture, and k or
    penalty."""
    alike: dict[tuple[object, ...], list[Variant]] = {}
    for variant in variants:
        v = variant
        budget = v.k, v.target_l0, v.l0_coefficient, v.l1_coefficient
        alike.setdefault((v.sites, v.architecture, *budget), []).append(variant)
    return list(alike.values())


def _finite(value: float | None) -> float | None:
    """Return the value, None where it is not finite."""
    return value if value is not None and math.isfinite(value) else None


def _last_if_none(value: float | None) -> float:
    return math.inf if value is None or math.isnan(value) else value


def _shown(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.4g}"


def work_share(variants: list[Variant], n_rungs: int) -> float:
    """Compute the share of the steps of all variants that are taken, where the worse half stops at each
    rung."""
    n_left, share = [len(group) for group in groups(variants)], 0.0
    for rung in range(n_rungs, -1, -1):
        span = 2.0**-n_rungs if rung == n_rungs else 2.0 ** -(rung + 1)
        share += span * sum(n_left) / len(variants)
        n_left = [-(-n // 2) for n in n_left]
    return share

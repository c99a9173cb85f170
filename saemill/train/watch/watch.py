"""All SAEs of this process, measured on held-out text after some steps.

Each is measured once: by the first process of the team that trains it, which has it whole. Training goes on
as it would have: no random number is drawn, and the time does not count in the run's seconds.
"""

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from saemill.common.log import counted, say
from saemill.common.sae.parts import Parts
from saemill.common.sae.sae import Sae
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.mask import MaskConfig
from saemill.train.config import TrainConfig
from saemill.train.learner.learner import Learner
from saemill.train.watch.held_out import NAMES, Figures, HeldOut
from saemill.train.watch.plan import Plan, plan_of

if TYPE_CHECKING:
    from saemill.common.models.model import LanguageModel
    from saemill.train.watch.losses import Losses


class Watch:
    """The measurements of one run.

    Args:
        plan: when, and on how much.
        store: what is trained on.
        mask: positions left out.
        model: the name of the model, if it is not where it was cached from.
    """

    def __init__(self, plan: Plan, store: ActivationStore, mask: MaskConfig, model: str | None) -> None:
        self.plan, self.store, self.mask, self.model = plan, store, mask, model
        self._held_out: dict[tuple[str, ...], HeldOut] = {}
        self._losses: Losses | None = None
        self._told: set[bool] = set()

    def prepare(self, learners: list[Learner], model: "LanguageModel | None" = None) -> None:
        """Read what it takes to measure the SAEs that this process speaks for, and load the model, if that
        was not done before.

        Args:
            learners: this process's.
            model: the store's, where training has loaded it.

        Raises:
            StoreError: the store is damaged.
            ConfigError: all held-out tokens are masked; the model is another one, or has no losses.
        """
        own = [learner for learner in learners if learner.backend.team.is_first]
        for sites in {learner.variant.sites for learner in own} - self._held_out.keys():
            self._held_out[sites] = HeldOut(self.store, sites, self.mask, self.plan.n_tokens)
        if not own or self.plan.losses_every is None:
            return
        if self._losses is None:
            from saemill.train.watch.losses import Losses  # imports transformers

            device = own[0].parameters.b_D.device
            name_or_model = self.model if model is None else model
            self._losses = Losses(self.store, self.mask, name_or_model, self.plan.losses_tokens, device)
        for sites in self._held_out:
            self._losses.prepare(sites)

    def at_start(self, learners: list[Learner]) -> Mapping[str, Figures]:
        """Measure the SAEs that start from finished ones, before the first step; with the model where it is
        run later. Arguments and result as of `measure`."""
        return {
            learner.variant.name: self._of(learner.variant.sites, parts, self.plan.losses_every is not None)
            for learner in learners
            if learner.variant.init_from is not None and (parts := learner.export({}, copied=False))
        }

    def measure(
        self, learners: list[Learner], step: int, is_last: bool, step_seconds: float
    ) -> Mapping[str, Figures]:
        """Measure SAEs as they are now, where it is time for it. All processes of a team call it together.

        Args:
            learners: this process's.
            step: number of steps done.
            is_last: whether no step follows.
            step_seconds: time of a step, to tell what measuring costs.

        Returns: figures by variant; none on processes that do not speak for their team.
        """
        if not self.plan.is_due(step, is_last):
            return {}
        started, figures = time.perf_counter(), {}
        has_losses = self.plan.has_losses(step, is_last)
        for learner in learners:
            if learner.frozen:
                figures[learner.variant.name] = dict.fromkeys(NAMES)
            elif parts := learner.export({}, copied=False):
                figures[learner.variant.name] = self._of(learner.variant.sites, parts, has_losses)
        self._tell(has_losses, time.perf_counter() - started, step_seconds)
        return figures

    def _of(self, sites: tuple[str, ...], parts: Parts, has_losses: bool) -> Figures:
        """Measure one SAE; one whose weights overflowed in the last step has no figures."""
        if not all(bool(weights.isfinite().all()) for weights in parts.weights.values()):
            return dict.fromkeys(NAMES)
        sae = Sae.of(parts)
        figures = self._held_out[sites].measure(sae)
        if has_losses and self._losses is not None:
            figures |= self._losses.measure(sites, sae)
        return {
            name: value if value is not None and math.isfinite(value) else None
            for name, value in figures.items()
        }

    def _tell(self, has_losses: bool, seconds: float, step_seconds: float) -> None:
        """Say once of each kind of measurement what it costs; the first one also warms up what it uses."""
        if has_losses in self._told or not self._held_out:
            return
        self._told.add(has_losses)
        every = self.plan.losses_every if has_losses else self.plan.every
        assert every is not None
        n_tokens = len(next(iter(self._held_out.values())).x_TD)
        what = ", and the model's losses" if has_losses else ""
        share = seconds / (every * step_seconds)
        say(
            f"measured on {counted(n_tokens, f'held-out {self.store.text.unit}')}{what}: {seconds:.2g} s, as "
            f"long as {seconds / step_seconds:.1f} steps; every {every:,} steps that is {share:.1%} more time"
        )


def watch_of(config: TrainConfig, store: ActivationStore, mask: MaskConfig, n_steps: int) -> Watch | None:
    """Plan the measurements of a run, if there are to be any; see `plan_of`.

    Raises:
        ConfigError: what is asked for cannot be measured.
    """
    plan = plan_of(config, store, mask, n_steps)
    return Watch(plan, store, mask, config.model) if plan else None

"""The learners of one site, or of one pair of sites.

Each batch is standardised, rounded and quantised once for all of them.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saemill.train.backends.architecture import Dead
from saemill.train.backends.base import Backend
from saemill.train.learner.learner import Learner
from saemill.train.profile import region
from saemill.train.stream.scaling import Scaling
from saemill.train.stream.whole_rows import Text

if TYPE_CHECKING:
    from saemill.train.objective.model import ModelLoss, Passages

DEAD_EVERY_STEPS = 4
"""Steps between two searches for dead latents: each makes the host wait for the device."""


class Bank:
    """Learners of one site, or of transcoders from it to one other site, each trained as if alone.

    Args:
        site: its name.
        scaling: the site's units.
        backend: computes their steps.
        learners: all of this site, target and process.
        target: name of the site that transcoders predict, and its units.
        above: the model, where some learner's loss is its.
    """

    def __init__(
        self,
        site: str,
        scaling: Scaling,
        backend: Backend,
        learners: list[Learner],
        target: tuple[str, Scaling] | None = None,
        above: "ModelLoss | None" = None,
    ) -> None:
        self.site, self.scaling, self.backend, self.learners = site, scaling, backend, learners
        self.target, self.above = target, above

    def step(
        self,
        stored_TD: Tensor,
        lr_factor: float,
        step: int,
        target_TE: Tensor | None = None,
        text: Text | None = None,
    ) -> None:
        """Take one optimizer step of every learner that has not diverged.

        Args:
            stored_TD: a batch as it is stored, on the device; the loss is the mean over its tokens.
            lr_factor: the schedule's factor on each learner's peak rate.
            step: its number.
            target_TE: the same tokens at the target site, as they are stored; None of SAEs.
            text: the rows that the batch is, with tokens that are not trained on; None where tokens are
                shuffled.
        """
        passages = None
        if text is not None:
            if self.above is not None:
                passages = self._passages(self.above, text, stored_TD if target_TE is None else target_TE)
            keep_T = text.keep_RS.flatten().to(stored_TD.device)
            stored_TD, target_TE = stored_TD[keep_T], None if target_TE is None else target_TE[keep_T]
        with region("copy"):
            x_TD = self.scaling.standardise(stored_TD)
            y_TE = None
            if self.target is not None and target_TE is not None:
                y_TE = self.target[1].standardise(target_TE)
        if step % DEAD_EVERY_STEPS == 0:
            for learner in self.learners:
                learner.find_dead()
            self.count_dead()
        batch = self.backend.prepare(x_TD, y_TE)
        for learner in self.learners:
            if not learner.frozen:
                learner.step(batch, lr_factor, step, passages)

    def _passages(self, above: "ModelLoss", text: Text, y_TE: Tensor) -> "Passages":
        """Make ready what the losses of the model need of a batch, once for all learners."""
        from saemill.train.objective.model import Passages  # imports transformers

        site = self.site if self.target is None else self.target[0]
        above.check(site, *text)
        return Passages(above, site, *text, y_TE)

    def count_dead(self) -> None:
        """List each learner's dead latents, and how many the team has, in one exchange for all."""
        lists = [learner.dead_F.nonzero()[:, 0] for learner in self.learners]
        n_dead = self.backend.team.latents.all_reduce(torch.tensor([len(dead_S) for dead_S in lists]))
        for learner, dead_S, n in zip(self.learners, lists, n_dead.tolist(), strict=True):
            learner.dead = Dead(dead_S, n)

    def freeze_diverged(self) -> list[Learner]:
        """Stop the learners that diverged since the last call.

        Returns: these.
        """
        stopped = []
        for learner in self.learners:
            if not learner.frozen and int(learner.diverged_step) >= 0:
                learner.frozen = True
                stopped.append(learner)
        return stopped

    def refresh(self) -> None:
        """Follow the tensors of `checkpoint_tensors`, which were filled from a checkpoint."""
        for learner in self.learners:
            learner.weights.refresh()
        self.count_dead()

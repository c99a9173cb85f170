"""What the model loses with an SAE in the place of a site's activations, on a few held-out rows.

The rows are the store's first held-out ones, with which `saemill assess` begins too; positions, losses and
what is recovered are as it defines them. What does not depend on an SAE is computed once, before training:
the true activations, and the losses of the untouched model and with zeros at the site.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from saemill.common.errors import ConfigError
from saemill.common.models.model import LanguageModel
from saemill.common.sae.sae import Sae
from saemill.common.steer.losses import Passes, Task, cross_entropy, load_with_losses
from saemill.common.steer.substitute import Substitute, substitute
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.mask import MaskConfig
from saemill.train.watch.held_out import Figures

TOKENS_AT_ONCE = 1024
NAMES = ("eval_delta_ce", "eval_loss_recovered")
"""What is measured of every SAE: nats per token, and the share of what zeros cost that it does not."""


class Losses:
    """The model of a store, and some held-out rows of it.

    Args:
        store: what is trained on.
        mask: positions left out.
        model: the model if it is loaded; its name, if it is not where it was cached from.
        max_tokens: how many tokens, at most, in whole rows; one row at least.
        device: where it runs.

    Raises:
        ConfigError: the model cannot be loaded, is another one, has no losses, or nothing is left to predict.
    """

    def __init__(
        self,
        store: ActivationStore,
        mask: MaskConfig,
        model: LanguageModel | str | None,
        max_tokens: int,
        device: torch.device,
    ) -> None:
        self.store, self.mask, tokens = store, mask, store.tokens
        self.rows_R = np.flatnonzero(tokens.held_out_R)[: max(1, max_tokens // tokens.ctx_len)]
        if not isinstance(model, LanguageModel):
            model = load_with_losses(model, store, device, "eval_losses_every")
        self.model = model
        self.passes = Passes(self.model, tokens.tokenizer, store.sites)
        tasks = [self._task(rows_R) for rows_R in self._batches()]
        self.tasks = [task for task in tasks if len(task.target_T)]
        self.n_tokens = sum(len(task.target_T) for task in self.tasks)
        if not self.tasks:
            raise ConfigError(
                "eval_losses_every: no position of the held-out rows is to be predicted; leave it out"
            )
        self.clean = 0.0
        """Nats in all of the untouched model."""
        self.zero: dict[str, float] = {}
        """Those with zeros at a site, the one that is predicted of a transcoder."""

    def _batches(self) -> Iterator[NDArray[np.int64]]:
        n_rows = max(1, TOKENS_AT_ONCE // self.store.ctx_len)
        return (self.rows_R[start : start + n_rows] for start in range(0, len(self.rows_R), n_rows))

    def _task(self, rows_R: NDArray[np.int64]) -> Task:
        tokens = self.store.tokens
        ids_RS = np.concatenate([tokens.rows(row, row + 1) for row in rows_R])
        keep_RS = np.concatenate([tokens.keep(row, row + 1, self.mask) for row in rows_R])
        addresses_RS = rows_R[:, None] * tokens.ctx_len + np.arange(tokens.ctx_len)
        return self.passes.task(torch.from_numpy(ids_RS.astype(np.int64)), keep_RS, addresses_RS)

    def prepare(self, sites: tuple[str, ...]) -> None:
        """Compute what does not depend on an SAE, if it is not there: with the activations of its sites.

        Raises:
            DataError: splicing the true activation changes the loss.
        """
        site, missing = sites[-1], set(sites) - self.tasks[0].activations.keys()
        if site in self.zero and not missing:
            return
        self.clean, zero = 0.0, 0.0
        for task in self.tasks:
            clean_T = cross_entropy(self.passes.clean(task, sites), task.target_T)
            self.passes.check_identity(site, task, clean_T)
            x_RSD = task.activations[site]
            instead_RSD = substitute(x_RSD, torch.zeros_like(x_RSD), task.keep_RS)
            self.clean += float(clean_T.sum())
            zero += float(cross_entropy(self.passes.changed(task, site, instead_RSD), task.target_T).sum())
        self.zero[site] = zero

    def measure(self, sites: tuple[str, ...], sae: Sae) -> Figures:
        """Measure an SAE at its site, a transcoder in the place of the second of its two. Where zeros cost no
        loss there is none to recover."""
        sae, spliced, site = sae.to(self.model.device), 0.0, sites[-1]
        for task in self.tasks:
            read_RSD = task.activations[sites[0]]
            instead_RSD = Substitute(sae)(task.activations[site], task.keep_RS, read_RSD)
            changed = self.passes.changed(task, site, instead_RSD)
            spliced += float(cross_entropy(changed, task.target_T).sum())
        zero = self.zero[site]
        recovered = (zero - spliced) / (zero - self.clean) if zero > self.clean else None
        return dict(zip(NAMES, ((spliced - self.clean) / self.n_tokens, recovered), strict=True))

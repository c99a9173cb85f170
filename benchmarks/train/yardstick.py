"""One yardstick for SAEs of all packages: saemill's assessment of their files, on a store's held-out rows.

The files are read by saemill's readers of each format. All SAEs are measured on the same tokens, with the
figures and the intervals of `saemill assess`.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from saemill.assess.config import AssessConfig
from saemill.assess.entries import Measured
from saemill.assess.evalset import EvalSet
from saemill.assess.reconstruction import Reconstruction
from saemill.assess.splicing import Splicing
from saemill.common.errors import SaemillError
from saemill.common.models.cached import check_model, load_model
from saemill.common.sae.sae import Sae
from saemill.common.steer.losses import no_loss
from saemill.common.stores.activations import ActivationStore
from saemill.common.world import Group

FIGURES = (
    "fvu",
    "l0",
    "delta_ce",
    "loss_recovered",
    "dead_fraction",
    "max_decoder_cosine",
    "max_decoder_cosine_random",
)
BATCH_ROWS = 8


class Yardstick:
    """The held-out rows of a store, and the model that it was cached from.

    Args:
        acts: the store.
        site: where the SAEs were trained.
        max_tokens: most tokens for reconstruction and firing.
        model_tokens: most tokens for the losses, in whole rows.
    """

    def __init__(self, acts: Path, site: str, max_tokens: int, model_tokens: int) -> None:
        store = ActivationStore(acts)
        self.site, self.max_tokens, self.model_tokens = site, max_tokens, model_tokens
        self.model = load_model(None, store, None, torch.device("cpu"))
        check_model(None, self.model, store)
        self.evalset = EvalSet(store, None, self.model, store.mask, [site], BATCH_ROWS, Group([0], 0))
        self.no_loss = no_loss(self.model, self.evalset.tokens, int(self.evalset.rows_R[0]))
        self.known: tuple[Reconstruction, Splicing] | None = None

    def measure(self, folders: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
        """Measure some SAEs, by name.

        Returns: the figures of each; of one that cannot be read or used, `unusable` with the reason.
        """
        saes: dict[str, Sae] = {}
        found: dict[str, dict[str, Any]] = {}
        for name, folder in folders.items():
            try:
                saes[name] = self._load(folder)
            except SaemillError as error:
                found[name] = {"unusable": str(error)}
        if saes:
            found |= {name: self._figures(metrics) for name, metrics in self._metrics(saes).items()}
        return {name: found[name] for name in folders}

    def _load(self, folder: Path) -> Sae:
        parts = Sae.load(folder).parts
        origin = {"site": self.site, "tokens_trained": 0, "diverged_at_step": None}
        return Sae.of(replace(parts, config=replace(parts.config, provenance=origin)))

    def _metrics(self, saes: dict[str, Sae]) -> dict[str, dict[str, Any]]:
        """Measure as `saemill assess` does; what does not depend on an SAE only once."""
        sites = dict.fromkeys(saes, self.site)
        rows, losses = self.known or (None, None)
        reconstruction = Reconstruction(saes, sites, self.evalset, rows)
        reconstruction.run(self.evalset.chunks(self.max_tokens))
        splicing = Splicing(saes, sites, self.evalset, [self.model], self.no_loss, losses)
        splicing.run(self.model_tokens)
        self.known = self.known or (reconstruction, splicing)
        defaults = AssessConfig(run=Path())
        dead_share = defaults.dead_percentage_threshold
        return Measured(reconstruction, splicing, defaults.thresholds, dead_share).metrics()

    def _figures(self, metrics: dict[str, Any]) -> dict[str, Any]:
        figures = {name: metrics[name] for name in FIGURES}
        if figures["fvu"]["value"] is None:
            return {"unusable": figures["fvu"]["reason"]}
        return figures

"""What the model loses when a site's activations are replaced by their reconstructions.

At the unmasked positions, and the same ones in every run, the activation is replaced by the SAE's
reconstruction, by zeros, by the cached mean, or (as a check) by itself. Losses are counted at those
positions: next-token for causal models; for masked ones a fixed 15% of the unmasked positions are
replaced by [MASK] and predicted.
"""

from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from copy import copy
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saemill.assess.evalset import EvalSet, Rows
from saemill.assess.sums import Bootstrap, DocumentSums, Figure, Ratio, absent
from saemill.common.errors import ConfigError, DataError
from saemill.common.models.model import LanguageModel, attention_of
from saemill.common.sae.sae import Sae
from saemill.common.steer.substitute import Substitute, substitute
from saemill.common.stores.permutation import hashes
from saemill.common.stores.tokens import TokenStore

MASKED_SHARE = 0.15
MASK_KEY = 15
IDENTITY_TOLERANCE = 1e-3
"""Most nats per token that splicing the true activation may change."""

NOTHING_LOST = "{what} at {site} cost the model no loss, so there is none to recover"
"""Why there is no loss recovered where the model does as well or better without the site."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """Some rows on their way through the model."""

    ids_RS: Tensor
    attention_RS: Tensor | None
    target_T: Tensor
    """int64, the tokens to predict at the counted positions."""
    counted_RS: Tensor
    """bool: where losses are counted."""
    keep_RS: Tensor
    """bool: where activations are replaced."""
    activations: dict[str, Tensor]
    """Per site the true ones, [R, S, D]."""


def check_mask_token(model: LanguageModel, tokens: TokenStore) -> None:
    """Refuse a masked LM whose tokenizer has no mask token, before anything is measured.

    Raises:
        ConfigError: naming the model.
    """
    if model.head == "masked" and tokens.tokenizer.mask_id is None:
        raise ConfigError(f"{model.name} is a masked LM, but its tokenizer has no mask token")


class Splicing:
    """Forward passes with and without replacement over the evaluation rows.

    Args:
        saes: variant name → SAE.
        sites: variant name → site.
        evalset: rows to run on.
        model: with its LM head; see `check_mask_token`.
        no_loss: why losses mean nothing here; KL divergences are counted all the same.
        known: a splicing of the same rows that covers these sites. Its losses without an SAE are used
            again.
    """

    def __init__(
        self,
        saes: dict[str, Sae],
        sites: dict[str, str],
        evalset: EvalSet,
        model: LanguageModel,
        no_loss: str | None = None,
        known: "Splicing | None" = None,
    ) -> None:
        self.saes, self.sites, self.evalset, self.model = saes, sites, evalset, model
        self.no_loss, self.known = no_loss, known
        self.sums = DocumentSums(_columns(saes) if known else self._own_columns() + _columns(saes))
        self.means = {
            site: array.statistics.mean_D.float().to(model.device) for site, array in evalset.arrays.items()
        }
        self.identity: dict[str, float] = known.identity if known else {}
        self.skippable: set[str] = known.skippable if known else set(evalset.sites)
        self.n_tokens = 0

    def _own_columns(self) -> list[str]:
        """Name the sums that are of the model, without any SAE."""
        return ["n", "clean", *(f"{site}/{what}" for site in self.evalset.sites for what in ("zero", "mean"))]

    def run(self, max_tokens: int) -> "Splicing":
        """Count this process's share of the rows up to `max_tokens`, then add up those of all processes.

        Raises:
            DataError: splicing the true activation changes the loss.
        """
        with torch.inference_mode():
            for rows in self.evalset.rows(max_tokens):
                self._rows(rows)
        everyone = self.evalset.everyone
        self.sums.merge(everyone)
        self.n_tokens = sum(everyone.all_gather_objects(self.n_tokens))
        if self.known is not None:
            self.sums = self.known.sums.only(self._own_columns()).concat(self.sums)
            return self
        gathered = everyone.all_gather_objects(self.identity)
        self.identity = {site: nats for identity in reversed(gathered) for site, nats in identity.items()}
        return self

    def only(self, names: Iterable[str]) -> "Splicing":
        """Keep the figures of some of the SAEs."""
        some = copy(self)
        some.saes = {name: self.saes[name] for name in names}
        some.sites = {name: self.sites[name] for name in some.saes}
        some.sums = self.sums.only(self._own_columns() + _columns(some.saes))
        return some

    def _rows(self, rows: Rows) -> None:
        ids_RS, target_RS, counted_RS = self._task(rows)
        if not counted_RS.any():
            return
        counted, keep_RS = torch.from_numpy(counted_RS), torch.from_numpy(rows.keep_RS)
        attention_RS, device = attention_of(ids_RS, self.evalset.tokens.tokenizer), self.model.device
        target_T = target_RS[counted].to(device)
        batch = _Batch(ids_RS, attention_RS, target_T, counted, keep_RS.to(device), {})
        clean = self._clean(batch)
        columns = {} if self.known else self._without_saes(batch, clean)
        for name, sae in self.saes.items():
            site = self.sites[name]
            spliced = self._changed(batch, site, Substitute(sae)(batch.activations[site], batch.keep_RS))
            columns[f"{name}/ce"] = _ce(spliced, target_T)
            columns[f"{name}/kl"] = _kl(clean, spliced)
        units = self.evalset.units(rows.addresses_RS[counted_RS])
        self.n_tokens += len(units)
        self.sums.add(units, columns)

    def _clean(self, batch: _Batch) -> Tensor:
        """Compute log probabilities [T, W] of the untouched model; the sites' activations are kept."""
        with ExitStack() as stack:
            for site in self.evalset.sites:
                stack.enter_context(self.model.splice(site, partial(_note, batch.activations, site)))
            clean = _log_probs(self.model.logits(batch.ids_RS, batch.attention_RS), batch.counted_RS)
        self.skippable -= self.model.tuple_sites
        return clean

    def _without_saes(self, batch: _Batch, clean: Tensor) -> dict[str, NDArray[np.float64]]:
        """Compute losses per token of the untouched model, and with zeros and with the mean at each site."""
        columns = {"n": np.ones(len(batch.target_T)), "clean": _ce(clean, batch.target_T)}
        for site in self.evalset.sites:
            if site not in self.identity:
                self._check_identity(site, batch, columns["clean"])
            x_RSD, mean_D = batch.activations[site], self.means[site]
            ablations = {"zero": torch.zeros_like(x_RSD), "mean": mean_D.to(x_RSD.dtype).expand_as(x_RSD)}
            for what, instead_RSD in ablations.items():
                changed_RSD = substitute(x_RSD, instead_RSD, batch.keep_RS)
                columns[f"{site}/{what}"] = _ce(self._changed(batch, site, changed_RSD), batch.target_T)
        return columns

    def _changed(self, batch: _Batch, site: str, changed_RSD: Tensor) -> Tensor:
        """Compute log probabilities [T, W] of the model with other activations at the site."""
        skip = self.model.skip_blocks_before(site) if site in self.skippable else nullcontext()
        with skip, self.model.splice(site, lambda _: changed_RSD):
            return _log_probs(self.model.logits(batch.ids_RS, batch.attention_RS), batch.counted_RS)

    def _task(self, rows: Rows) -> tuple[Tensor, Tensor, NDArray[np.bool_]]:
        """Build input ids, targets, and the positions at which the loss is counted; each [R, S]."""
        if self.model.head == "causal":
            target = rows.ids_RS.roll(-1, 1)
            counted = rows.keep_RS.copy()
            counted[:, -1] = False
            return rows.ids_RS, target, counted
        mask_id = self.evalset.tokens.tokenizer.mask_id
        assert mask_id is not None
        drawn = hashes(int(rows.addresses_RS.max()) + 1, MASK_KEY)[rows.addresses_RS]
        counted = rows.keep_RS & (drawn < np.uint64(MASKED_SHARE * 2**64))
        ids = torch.where(torch.from_numpy(counted), mask_id, rows.ids_RS)
        return ids, rows.ids_RS, counted

    def _check_identity(self, site: str, batch: _Batch, clean_T: NDArray[np.float64]) -> None:
        """Splice the true activation; where that needs the blocks before the site, skip them no more."""

        def change() -> float:
            spliced = self._changed(batch, site, batch.activations[site].clone())
            return float(np.abs(_ce(spliced, batch.target_T) - clean_T).mean())

        if not np.isfinite(clean_T).all():
            return  # the losses will be null; a batch with losses may come
        self.identity[site] = change()
        if not self.identity[site] <= IDENTITY_TOLERANCE and site in self.skippable:
            self.skippable.remove(site)
            self.identity[site] = change()
        if not self.identity[site] <= IDENTITY_TOLERANCE:
            raise DataError(
                f"splicing the true activation at {site} changes the loss by {self.identity[site]:.4f} nats "
                "per token: the site is not where the model's forward pass reads it"
            )

    def ratios(self, name: str) -> dict[str, Ratio]:
        """Compute losses in nats per token, ΔCE, KL and loss recovered of one variant."""
        n, clean = self.sums.column("n"), self.sums.column("clean")
        site = self.sites[name]
        zero, mean = (self.sums.column(f"{site}/{what}") for what in ("zero", "mean"))
        ce, kl = (self.sums.column(f"{name}/{what}") for what in ("ce", "kl"))
        return {
            "delta_ce": Ratio(ce - clean, n),
            "kl": Ratio(kl, n),
            "loss_recovered": Ratio(zero - ce, zero - clean, NOTHING_LOST.format(what="zeros", site=site)),
            "loss_recovered_from_mean": Ratio(
                mean - ce, mean - clean, NOTHING_LOST.format(what="the mean", site=site)
            ),
            "ce_clean": Ratio(clean, n),
            "ce_spliced": Ratio(ce, n),
            "ce_zero": Ratio(zero, n),
            "ce_mean": Ratio(mean, n),
        }

    def metrics(self, name: str, bootstrap: Bootstrap) -> dict[str, Figure]:
        """Compute the `ratios` of one variant as figures; without losses where they mean nothing."""
        figures = bootstrap.figures(self.ratios(name))
        return figures | {what: absent(self.no_loss) for what in figures if self.no_loss and what != "kl"}


METRICS = ("delta_ce", "kl", "loss_recovered", "loss_recovered_from_mean", "ce_clean", "ce_spliced",
           "ce_zero", "ce_mean")  # fmt: skip


def absent_metrics(reason: str) -> dict[str, Figure]:
    """Return the figures of `Splicing.ratios` where no model was run."""
    return {name: absent(reason) for name in METRICS}


def _columns(names: Iterable[str]) -> list[str]:
    """Name the sums that are of these SAEs."""
    return [f"{name}/{what}" for name in names for what in ("ce", "kl")]


def _note(activations: dict[str, Tensor], site: str, x_RSD: Tensor) -> Tensor:
    activations[site] = x_RSD.clone()
    return x_RSD


def _log_probs(logits_RSW: Tensor, counted_RS: Tensor) -> Tensor:
    """Compute log softmax in float32 at the counted positions. [T, vocabulary]."""
    return logits_RSW[counted_RS.to(logits_RSW.device)].float().log_softmax(-1)


def _ce(log_probs: Tensor, target_T: Tensor) -> NDArray[np.float64]:
    return -log_probs.gather(1, target_T[:, None])[:, 0].double().cpu().numpy()


def _kl(clean: Tensor, spliced: Tensor) -> NDArray[np.float64]:
    """Compute KL(p ‖ p_spliced) per token from log probabilities [T, W]; tokens of no probability add 0."""
    p = clean.exp()
    return torch.where(p > 0, p * (clean - spliced), 0.0).sum(-1, dtype=torch.float64).cpu().numpy()

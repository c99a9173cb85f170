"""What the model loses when a site's activations are replaced by their reconstructions, or predictions.

The activation is replaced by the SAE's reconstruction, by zeros, by the cached mean, or (as a check) by
itself; where, and what is counted, `common.steer.losses` says. The sites that a cross-layer transcoder
predicts are all replaced at once: by its predictions in the model that they change, by zeros, by the means,
and by what a baseline reconstructs of the untouched model's.

Those that a crosscoder joins are replaced one at a time, each by its part of what is reconstructed of the
untouched model's: as a whole it costs the mean. Of two models both run on the same tokens, and each site is
replaced in the model that it is of.
"""

from collections.abc import Iterable, Sequence
from copy import copy
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saemill.assess.evalset import EvalSet, Rows
from saemill.assess.sums import Bootstrap, DocumentSums, Figure, Ratio, absent
from saemill.common.models.model import LanguageModel
from saemill.common.sae.sae import Sae
from saemill.common.steer.across_layers import AcrossLayers
from saemill.common.steer.losses import Passes, Task, cross_entropy, in_cache
from saemill.common.steer.substitute import Substitute, substitute
from saemill.common.stores.site_names import BESIDE, is_beside, is_joined, parts_of

NOTHING_LOST = "{what} at {site} cost the model no loss, so there is none to recover"
"""Why there is no loss recovered where the model does as well or better without the site."""


class Splicing:
    """Forward passes with and without replacement over the evaluation rows.

    Args:
        saes: variant name → SAE.
        sites: variant name → site whose activations are replaced.
        evalset: rows to run on.
        models: with their LM heads; see `common.steer.losses.check_mask_token`. The second is that of the
            store beside.
        no_loss: why losses mean nothing here; KL divergences are counted all the same.
        known: a splicing of the same rows that covers these sites. Its losses without an SAE are used
            again.
    """

    def __init__(
        self,
        saes: dict[str, Sae],
        sites: dict[str, str],
        evalset: EvalSet,
        models: Sequence[LanguageModel],
        no_loss: str | None = None,
        known: "Splicing | None" = None,
    ) -> None:
        self.saes, self.sites, self.evalset = saes, sites, evalset
        self.no_loss, self.known = no_loss, known
        predicted = dict.fromkeys(sites[name] for name, sae in saes.items() if sae.config.predicted)
        self.together: list[str] = known.together if known else list(predicted)
        """Joined sites that cross-layer transcoders predict, at all of which they are spliced in at once."""
        self.places = {name: self._places(site) for name, site in sites.items()}
        """Variant name → the sites at which it is spliced in, one at a time, by what its sums are called; ""
        names what it is spliced in for as a whole."""
        columns = self._columns(saes)
        self.sums = DocumentSums(columns if known else self._own_columns() + columns)
        self.means = {
            site: evalset.arrays[site].statistics.mean_D.float().to(models[0].device)
            for site in evalset.model_sites
        }
        self.passes: list[Passes] = known.passes if known else self._passes(models)
        """Those of each model."""
        self.n_tokens = 0

    def _passes(self, models: Sequence[LanguageModel]) -> list[Passes]:
        """Make the forward passes of each model, with its own sites."""
        sites, tokenizer = self.evalset.model_sites, self.evalset.tokens.tokenizer
        return [
            Passes(model, tokenizer, [site for site in sites if is_beside(site) == bool(prefix)], prefix)
            for model, prefix in zip(models, ("", BESIDE), strict=False)
        ]

    def _passes_at(self, site: str) -> Passes:
        """Return those of the model that has a site."""
        return self.passes[is_beside(site)]

    def _own_columns(self) -> list[str]:
        """Name the sums that are of the models, without any SAE."""
        sites = (*self.evalset.model_sites, *self.together)
        losses = [f"{site}/{what}" for site in sites for what in ("zero", "mean", "zero_kl")]
        clean = dict.fromkeys(_clean_at(site) for site in ("", *self.evalset.model_sites))
        return ["n", *clean, *losses, *(f"{site}/squares" for site in self._parts_together)]

    @property
    def _parts_together(self) -> list[str]:
        """List the sites that are replaced at once."""
        return list(dict.fromkeys(part for site in self.together for part in parts_of(site)))

    def _places(self, site: str) -> dict[str, str]:
        """List where what reconstructs a site is spliced in: there; of joined sites at each; of those that a
        cross-layer transcoder predicts, at all as well."""
        if not is_joined(site):
            return {"": site}
        whole = {"": site} if site in self.together else {}
        return whole | {f"at {part}/": part for part in parts_of(site)}

    def _columns(self, names: Iterable[str]) -> list[str]:
        """Name the sums that are of these SAEs."""
        losses = [
            f"{name}/{place}{what}" for name in names for place in self.places[name] for what in ("ce", "kl")
        ]
        return losses + [
            f"{name}/at {part.site}/sse" for name in names for part in self.saes[name].config.predicted
        ]

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
        for identity in reversed(everyone.all_gather_objects(self.identity)):
            for site, nats in identity.items():
                self._passes_at(site).identity[site] = nats
        return self

    @property
    def identity(self) -> dict[str, float]:
        """Return what splicing the true activation changed, in nats per token, by site."""
        return {site: nats for passes in self.passes for site, nats in passes.identity.items()}

    def only(self, names: Iterable[str]) -> "Splicing":
        """Keep the figures of some of the SAEs."""
        some = copy(self)
        some.saes = {name: self.saes[name] for name in names}
        some.sites = {name: self.sites[name] for name in some.saes}
        some.places = {name: self.places[name] for name in some.saes}
        some.sums = self.sums.only(self._own_columns() + self._columns(some.saes))
        return some

    def _rows(self, rows: Rows) -> None:
        task = self.passes[0].task(rows.ids_RS, rows.keep_RS, rows.addresses_RS)
        if not len(task.target_T):
            return
        clean = [passes.clean(task, passes.sites) for passes in self.passes]
        columns = {} if self.known else self._without_saes(task, clean)
        for name, sae in self.saes.items():
            instead = self._instead(name, sae, task)
            for place, site in self.places[name].items():
                if is_joined(site) and sae.config.predicted:
                    spliced, errors = self._in_all_places(name, sae, task)
                    columns |= errors
                else:  # an SAE in the place of a site, or a baseline in that of joined ones
                    spliced = self._with(task, {part: instead[part] for part in parts_of(site)})
                columns[f"{name}/{place}ce"] = cross_entropy(spliced, task.target_T)
                columns[f"{name}/{place}kl"] = _kl(clean[is_beside(site)], spliced)
        units = self.evalset.units(rows.addresses_RS[task.counted_RS.numpy()])
        self.n_tokens += len(units)
        self.sums.add(units, columns)

    def _in_all_places(
        self, name: str, sae: Sae, task: Task
    ) -> tuple[Tensor, dict[str, NDArray[np.float64]]]:
        """Compute log probabilities [T, W] of the model with a cross-layer transcoder at all sites that it
        predicts, and its squared errors at each: what it wrote there, beside what the untouched model has."""
        across = AcrossLayers(sae)
        spliced = self._passes_at(self.sites[name]).replaced(task, across.in_place(task.keep_RS))
        errors = {
            f"{name}/at {part.site}/sse": _squares(task, part.site, across.written_to(layer))
            for layer, part in enumerate(sae.config.predicted)
        }
        return spliced, errors

    def _with(self, task: Task, instead: dict[str, Tensor]) -> Tensor:
        """Compute log probabilities [T, W] of the model with other activations [R, S, D] at some sites."""
        passes = self._passes_at(next(iter(instead)))
        if len(instead) == 1:
            return passes.changed(task, *next(iter(instead.items())))
        edits = {site: partial(_other, x_RSD) for site, x_RSD in instead.items()}
        return passes.replaced(task, edits)

    def _instead(self, name: str, sae: Sae, task: Task) -> dict[str, Tensor]:
        """Compute what takes the place of the activations at each site of an SAE, all encoded from those of
        the untouched model. [R, S, D]"""
        site = self.sites[name]
        own = _joined(task, site)
        read_RSD = torch.cat(list(_joined(task, str(sae.site)).values()), -1)
        changed_RSD = Substitute(sae)(torch.cat(list(own.values()), -1), task.keep_RS, read_RSD)
        widths = [x_RSD.shape[-1] for x_RSD in own.values()]
        return dict(zip(own, torch.split(changed_RSD, widths, -1), strict=True))

    def _without_saes(self, task: Task, clean: list[Tensor]) -> dict[str, NDArray[np.float64]]:
        """Compute losses per token of the untouched models, and with zeros (KL as well) and with the mean at
        each site."""
        columns = {"n": np.ones(len(task.target_T))}
        for passes, log_probs in zip(self.passes, clean, strict=True):
            columns[_clean_at(passes.prefix)] = cross_entropy(log_probs, task.target_T)
        for site in self.evalset.model_sites:
            self._passes_at(site).check_identity(site, task, columns[_clean_at(site)])
        for part in self._parts_together:
            columns[f"{part}/squares"] = _squares(task, part, self.means[part])
        for site in (*self.evalset.model_sites, *self.together):
            for what in ("zero", "mean"):
                ablated = {part: self._ablated(task, part, what) for part in parts_of(site)}
                changed = self._with(task, ablated)
                columns[f"{site}/{what}"] = cross_entropy(changed, task.target_T)
                if what == "zero":
                    columns[f"{site}/zero_kl"] = _kl(clean[is_beside(site)], changed)
        return columns

    def _ablated(self, task: Task, site: str, what: str) -> Tensor:
        """Return the activations of a site with zeros or the mean in their place. [R, S, D]"""
        x_RSD, mean_D = task.activations[site], self.means[site]
        instead_RSD = torch.zeros_like(x_RSD) if what == "zero" else mean_D.to(x_RSD.dtype).expand_as(x_RSD)
        return substitute(x_RSD, instead_RSD, task.keep_RS)

    def ratios(self, name: str) -> dict[str, Ratio]:
        """Compute losses in nats per token, ΔCE, KL and loss recovered of one variant: of a crosscoder from
        the means over its sites."""
        n, site, places = self.sums.column("n"), self.sites[name], self._whole(name)
        clean = self._mean(_clean_at(place) for place in places.values())
        ce, kl = (self._mean(f"{name}/{place}{what}" for place in places) for what in ("ce", "kl"))
        zero, mean, kl_zero = (
            self._mean(f"{place}/{what}" for place in places.values()) for what in ("zero", "mean", "zero_kl")
        )
        return {
            "delta_ce": Ratio(ce - clean, n),
            "kl": Ratio(kl, n),
            "kl_zero": Ratio(kl_zero, n),
            "loss_recovered": Ratio(zero - ce, zero - clean, NOTHING_LOST.format(what="zeros", site=site)),
            "loss_recovered_from_mean": Ratio(
                mean - ce, mean - clean, NOTHING_LOST.format(what="the mean", site=site)
            ),
            "ce_clean": Ratio(clean, n),
            "ce_spliced": Ratio(ce, n),
            "ce_zero": Ratio(zero, n),
            "ce_mean": Ratio(mean, n),
        }

    def _whole(self, name: str) -> dict[str, str]:
        """List the places over which figures of an SAE as a whole are the mean: of a crosscoder its sites."""
        places = self.places[name]
        return {"": places[""]} if "" in places else places

    def _mean(self, columns: Iterable[str]) -> NDArray[np.float64]:
        """Compute the mean of some sums. [n_documents]"""
        return np.asarray(np.mean([self.sums.column(name) for name in columns], axis=0))

    def part_metrics(self, name: str, part: str, bootstrap: Bootstrap) -> dict[str, Figure]:
        """Compute figures of an SAE of several sites at one of them: ΔCE with its part of the reconstruction
        in the place of the activations there; of a cross-layer transcoder FVU with all sites replaced, of
        what the untouched model has there around the cached mean."""
        figures = {}
        if self.saes[name].config.predicted:
            sse, squares = self.sums.column(f"{name}/at {part}/sse"), self.sums.column(f"{part}/squares")
            figures["fvu_replaced"] = bootstrap.figure(Ratio(sse, squares, f"{part} does not vary"))
        if self.no_loss:
            return figures | {"delta_ce": absent(self.no_loss)}
        n, clean = self.sums.column("n"), self.sums.column(_clean_at(part))
        ce = self.sums.column(f"{name}/at {part}/ce")
        return figures | {"delta_ce": bootstrap.figure(Ratio(ce - clean, n))}

    def metrics(self, name: str, bootstrap: Bootstrap) -> dict[str, Figure]:
        """Compute the `ratios` of one variant as figures; without losses where they mean nothing."""
        figures = bootstrap.figures(self.ratios(name))
        return figures | {what: absent(self.no_loss) for what in figures if self.no_loss and what not in KL}


KL = ("kl", "kl_zero")
"""Figures that need no loss."""
METRICS = ("delta_ce", *KL, "loss_recovered", "loss_recovered_from_mean", "ce_clean", "ce_spliced",
           "ce_zero", "ce_mean")  # fmt: skip


def absent_metrics(reason: str) -> dict[str, Figure]:
    """Return the figures of `Splicing.ratios` where no model was run."""
    return {name: absent(reason) for name in METRICS}


def _clean_at(site: str) -> str:
    """Name the sum of the losses of the untouched model that has a site."""
    return f"{BESIDE}clean" if is_beside(site) else "clean"


def _joined(task: Task, site: str) -> dict[str, Tensor]:
    """List the untouched activations of a site, or of those that are joined. [R, S, D]"""
    return {part: task.activations[part] for part in parts_of(site)}


def _squares(task: Task, site: str, other_RSD: Tensor) -> NDArray[np.float64]:
    """Compute squared distances of the untouched activations of a site from others, at the positions that
    count. float64 [T]"""
    counted_RS = task.counted_RS.to(other_RSD.device)
    x_RSD = task.activations[site]
    difference_TD = (x_RSD.double() - other_RSD.double())[counted_RS]
    return difference_TD.square().sum(1).cpu().numpy()


def _other(changed_RSD: Tensor, _: Tensor) -> Tensor:
    """Return an activation in the place of the model's own."""
    return changed_RSD


def _kl(clean: Tensor, spliced: Tensor) -> NDArray[np.float64]:
    """Compute KL(p ‖ p_spliced) per token from log probabilities [T, W]; tokens of no probability add 0."""
    each = []
    for some in in_cache(clean):
        p = clean[some].exp()
        terms = torch.where(p > 0, p * (clean[some] - spliced[some]), 0.0)
        each.append(terms.sum(-1, dtype=torch.float64))
    return torch.cat(each).cpu().numpy()

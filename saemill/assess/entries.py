"""The entry of each variant in the assessment: its figures, its checks, how far it is from the best."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saemill.assess import verdict
from saemill.assess.by_source import BySource
from saemill.assess.config import Thresholds
from saemill.assess.dealing import for_each
from saemill.assess.directions import found_in, norm_shares, siblings
from saemill.assess.latent_figures import dense_latents, latent_figures
from saemill.assess.reader import PassageReader, Reader, reader_of
from saemill.assess.reconstruction import FAR_METRICS, Reconstruction
from saemill.assess.splicing import Splicing, absent_metrics
from saemill.assess.sums import Figure, Ratio, Split, absent, number
from saemill.common import config as settings
from saemill.common.log import counted
from saemill.common.sae.sae import Sae
from saemill.common.stores.statistics import FAR, far_warning, unheld_warning

N_BINS = 20
"""Bins of a histogram of shares."""
Entry = dict[str, Any]
"""One variant in `final_assessment.json`."""


@dataclass(frozen=True)
class Measured:
    """What the passes over the evaluation tokens measured, the same on every process."""

    reconstruction: Reconstruction
    splicing: Splicing | str
    """The losses, or why there are none."""
    thresholds: Thresholds
    dead_share: float
    """Share of the tokens; a latent that fires on fewer counts as dead."""

    def only(self, names: Iterable[str]) -> "Measured":
        """Keep the figures of some of the SAEs."""
        losses = self.splicing if isinstance(self.splicing, str) else self.splicing.only(names)
        return replace(self, reconstruction=self.reconstruction.only(names), splicing=losses)

    def metrics(self) -> dict[str, dict[str, Figure]]:
        """Compute the figures of each SAE."""
        return for_each(list(self.reconstruction.saes), self._metrics, self.reconstruction.evalset.everyone)

    def entries(self, beside: "Beside") -> list[Entry]:
        """List one entry per SAE, in the order of the run, each compared with its baselines."""
        saes, everyone = self.reconstruction.saes, self.reconstruction.evalset.everyone
        metrics = self.metrics()
        errors = for_each(list(saes), lambda name: self._error_checks(name, beside), everyone)
        entries = []
        for name, sae in saes.items():
            latents = verdict.latent_checks(metrics[name], self.thresholds, self._unseen)
            dense = {"dense": self._dense(name, beside)}
            entries.append(self._entry(name, sae, metrics[name], errors[name] + latents) | dense)
        return entries

    def ranking(self, left_out: dict[str, tuple[Sae, str]], beside: "Beside") -> list[Entry]:
        """Sort the entries, best first, each compared with its baselines and with the best of those that
        replace the same sites.

        Args:
            left_out: variants that were not measured, each with the reason; they come last.
            beside: the baselines.
        """
        saes, everyone = self.reconstruction.saes, self.reconstruction.evalset.everyone
        entries = self.entries(beside)
        found = self.found_in_seeds  # by all processes together
        for entry in entries:
            entry |= self._beyond_figures(entry["name"], found.get(entry["name"]))
        for name, (sae, reason) in left_out.items():
            metrics = dict.fromkeys(entries[0]["metrics"], absent(reason))
            instead = {"not_measured": reason, "verdict": reason.partition(":")[0]}
            entries.append(self._entry(name, sae, metrics, []) | instead)
        entries = verdict.order(entries, for_each(list(saes), self._loss, everyone))
        best_of = {e["name"]: group[0]["name"] for group in verdict.groups(entries).values() for e in group}
        others = [name for name in saes if name != best_of[name]]
        versus = for_each(others, lambda name: self._versus(name, best_of[name]), everyone)
        for entry in entries:
            if entry["name"] in versus:
                entry["versus_best"] = versus[entry["name"]]
        return entries

    def bests(self, entries: list[Entry]) -> list[dict[str, Any]]:
        """List the best of each group of variants that replace the same sites, of some that are sorted."""
        measured = verdict.groups(entry for entry in entries if entry["not_measured"] is None)
        names = {site: group[0]["name"] for site, group in measured.items()}
        return [
            {"site": site, "variant": name, "on_other_documents": self.on_other_documents(name)}
            for site, name in names.items()
        ]

    def on_other_documents(self, best: str) -> dict[str, Any]:
        """Compute the best variant's figures on documents that had no part in choosing it."""
        split, chosen_by = self._split, "fvu"
        metrics = self.reconstruction.metrics(best, split.reported_on)
        if isinstance(self.splicing, Splicing):
            metrics |= self.splicing.metrics(best, self._model_split.reported_on)
        if self._losses:
            split, chosen_by = self._model_split, "delta_ce"
        return {
            "chosen_by": chosen_by,
            "n_documents_chosen_on": int(split.chosen_on.sum()),
            "n_documents": split.reported_on.n_documents,
            "overlap": split.overlap,
            "metrics": metrics,
        }

    def data(self, best: str) -> dict[str, Any]:
        """Describe the data measured on, with sentences on what the figures do not show; `best` names a
        variant."""
        evalset, losses = self.reconstruction.evalset, self.splicing
        places = {site: self.reconstruction.place(site) for site in evalset.sites}
        return {
            "chosen": evalset.description,
            "tokens_fingerprint": evalset.text.fingerprint,
            "unit": evalset.text.unit,
            "document": evalset.text.document,
            "n_tokens": self.reconstruction.n_tokens,
            "n_documents": len(self.reconstruction.sums.rows),
            "n_documents_left_out_as_seen": evalset.n_seen_documents,
            "n_tokens_with_losses": losses.n_tokens if isinstance(losses, Splicing) else 0,
            "mask": settings.plain(evalset.mask),
            "dead_percentage_threshold": self.dead_share,
            "identity_splice_nats": losses.identity if isinstance(losses, Splicing) else None,
            "sites": places,
            "notes": [note for site in places for note in self.notes(site, best)],
        }

    def notes(self, site: str, best: str) -> list[str]:
        """List sentences on what the figures at a site do not show."""
        measured, evalset = self.reconstruction, self.reconstruction.evalset
        array, unit = evalset.arrays[site], evalset.text.unit
        place, unheld = measured.place(site), unheld_warning(site, array.statistics, array.dtype)
        notes, rows = [unheld] if unheld else [], counted(measured.n_tokens, unit)
        if (role := array.role) and role.kind == "holds_residual":
            notes.append(
                f"{site} holds the whole residual stream: where zeros or the mean take its place that is "
                f"gone too, and loss recovered counts it; what the module adds alone is at {role.module}"
            )
        if place["n_zero"]:
            notes.append(
                f"{site}: {place['n_zero']:,} of {rows} are zero vectors; cosine and norm ratio are of the "
                "others"
            )
        if place["n_far"]:
            names = [name for name, its_site in measured.sites.items() if its_site == site]
            name = best if best in names else names[0]
            metrics = measured.metrics(name, self._split.all)
            without, error, variance = (number(metrics[what]) for what in FAR_METRICS)
            notes.append(
                f"{site}: {place['n_far']:,} of {rows} are more than {FAR:g} times as far from the mean as "
                f"the median {unit}, up to {place['largest_ratio']:,.0f} times: {variance} of the variance "
                f"and, of {name}, {error} of the squared error; its FVU without them is {without}"
            )
        elif far := far_warning(site, array.statistics, unit):
            notes.append(f"{far}. None of the {unit}s measured here is")
        return notes

    def _error_checks(self, name: str, beside: "Beside") -> list[verdict.Check]:
        """Check an SAE's errors against those of its baselines, on the same documents."""
        checks = []
        for kind, other in beside.of[name].items():
            for metric, share in self._shares(name, other, beside.measured[other]).items():
                checks.append(verdict.error_check(metric, kind, other, share))
        return checks

    def _shares(self, name: str, other: str, untrained: "Measured") -> dict[str, Figure]:
        """Compute FVU, and ΔCE where there are losses, as shares of those of a baseline."""
        error, its_error = (
            self.reconstruction.ratios(name)["fvu"],
            untrained.reconstruction.ratios(other)["fvu"],
        )
        share = Ratio(error.above, its_error.above, f"{other} leaves no error")
        shares = {"fvu": self._split.all.figure(share)}
        if self.reconstruction.evalset.text.unit == "token":
            cost, its_cost = self._cost(name), untrained._cost(other)
            if isinstance(cost, str) or isinstance(its_cost, str):
                shares["delta_ce"] = absent(cost if isinstance(cost, str) else str(its_cost))
            else:
                share = Ratio(cost.above, its_cost.above, f"{other} costs the model nothing")
                shares["delta_ce"] = self._model_split.all.figure(share)
        if reason := self.reconstruction.unusable(name) or untrained.reconstruction.unusable(other):
            return dict.fromkeys(shares, absent(reason))
        return shares

    def _entry(self, name: str, sae: Sae, metrics: dict[str, Figure], evidence: list[verdict.Check]) -> Entry:
        checks = verdict.thresholds_checks(metrics, self.thresholds, self._unseen)
        provenance = sae.config.provenance
        return {
            "name": name,
            "site": provenance["site"],
            "target_site": provenance.get("target_site"),
            "k": sae.config.k,
            "architecture": sae.config.architecture,
            "num_latents": sae.config.num_latents,
            "tokens_trained": provenance.get("tokens_trained"),
            "seed": (provenance.get("variant") or {}).get("seed"),
            "diverged_at_step": provenance.get("diverged_at_step"),
            "not_measured": None,
            "metrics": metrics,
            "evidence": evidence,
            "verdict": verdict.conclude(evidence),
            "checks": checks,
            "checks_passed": verdict.summary(checks),
            "cuts": self._cuts(name),
            "by_source": self._by_source.figures(name) if name in self.reconstruction.saes else {},
        }

    def _beyond_figures(self, name: str, found_F: NDArray[np.int64] | None) -> dict[str, Any]:
        """Describe where an SAE errs most, and name those that differ from it in the seed alone, with how
        many of its latents they have; nothing of one that has no figures."""
        measured = self.reconstruction
        if name not in measured.saes or measured.unusable(name):
            return {}
        profile = measured.profile
        mean = float(measured.sums.column(f"{name}/sse").sum()) / max(1, measured.n_tokens)
        twins = list(siblings(name, measured.saes))
        found_F = np.zeros(0, int) if found_F is None else found_F[measured.live(name, self.dead_share)]
        return {
            "twins": twins,
            "found_in_seeds": np.bincount(found_F, minlength=len(twins) + 1).tolist() if twins else [],
            "groups": profile.groups(name),
            "worst": [
                {"times": token.error / mean, "place": self._reader.place(token.address).model_dump()}
                for token in profile.worst(name)
                if mean > 0
            ],
            "norm_shares": self._norm_shares(name),
        }

    def _dense(self, name: str, beside: "Beside") -> list[dict[str, Any]]:
        """Describe the dense latents of an SAE."""
        pca = beside.of[name].get("pca")
        sae = None if pca is None else beside.measured[pca].reconstruction.saes[pca]
        return dense_latents(self.reconstruction, name, sae)

    def _norm_shares(self, name: str) -> dict[str, list[int]]:
        """Count the live latents of an SAE of several sites by each site's share in their decoder rows."""
        sae = self.reconstruction.saes[name]
        shares_FL = norm_shares(sae)
        if shares_FL is None:
            return {}
        live = self.reconstruction.live(name, self.dead_share)
        shares = zip(sae.config.outputs, shares_FL.cpu().numpy()[live].T, strict=True)
        return {part.site: np.histogram(own, N_BINS, (0, 1))[0].tolist() for part, own in shares}

    def _cuts(self, name: str) -> list[dict[str, Any]]:
        """List the SAEs within one, with their figures; none of one that was not measured."""
        cuts = self.reconstruction.cuts.get(name, {})
        return [
            {
                "name": cut_name,
                "num_latents": cut.config.num_latents,
                "k": cut.config.k,
                "metrics": self.reconstruction.cut_metrics(name, cut_name, self._split.all),
            }
            for cut_name, cut in cuts.items()
        ] + [self._at(name, part) for part in self.reconstruction.parts.get(name, ())]

    def _at(self, name: str, part: str) -> dict[str, Any]:
        """Describe an SAE of several sites at one of them: what it leaves there, and what that costs the
        model."""
        config, split = self.reconstruction.saes[name].config, self._split.all
        metrics = self.reconstruction.part_metrics(name, part, split)
        metrics["l0"] = split.figure(self.reconstruction.ratios(name)["l0"])
        if isinstance(self.splicing, Splicing):
            metrics |= self.splicing.part_metrics(name, part, self._model_split.all)
        else:
            metrics["delta_ce"] = absent(self.splicing)
        if reason := self.reconstruction.unusable(name):
            metrics = dict.fromkeys(metrics, absent(reason))
        return {"name": f"at {part}", "num_latents": config.num_latents, "k": config.k, "metrics": metrics}

    @property
    def _noun(self) -> str:
        return self.reconstruction.evalset.text.document

    @property
    def _unseen(self) -> str | None:
        """Say why latents that fire may look dead, if they may."""
        n, unit = self.reconstruction.n_tokens, self.reconstruction.evalset.text.unit
        if not 0 < n * self.dead_share < 1:
            return None
        least = math.ceil(1 / self.dead_share)
        rare = f"a latent that fires on {self.dead_share:.2%} of the {unit}s"
        return f"{rare} is seen on {least:,} or more, not {n:,}"

    @cached_property
    def found_in_seeds(self) -> dict[str, NDArray[np.int64]]:
        """Count for each latent the SAEs of other seeds in which it is found, [F], of SAEs that have some."""
        saes = self.reconstruction.saes
        twins = {name: siblings(name, saes) for name in saes if not self.reconstruction.unusable(name)}
        several = [name for name, others in twins.items() if others]
        return for_each(
            several,
            lambda name: found_in(saes[name], twins[name].values()),
            self.reconstruction.evalset.everyone,
        )

    @cached_property
    def _by_source(self) -> BySource:
        return BySource(self.reconstruction, self.splicing, self._noun)

    @cached_property
    def _reader(self) -> Reader | PassageReader:
        return reader_of(self.reconstruction.evalset.text)

    @cached_property
    def _split(self) -> Split:
        return Split(self.reconstruction.sums.documents, self._noun)

    @cached_property
    def _model_split(self) -> Split:
        return Split([] if isinstance(self.splicing, str) else self.splicing.sums.documents, self._noun)

    def _metrics(self, name: str) -> dict[str, Figure]:
        metrics = self.reconstruction.metrics(name, self._split.all)
        metrics |= latent_figures(self.reconstruction, name, self.dead_share)
        if isinstance(self.splicing, str):
            metrics |= absent_metrics(self.splicing)
        else:
            metrics |= self.splicing.metrics(name, self._model_split.all)
        if reason := self.reconstruction.unusable(name):
            return dict.fromkeys(metrics, absent(reason))
        return metrics

    @property
    def _losses(self) -> Splicing | None:
        """Return the losses, if there are any that mean something."""
        return None if isinstance(self.splicing, str) or self.splicing.no_loss else self.splicing

    def _cost(self, name: str) -> Ratio | str:
        """Compute ΔCE of one SAE, or say why it has none."""
        if isinstance(self.splicing, str):
            return self.splicing
        return self.splicing.no_loss or self.splicing.ratios(name)["delta_ce"]

    def _loss(self, name: str) -> float:
        """Compute what the best variant is chosen by: ΔCE, or FVU where there are no losses."""
        if self.reconstruction.unusable(name):
            return math.inf
        if self._losses:
            return self._model_split.loss(self._losses.ratios(name)["delta_ce"])
        return self._split.loss(self.reconstruction.ratios(name)["fvu"])

    def _versus(self, name: str, best: str) -> dict[str, Figure]:
        """Compute differences to the best variant, value minus the best's, over the same documents: those
        that had no part in choosing it."""
        fvu = self.reconstruction.ratios(name)["fvu"]
        difference = fvu.above - self.reconstruction.sums.column(f"{best}/sse")
        differences = {"fvu": self._split.reported_on.figure(replace(fvu, above=difference))}
        if self._losses:
            cost = self._losses.ratios(name)["delta_ce"]
            ratio = replace(cost, above=cost.above - self._losses.ratios(best)["delta_ce"].above)
            differences["delta_ce"] = self._model_split.reported_on.figure(ratio)
        for variant in (name, best):
            if reason := self.reconstruction.unusable(variant):
                differences = dict.fromkeys(differences, absent(reason))
        for figure in differences.values():
            if figure.get("lo") is not None:
                figure["distinguishable"] = not figure["lo"] <= 0 <= figure["hi"]
        return differences


@dataclass(frozen=True, slots=True)
class Beside:
    """The baselines that SAEs are compared with."""

    measured: dict[str, Measured]
    """Name of a baseline → figures, its own among them."""
    of: dict[str, dict[str, str]]
    """Name of an SAE, or of one of these → kind → name."""

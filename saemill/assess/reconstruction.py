"""How well each SAE reconstructs held-out activations, or predicts them, and how its latents fire."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saemill.assess.dense import Drivers, drivers_of
from saemill.assess.errors import errors
from saemill.assess.evalset import Chunk, EvalSet
from saemill.assess.profile import Profile
from saemill.assess.scratch import Scratch
from saemill.assess.spread import Spread
from saemill.assess.sums import Bootstrap, DocumentSums, Figure, Ratio, absent
from saemill.common.log import counted
from saemill.common.sae import layers
from saemill.common.sae.sae import Encoded, Sae
from saemill.common.stores.site_names import is_joined
from saemill.common.stores.statistics import FAR, Statistics, unheld

PER_VARIANT = ("sse", "sse_far", "cosine", "norm_ratio", "l0", "not_finite")
PER_CUT = ("sse", "l0")
PER_SITE = ("squares", "squares_near", "squares_far", "n_far", "n_not_zero")
FAR_METRICS = ("fvu_without_far", "far_error_share", "far_variance_share")
ROWS_AT_ONCE = 2048


@dataclass(slots=True)
class Firing:
    """How the latents of one SAE fired."""

    count_F: Tensor
    """int64, tokens on which the latent was active."""
    sum_F: Tensor
    """float64, sum of its activations."""
    min_F: Tensor
    """float32, its smallest activation; 0 where none is below 0."""
    max_F: Tensor
    """float32, its largest activation; 0 where none is above 0."""
    drivers: Drivers
    """What its activation follows."""

    @classmethod
    def none(cls, n_latents: int) -> "Firing":
        """Begin with no token."""
        count_F = torch.zeros(n_latents, dtype=torch.int64)
        return cls(count_F, count_F.double(), count_F.float(), count_F.float(), Drivers(n_latents))

    def add(self, codes: Encoded, drivers_TC: Tensor) -> None:
        """Count some tokens.

        Args:
            codes: their active latents.
            drivers_TC: float64, on the CPU.
        """
        from saemill.assess.loops.counts import count  # numba is loaded where it is used

        acts_TK, latents_TK = codes.top_acts.cpu().float().contiguous(), codes.top_indices.cpu().contiguous()
        sums = (self.count_F, self.sum_F, self.drivers.squares_F, self.drivers.products_FC)
        count(acts_TK, latents_TK, drivers_TC.contiguous(), *sums, self.min_F, self.max_F)
        self.drivers.add(drivers_TC)


class Reconstruction:
    """Some SAEs, all together, on the activations of the evaluation tokens.

    Args:
        saes: variant name → SAE, in the activations' own units.
        sites: variant name → site that is reconstructed or predicted.
        evalset: where the tokens come from.
        known: a reconstruction of the same tokens that covers these sites. Its sums over the activations
            themselves are used again.
    """

    def __init__(
        self,
        saes: dict[str, Sae],
        sites: dict[str, str],
        evalset: EvalSet,
        known: "Reconstruction | None" = None,
    ) -> None:
        self.saes, self.sites, self.evalset, self.known = saes, sites, evalset, known
        self.cuts = {name: sae.cuts for name, sae in saes.items()}
        self.parts = {name: tuple(part.site for part in sae.config.outputs) for name, sae in saes.items()}
        """Variant name → the sites that a crosscoder joins, or a cross-layer transcoder predicts."""
        own = [] if known else self._own_columns()
        self.sums = DocumentSums(own + self._columns(saes))
        self.firing = {name: Firing.none(sae.config.num_latents) for name, sae in saes.items()}
        self.spread: dict[str, Spread] = (
            known.spread if known else {site: Spread(self._statistics(site)) for site in evalset.sites}
        )
        self.n_tokens: int = known.n_tokens if known else 0
        self.profile = Profile(sites, evalset)
        self._scratch = Scratch()

    def _statistics(self, site: str) -> Statistics:
        """Return a site's statistics, of joined ones in the units of each."""
        statistics, units_D = self.evalset.arrays[site].statistics, self.evalset.factors.get(site)
        if units_D is None:
            return statistics
        return replace(
            statistics,
            mean_D=statistics.mean_D * units_D,
            variance_D=statistics.variance_D * units_D.square(),
        )

    def _own_columns(self) -> list[str]:
        """Name the sums that are of the activations, whichever SAE reconstructs them."""
        return ["n", *(f"{site}/{what}" for site in self.evalset.sites for what in PER_SITE)]

    def _columns(self, saes: Mapping[str, Sae]) -> list[str]:
        """Name the sums that are of some SAEs."""
        columns = []
        for name, sae in saes.items():
            columns += [f"{name}/{what}" for what in PER_VARIANT]
            columns += [f"{name}/sse_skip"] if sae.W_skip is not None else []
            columns += [f"{name}/{cut}/{what}" for cut in sae.cuts for what in PER_CUT]
            columns += [f"{name}/at {part}/sse" for part in self.parts[name]]
        return columns

    def run(self, chunks: Iterable[Chunk]) -> "Reconstruction":
        """Count this process's chunks, then add up what all processes counted."""
        with torch.inference_mode():
            for chunk in chunks:
                units = self.evalset.units(chunk.addresses_T)
                columns, far = self._activations(chunk, units)
                squares = {site: self._squares(site, chunk.x[site]) for site in self.profile.lengths}
                position_T = chunk.addresses_T % self.evalset.text.ctx_len
                drivers = {site: drivers_of(position_T, squares_T) for site, squares_T in squares.items()}
                for name, sae in self.saes.items():
                    site = self.sites[name]
                    x_TD = chunk.x[str(sae.site) if sae.is_transcoder else site]
                    columns |= self._variant(name, sae, x_TD, chunk.x[site], far[site], drivers[site])
                self.sums.add(units, columns)
                self.profile.add(chunk, units, columns, squares)
        self._merge()
        return self

    def only(self, names: Iterable[str]) -> "Reconstruction":
        """Keep the figures of some of the SAEs."""
        some = copy(self)
        some.saes = {name: self.saes[name] for name in names}
        some.sites = {name: self.sites[name] for name in some.saes}
        some.firing = {name: self.firing[name] for name in some.saes}
        some.cuts = {name: self.cuts[name] for name in some.saes}
        some.parts = {name: self.parts[name] for name in some.saes}
        some.sums = self.sums.only(self._own_columns() + self._columns(some.saes))
        return some

    def _activations(
        self, chunk: Chunk, units: NDArray[Any]
    ) -> tuple[dict[str, Any], dict[str, NDArray[np.bool_]]]:
        """Compute values per token of the activations themselves, and which of each site's are far."""
        if self.known:
            squares = {site: self._squares(site, x_TD) for site, x_TD in chunk.x.items()}
            return {}, {site: self.spread[site].far(squares_T) for site, squares_T in squares.items()}
        self.n_tokens += len(units)
        columns: dict[str, Any] = {"n": np.ones(len(units))}
        for site, x_TD in chunk.x.items():
            columns[f"{site}/n_not_zero"] = (x_TD != 0).any(1).numpy()
        return columns, {
            site: self.spread[site].add(self._scaled(site, x_TD), units) for site, x_TD in chunk.x.items()
        }

    def _squares(self, site: str, x_TD: Tensor) -> NDArray[np.float64]:
        """Compute the squared distances of a site's rows from the cached mean, of joined sites in the units
        of each. [T]"""
        return self.spread[site].squared_distances(self._scaled(site, x_TD))

    def _scaled(self, site: str, x_TD: Tensor) -> Tensor:
        """Bring the rows of joined sites to the units of each, float64; those of one site are left alone."""
        units_D = self.evalset.factors.get(site)
        return x_TD if units_D is None else x_TD.double() * units_D.to(x_TD.device)

    def _merge(self) -> None:
        everyone = self.evalset.everyone
        if self.known is None:
            self.n_tokens = sum(everyone.all_gather_objects(self.n_tokens))
            for site, spread in self.spread.items():
                self._add_spread(site, spread)
        self.sums.merge(everyone)
        self.profile.merge()
        if self.known is not None:
            self.sums = self.known.sums.only(self._own_columns()).concat(self.sums)
        for firing in self.firing.values():
            for sums in (firing.count_F, firing.sum_F, *firing.drivers.sums):
                everyone.all_reduce(sums)
            firing.min_F = torch.stack(everyone.all_gather_objects(firing.min_F)).amin(0)
            firing.max_F = torch.stack(everyone.all_gather_objects(firing.max_F)).amax(0)

    def _add_spread(self, site: str, spread: Spread) -> None:
        """Add how this process's rows of a site lie around the mean of all processes' rows."""
        everyone, near, far = self.evalset.everyone, (False,), (True,)
        spread.merge(everyone)
        for what, (documents, sums) in {
            "squares": spread.squares(everyone, near + far, near + far),
            "squares_near": spread.squares(everyone, near, near),
            "squares_far": spread.squares(everyone, far, near + far),
            "n_far": spread.n_far(),
        }.items():
            self.sums.add(documents, {f"{site}/{what}": sums})

    def _variant(
        self,
        name: str,
        sae: Sae,
        read_TD: Tensor,
        x_TD: Tensor,
        far_T: NDArray[np.bool_],
        drivers_TC: Tensor,
    ) -> dict[str, Any]:
        """Compute values per token. Rows go through the SAE in float32; what is squared or divided is
        float64, which holds the square of any float32 without overflow or underflow."""
        columns: dict[str, list[Tensor]] = defaultdict(list)
        device = sae.W_enc.device
        every = (read_TD, x_TD, torch.from_numpy(far_T), drivers_TC)
        pieces = (torch.split(rows, ROWS_AT_ONCE) for rows in every)
        for some_read_TD, some_TD, some_far_T, some_drivers_TC in zip(*pieces, strict=True):
            read = some_read_TD.to(device, torch.float32)
            pre_TF = self._scratch.pre_acts(sae, read)
            codes = sae.select(pre_TF)
            x, r = some_TD.to(device, torch.float32), sae.decode(*codes, read).float()
            bad = ~torch.isfinite(r).all(1)
            r[bad] = 0
            for what, values in self._at_parts(name, x, r).items():
                columns[what].append(values)
            x = self._scaled(self.sites[name], x)
            sse, xx, rr, xr = errors(x, self._scaled(self.sites[name], r))
            columns["sse"].append(sse)
            columns["sse_far"].append(torch.where(some_far_T.to(device), sse, 0.0))
            columns["cosine"].append(_quotient(xr, xx.sqrt() * rr.sqrt()))
            columns["norm_ratio"].append(_quotient(rr.sqrt(), xx.sqrt()))
            columns["not_finite"].append(bad)
            columns["l0"].append(codes.active.sum(1))
            self.firing[name].add(codes, some_drivers_TC)
            if sae.W_skip is not None:
                columns["sse_skip"].append(self._left_by_skip(sae, some_read_TD, some_TD))
            for cut_name, cut in self.cuts[name].items():
                cut_codes = cut.select(pre_TF[:, : cut.config.num_latents])
                cut_r = self._scaled(self.sites[name], cut.decode(*cut_codes, read).float())
                columns[f"{cut_name}/sse"].append(errors(x, cut_r).error_T)
                columns[f"{cut_name}/l0"].append(cut_codes.active.sum(1))
        return {f"{name}/{what}": torch.cat(values).cpu().numpy() for what, values in columns.items()}

    def _at_parts(self, name: str, x_TD: Tensor, r_TD: Tensor) -> dict[str, Tensor]:
        """Compute the squared errors at each of several sites. float64 [T] each."""
        parts = self.parts[name]
        if not parts:
            return {}
        widths = [self.evalset.store.site(part).width for part in parts]
        pairs = zip(torch.split(x_TD, widths, 1), torch.split(r_TD, widths, 1), strict=True)
        return {f"at {part}/sse": errors(x, r).error_T for part, (x, r) in zip(parts, pairs, strict=True)}

    def _left_by_skip(self, sae: Sae, read_TD: Tensor, y_TD: Tensor) -> Tensor:
        """Compute the squared error of W_skip alone, around the cached means. float64 [T]."""
        assert sae.W_skip is not None
        means = (self.evalset.arrays[str(site)].statistics.mean_D for site in (sae.site, sae.target_site))
        rows = (some.to(sae.W_skip.device, torch.float64) for some in (read_TD, y_TD))
        centred, y = (some_TD - mean_D.to(some_TD) for some_TD, mean_D in zip(rows, means, strict=True))
        left_TE = y - layers.skipped(centred, sae.W_skip.double(), sae.config.n_layers)
        return self._scaled(str(sae.target_site), left_TE).square().sum(1)

    def unusable(self, name: str) -> str | None:
        """Say why a variant has no figures at all: its reconstructions are not all finite."""
        n_bad = int(self.sums.column(f"{name}/not_finite").sum())
        unit = self.evalset.text.unit
        return f"x̂ is not finite on {n_bad:,} of {counted(self.n_tokens, unit)}" if n_bad else None

    def ratios(self, name: str) -> dict[str, Ratio]:
        """Compute fvu, mse, cosine, norm ratio and L0 of one variant, and the share of far rows in fvu.

        fvu = Σ‖x − x̂‖² / Σ‖x − x̄‖²; mse is per dimension. Zero vectors have no direction: cosine and norm
        ratio are means over the others; where x̂ alone is zero both count as 0. Of a skip transcoder
        fvu_skip is what its linear map alone leaves.
        """
        site, unit = self.sites[name], self.evalset.text.unit
        n, alike = self.sums.column("n"), self._alike
        sse, sse_far, cosine, norm_ratio, l0, _ = (self.sums.column(f"{name}/{what}") for what in PER_VARIANT)
        squares, squares_near, squares_far, _, n_not_zero = (
            self.sums.column(f"{site}/{what}") for what in PER_SITE
        )
        zeros, sae = f"every {unit} is a zero vector", self.saes[name]
        skip = {}
        if sae.W_skip is not None:
            skip = {"fvu_skip": Ratio(self.sums.column(f"{name}/sse_skip"), squares, alike)}
        return skip | {
            "fvu": Ratio(sse, squares, alike),
            "mse": Ratio(sse, n * len(sae.b_dec)),
            "cosine": Ratio(cosine, n_not_zero, zeros),
            "norm_ratio": Ratio(norm_ratio, n_not_zero, zeros),
            "l0": Ratio(l0, n),
            "fvu_without_far": Ratio(sse - sse_far, squares_near, alike),
            "far_error_share": Ratio(sse_far, sse, "there is no error"),
            "far_variance_share": Ratio(squares_far, squares, alike),
        }

    @property
    def _alike(self) -> str:
        """Say why there is no FVU where there is none."""
        unit = self.evalset.text.unit
        if self.n_tokens > 1:
            return f"the {unit}s are all alike: there is no variance to explain"
        return f"one {unit} has no variance to explain"

    def cut_metrics(self, name: str, cut: str, bootstrap: Bootstrap) -> dict[str, Figure]:
        """Compute fvu and L0 of an SAE within a variant as figures."""
        sse, l0 = (self.sums.column(f"{name}/{cut}/{what}") for what in PER_CUT)
        squares, n = self.sums.column(f"{self.sites[name]}/squares"), self.sums.column("n")
        return bootstrap.figures({"fvu": Ratio(sse, squares, self._alike), "l0": Ratio(l0, n)})

    def part_metrics(self, name: str, part: str, bootstrap: Bootstrap) -> dict[str, Figure]:
        """Compute fvu at one of several sites as a figure."""
        sse, squares = self.sums.column(f"{name}/at {part}/sse"), self.sums.column(f"{part}/squares")
        return bootstrap.figures({"fvu": Ratio(sse, squares, self._alike)})

    def metrics(self, name: str, bootstrap: Bootstrap) -> dict[str, Figure]:
        """Compute the `ratios` of one variant as figures, and its explained variance."""
        ratios = self.ratios(name)
        figures = bootstrap.figures(ratios)
        if not self.n_far(self.sites[name]):
            why = f"no {self.evalset.text.unit} is more than {FAR:g} times as far from the mean as the median"
            figures |= dict.fromkeys(FAR_METRICS, absent(why))
        figures["explained_variance"] = complement(figures["fvu"])
        if is_joined(self.sites[name]):
            figures["mse"] = absent("sites that are joined have units of their own")
            figures |= dict.fromkeys(FAR_METRICS, absent("which rows are far is told for each site"))
        if reason := self.unusable(name):
            return dict.fromkeys(figures, absent(reason))
        return figures

    def n_far(self, site: str) -> int:
        """Count rows that are more than `FAR` times as far from the cached mean as the median training
        row."""
        return int(self.sums.column(f"{site}/n_far").sum())

    def place(self, site: str) -> dict[str, Any]:
        """Summarise a site's rows for `final_assessment.json`."""
        array, spread = self.evalset.arrays[site], self.spread[site]
        return {
            "n_zero": spread.n_zero,
            "n_far": self.n_far(site),
            "largest_ratio": spread.largest / spread.median if spread.median else None,
            "unheld": unheld(array.statistics, array.dtype),
        }

    def mean_l0s(self) -> dict[str, float]:
        """Compute the mean number of active latents of each SAE."""
        return {
            name: float(self.sums.column(f"{name}/l0").sum()) / max(1, self.n_tokens) for name in self.saes
        }

    def density(self, name: str) -> NDArray[np.float64]:
        """Compute the share of tokens on which each latent was active. [F]."""
        return self.firing[name].count_F.numpy() / max(1, self.n_tokens)

    def correlations(self, name: str) -> NDArray[np.float64]:
        """Compute how each latent's activation correlates with the drivers of dense latents. [F, C]"""
        firing = self.firing[name]
        return firing.drivers.correlations(self.n_tokens, firing.sum_F)

    def live(self, name: str, least_share: float) -> NDArray[np.bool_]:
        """Tell which latents fired, and on at least that share of the tokens. bool [F]."""
        return self.density(name) >= max(least_share, 1 / max(1, self.n_tokens))


def _quotient(above_T: Tensor, below_T: Tensor) -> Tensor:
    """Divide, with 0 where the divisor is 0."""
    return torch.where(below_T > 0, above_T / below_T, 0.0)


def complement(figure: Figure) -> Figure:
    """Compute 1 − figure; the interval is turned over."""
    turned = {key: 1 - value for key, value in figure.items() if key != "reason" and value is not None}
    if "lo" in turned:
        turned["lo"], turned["hi"] = turned["hi"], turned["lo"]
    return figure | turned

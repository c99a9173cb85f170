"""How well each SAE reconstructs held-out activations, and how its latents fire."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saemill.assess.evalset import Chunk, EvalSet
from saemill.assess.sums import Bootstrap, DocumentSums, Figure, Ratio, absent
from saemill.common.log import counted
from saemill.common.sae import Sae

PER_VARIANT = ("sse", "cosine", "norm_ratio", "l0")
ROWS_AT_ONCE = 2048


@dataclass(slots=True)
class Firing:
    """How the latents of one SAE fired."""

    count_F: Tensor
    """int64, tokens on which the latent was active."""
    sum_F: Tensor
    """float64, sum of its activations."""
    max_F: Tensor
    """float32, its largest activation."""


class Reconstruction:
    """One streaming pass over the evaluation tokens, all SAEs together.

    Args:
        saes: variant name → SAE, in the activations' own units.
        sites: variant name → site.
        evalset: where the tokens come from.
    """

    def __init__(self, saes: dict[str, Sae], sites: dict[str, str], evalset: EvalSet) -> None:
        self.saes, self.sites, self.evalset = saes, sites, evalset
        columns = [f"{name}/{what}" for name in saes for what in PER_VARIANT]
        shared = [f"{site}/squares" for site in evalset.sites]
        self.sums = DocumentSums(["n", *shared, *columns])
        self.firing = {
            name: Firing(
                torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.float64), torch.zeros(n)
            )
            for name, n in ((name, sae.config.num_latents) for name, sae in saes.items())
        }
        self.centre = {site: array.statistics.mean_D for site, array in evalset.arrays.items()}
        self.first: dict[str, dict[int, NDArray[np.float64]]] = {site: {} for site in evalset.sites}
        self.n_tokens = 0

    def run(self, chunks: Iterable[Chunk]) -> "Reconstruction":
        """Count this process's chunks, then add up what all processes counted."""
        with torch.inference_mode():
            for chunk in chunks:
                units = self.evalset.units(chunk.addresses_T)
                self.n_tokens += len(units)
                columns: dict[str, Any] = {"n": np.ones(len(units))}
                for site, x_TD in chunk.x.items():
                    columns[f"{site}/squares"] = self._deviations(site, x_TD, units)
                for name, sae in self.saes.items():
                    columns |= self._variant(name, sae, chunk.x[self.sites[name]])
                self.sums.add(units, columns)
        self._merge()
        return self

    def _merge(self) -> None:
        everyone = self.evalset.everyone
        self.n_tokens = sum(everyone.share(self.n_tokens))
        for site, first in self.first.items():
            self._centre(site, first)
        self.sums.merge(everyone)
        for firing in self.firing.values():
            everyone.sum_(firing.count_F)
            everyone.sum_(firing.sum_F)
            firing.max_F = torch.stack(everyone.share(firing.max_F)).amax(0)

    def _centre(self, site: str, first: dict[int, NDArray[np.float64]]) -> None:
        """Move the squared distances per document from the cached mean to the evaluation set's own:
        Σ‖x − x̄‖² = Σ‖x − c‖² − 2 s·Σ(x − c) + n ‖s‖², s = x̄ − c."""
        total_D = torch.from_numpy(sum(first.values(), np.zeros(len(self.centre[site]))))
        shift_D = self.evalset.everyone.sum_(total_D).numpy() / max(1, self.n_tokens)
        n = dict(zip(sorted(self.sums.rows), self.sums.column("n"), strict=True))
        moved = [n[document] * (shift_D @ shift_D) - 2 * row @ shift_D for document, row in first.items()]
        self.sums.add(np.array(list(first), np.uint64), {f"{site}/squares": moved})

    def _deviations(self, site: str, x_TD: Tensor, units: NDArray[Any]) -> NDArray[np.float64]:
        """Squared distances from the cached mean; `_centre` moves their sums at the end."""
        centred = x_TD.double() - self.centre[site]
        documents, group = np.unique(units, return_inverse=True)
        first = torch.zeros(len(documents), centred.shape[1], dtype=torch.float64)
        first.index_add_(0, torch.from_numpy(group), centred)
        for document, row in zip(documents.tolist(), first.numpy(), strict=True):
            known = self.first[site].get(document)
            self.first[site][document] = row.copy() if known is None else known + row
        return centred.square().sum(1).numpy()

    def _variant(self, name: str, sae: Sae, x_TD: Tensor) -> dict[str, Any]:
        parts: dict[str, list[Tensor]] = {what: [] for what in PER_VARIANT}
        firing = self.firing[name]
        device = sae.W_enc.device
        for part in torch.split(x_TD, ROWS_AT_ONCE):
            x = part.to(device, torch.float32)
            output = sae(x)
            error = output.reconstruction - x
            x_norm, r_norm = (torch.linalg.vector_norm(y, dim=1) for y in (x, output.reconstruction))
            parts["sse"].append(error.double().square().sum(1))
            parts["cosine"].append((x * output.reconstruction).sum(1) / (x_norm * r_norm).clamp(min=1e-12))
            parts["norm_ratio"].append(r_norm / x_norm.clamp(min=1e-12))
            active = output.top_acts > 0
            parts["l0"].append(active.sum(1))
            latents, acts = output.top_indices[active].cpu(), output.top_acts[active].cpu()
            firing.count_F += torch.bincount(latents, minlength=len(firing.count_F))
            firing.sum_F.index_add_(0, latents, acts.double())
            firing.max_F.scatter_reduce_(0, latents, acts, "amax")
        return {f"{name}/{what}": torch.cat(values).cpu().numpy() for what, values in parts.items()}

    def squares(self, site: str) -> NDArray[np.float64]:
        """Σ ‖x − x̄‖² per document, x̄ the mean over the whole evaluation set. [n_documents]."""
        return self.sums.column(f"{site}/squares")

    def ratios(self, name: str) -> dict[str, Ratio]:
        """fvu, mse, cosine, norm ratio and L0 of one variant.

        fvu = Σ‖x − x̂‖² / Σ‖x − x̄‖²; mse is per dimension.
        """
        n = self.sums.column("n")
        column = {what: self.sums.column(f"{name}/{what}") for what in PER_VARIANT}
        return {
            "fvu": (column["sse"], self.squares(self.sites[name])),
            "mse": (column["sse"], n * self.saes[name].config.d_in),
            "cosine": (column["cosine"], n),
            "norm_ratio": (column["norm_ratio"], n),
            "l0": (column["l0"], n),
        }

    def metrics(self, name: str, bootstrap: Bootstrap) -> dict[str, Figure]:
        """The `ratios` of one variant as figures, and its explained variance."""
        figures = bootstrap.figures(self.ratios(name))
        return figures | {"explained_variance": complement(figures["fvu"])}

    def density(self, name: str) -> NDArray[np.float64]:
        """Share of tokens on which each latent was active. [F]."""
        return self.firing[name].count_F.numpy() / max(1, self.n_tokens)

    def live(self, name: str, least_share: float) -> NDArray[np.bool_]:
        """Which latents fired, and on at least that share of the tokens. [F]."""
        return self.density(name) >= max(least_share, 1 / max(1, self.n_tokens))


def complement(figure: Figure) -> Figure:
    """1 − figure, the interval turned over."""
    turned = {key: 1 - value for key, value in figure.items() if key != "reason" and value is not None}
    if "lo" in turned:
        turned["lo"], turned["hi"] = turned["hi"], turned["lo"]
    return figure | turned


def absorption(rows_FD: Tensor) -> Figure:
    """Mean over decoder rows of the largest cosine to another row; lower is better.

    Args:
        rows_FD: decoder rows of the live latents.
    """
    if len(rows_FD) < 2:
        return absent(f"{counted(len(rows_FD), 'live latent')}: a cosine needs two")
    unit = torch.nn.functional.normalize(rows_FD, dim=1)
    largest = []
    for start in range(0, len(unit), 1024):
        cosine = unit[start : start + 1024] @ unit.T
        cosine.diagonal(start).fill_(-1)
        largest.append(cosine.amax(1))
    return {"value": float(torch.cat(largest).mean())}


def random_absorption(rows_FD: Tensor) -> Figure:
    """What `absorption` reads on as many random directions: no dictionary can tell less."""
    generator = torch.Generator().manual_seed(0)
    return absorption(torch.randn(rows_FD.shape, generator=generator).to(rows_FD.device))

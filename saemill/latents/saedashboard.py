"""Batches of SAEDashboard's Neuronpedia runner (0.8.0), which convert to Neuronpedia: `batch-<n>.json`, with
128 latents each.

Fields are what their readers take them for; docs/latents.md says where the figures are others than
SAEDashboard's own. `*_l1` of the correlations hold cosines there, and so here.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saemill.common import durable
from saemill.common.log import progress
from saemill.common.models.unembedding import Unembedding
from saemill.common.sae.sae import Sae
from saemill.latents.codes import Codes
from saemill.latents.firing import Firing, Group, bars
from saemill.latents.rows import Entries, Rows, entries
from saemill.latents.together import Correlations, Partners, Together
from saemill.latents.vocabulary import Vocabulary

BATCH = 128
"""Latents per file."""
N_LOGITS = 10
N_NEURONS = 3
DECIMALS = 3
"""Decimals of numbers, as SAEDashboard's; more where the largest of them is below 1."""


@dataclass(frozen=True, slots=True)
class Place:
    """What the batches say of an SAE as a whole: names of the model, of the set of SAEs and of this one, its
    layer, and the text."""

    model_id: str
    layer: int
    sae_set: str
    sae_id_suffix: str
    dataset: str

    def batch(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Make the content of a file."""
        return {
            "model_id": self.model_id,
            "layer": self.layer,
            "sae_set": self.sae_set,
            "sae_id_suffix": self.sae_id_suffix,
            "features": features,
        }


@dataclass(frozen=True, slots=True)
class Shown:
    """Whatever the latents of one SAE are shown with."""

    sae: Sae
    rows: Rows
    place: Place
    vocabulary: Vocabulary
    unembedding: Unembedding | None
    """None where its decoder does not write to the residual stream of a model with one."""


def write(shown: Shown, latents: NDArray[np.int64], folder: Path) -> None:
    """Write the batches of one SAE.

    Args:
        shown: the SAE, its tokens and what they are shown with.
        latents: those to write, ascending.
        folder: where the files go.

    Raises:
        DiskError: the disk is full.
    """
    sae, rows = shown.sae, shown.rows
    codes = Codes(folder / ".codes", latents, latents[::BATCH])
    together = Together(sae.config.num_latents, sae.config.d_in, latents)
    n_tokens = 0
    for chunk, some in entries(sae, rows, f"encode {sae.site}"):
        codes.add(some)
        together.add(chunk, some)
        n_tokens += len(chunk.places_T)
    correlations = together.finish()
    with progress(f"write {sae.site}", len(latents), "latents") as advance:
        for part in range(len(codes.firsts)):
            start, stop = part * BATCH, min((part + 1) * BATCH, len(latents))
            fired = _by_latent(codes.take(part), latents[start:stop], rows.ctx, n_tokens)
            features = _features(shown, list(fired), correlations, start, stop)
            content = json.dumps(shown.place.batch(features), allow_nan=False, ensure_ascii=False)
            durable.write_bytes(folder / f"batch-{part}.json", [content.encode("utf-8", "surrogatepass")])
            advance(stop - start)
    codes.folder.rmdir()


def _by_latent(codes: Entries, latents: NDArray[np.int64], ctx: int, n_tokens: int) -> Iterator[Firing]:
    """Divide codes by latent."""
    order = np.argsort(codes.latent_N, kind="stable")
    latent_N, place_N, act_N = codes.latent_N[order], codes.place_N[order], codes.act_N[order]
    starts, stops = np.searchsorted(latent_N, latents), np.searchsorted(latent_N, latents, side="right")
    for latent, start, stop in zip(latents, starts, stops, strict=True):
        yield Firing(int(latent), place_N[start:stop], act_N[start:stop].astype(np.float64), ctx, n_tokens)


def _features(
    shown: Shown, fired: list[Firing], correlations: Correlations, start: int, stop: int
) -> list[dict[str, Any]]:
    """Describe the latents of one file, of the places start..stop in the list."""
    numbers = torch.tensor([firing.latent for firing in fired])
    rows_LE = shown.sae.W_dec.detach().cpu()[numbers].float()
    logits_LV = None if shown.unembedding is None else shown.unembedding.logits(rows_LE)
    inputs, others = correlations.of_inputs(start, stop), correlations.of_latents(start, stop)
    features = []
    for at, firing in enumerate(fired):
        feature: dict[str, Any] = {"feature_index": firing.latent}
        feature |= _alignment(rows_LE[at])
        feature |= _partners("correlated_neurons", inputs[at]) | _partners("correlated_features", others[at])
        feature |= _logits(None if logits_LV is None else logits_LV[at], shown.vocabulary)
        feature |= _histogram(firing)
        feature |= {
            "n_prompts_total": shown.rows.n_rows,
            "n_tokens_in_prompt": shown.rows.ctx,
            "dataset": shown.place.dataset,
            "decoder_weights_dist": [],
            "activations": _activations(firing, shown.rows, shown.vocabulary),
            "vector": [],
        }
        features.append(feature)
    return features


def _alignment(row_E: Tensor) -> dict[str, Any]:
    """Name the dimensions in which a latent's decoder row is largest."""
    values, indices = row_E.topk(min(N_NEURONS, len(row_E)))
    length = float(row_E.abs().sum())
    shares = [abs(value) / length if length else 0.0 for value in values.tolist()]
    return {
        "neuron_alignment_indices": indices.tolist(),
        "neuron_alignment_values": _rounded(values.tolist()),
        "neuron_alignment_l1": _rounded(shares),
    }


def _partners(name: str, partners: Partners) -> dict[str, Any]:
    """Name what goes with a latent; `_l1` holds cosines in SAEDashboard's files."""
    return {
        f"{name}_indices": partners.numbers,
        f"{name}_l1": _rounded(partners.cosine),
        f"{name}_pearson": _rounded(partners.pearson),
    }


def _logits(logits_V: Tensor | None, vocabulary: Vocabulary) -> dict[str, Any]:
    """Name the tokens that a latent makes more and less probable; nothing where that is not known."""
    content: dict[str, Any] = {}
    for sign in ("neg", "pos"):
        values, ids = [], np.zeros(0, np.int64)
        if logits_V is not None:
            top = logits_V.topk(min(N_LOGITS, len(logits_V)), largest=sign == "pos")
            values, ids = top.values.tolist(), top.indices.numpy()
        content |= {f"{sign}_str": vocabulary.texts_of(ids), f"{sign}_values": _rounded(values)}
    middles, heights = bars(np.zeros(0) if logits_V is None else logits_V.numpy())
    return content | {
        "logits_hist_data_bar_heights": heights,
        "logits_hist_data_bar_values": _rounded(middles),
    }


def _histogram(firing: Firing) -> dict[str, Any]:
    """Count how often a latent is active, and how much."""
    middles, heights = bars(firing.act_N)
    return {
        "frac_nonzero": len(firing.act_N) / firing.n_tokens,
        "freq_hist_data_bar_values": _rounded(middles, firing.largest),
        "freq_hist_data_bar_heights": heights,
    }


def _activations(firing: Firing, rows: Rows, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Show rows in which a latent is active: the strongest, then samples of each interval."""
    if not len(firing.act_N):
        return []
    groups = [firing.strongest(), *firing.intervals()]
    return [_activation(firing, group, int(at), rows, vocabulary) for group in groups for at in group.chosen]


def _activation(firing: Firing, group: Group, at: int, rows: Rows, vocabulary: Vocabulary) -> dict[str, Any]:
    """Show the row of one activation."""
    row, position = divmod(int(firing.place_N[at]), rows.ctx)
    low, high = _rounded([group.low, group.high], firing.largest)
    return {
        "bin_min": low,
        "bin_max": high,
        "bin_contains": group.share,
        "tokens": vocabulary.texts_of(rows.ids(row, row + 1)[0]),
        "values": _rounded(firing.in_row(row).tolist(), firing.largest),
        "qualifying_token_index": position,
    }


def _rounded(values: list[float], largest: float | None = None) -> list[float]:
    """Round to decimals that tell values from 0, however small they are.

    Args:
        values: the values.
        largest: of those that they belong to; None for the largest of themselves.
    """
    if largest is None:
        largest = max(map(abs, values), default=0.0)
    decimals = DECIMALS + max(0, -math.floor(math.log10(largest))) if largest else DECIMALS
    return [round(value, decimals) for value in values]

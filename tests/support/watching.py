"""Figures on held-out text, from SAEs as they were saved on the way, by dense formulas."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saemill.common.sae.sae import Sae
from saemill.common.stores.activations import ActivationStore


def dense_codes(
    sae: Sae, x_TD: Tensor, n_latents: int | None = None, k: int | None = None, *, centred: bool = True
) -> Tensor:
    """Oracle: the codes of an SAE in full, [T, F], float64; of its first latents, or the k largest; perhaps
    without b_dec, as a transcoder has them."""
    w = {name: weights.double()[:n_latents] for name, weights in sae.parts.weights.items() if name != "b_dec"}
    x_TD = x_TD.double() - sae.b_dec.double() if centred else x_TD.double()
    pre_TF = x_TD @ w["W_enc"].T + w["b_enc"]
    if "threshold" in w:
        return torch.where(pre_TF > w["threshold"], pre_TF, 0.0)
    assert sae.config.k is not None
    kept = pre_TF.topk(min(k or sae.config.k, pre_TF.shape[1]), dim=1).indices
    return torch.relu(torch.zeros_like(pre_TF).scatter(1, kept, pre_TF.gather(1, kept)))


def dense_figures(sae: Sae, x_TD: Tensor, **part: int) -> tuple[float, float, float]:
    """Oracle: FVU against the tokens' own mean, L0, and the share of latents that never fire."""
    codes_TF = dense_codes(sae, x_TD, **part)
    x = x_TD.double()
    error = codes_TF @ sae.W_dec.double()[: codes_TF.shape[1]] + sae.b_dec.double() - x
    fired_F = (codes_TF > 0).any(0)
    return (
        float(error.square().sum() / (x - x.mean(0)).square().sum()),
        float((codes_TF > 0).sum(1).double().mean()),
        float(1 - fired_F.double().mean()),
    )


def held_out(store: ActivationStore, site: str, n_tokens: int) -> Tensor:
    """The first held-out tokens that are not masked, by the text alone."""
    ids = store.tokens.rows(0, store.tokens.n_rows)
    keep = store.mask.keep(ids, store.tokens.tokenizer.special_ids) & store.text.held_out_R[:, None]
    return store.read(site, 0, store.n_tokens)[torch.from_numpy(np.flatnonzero(keep))][:n_tokens]


def lines(out: Path) -> dict[int, dict[str, Any]]:
    """The lines of metrics.jsonl by step: the figures of each variant."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["variants"] for line in found}

"""Small SAEs, and what they make of the held-out rows of a store."""

from typing import Any

import numpy as np
import torch

from saemill.assess.evalset import EvalSet
from saemill.assess.reconstruction import Reconstruction
from saemill.assess.sums import Bootstrap, Split
from saemill.common.sae.parts import SaeConfig
from saemill.common.sae.sae import Sae
from saemill.common.stores.activations import ActivationStore
from saemill.common.world import Group

D = 8
ALONE = Group([0], 0)


def held_out(store: ActivationStore) -> tuple[torch.Tensor, np.ndarray[Any, Any]]:
    """Oracle: held-out unmasked activations and their addresses, by a loop over rows."""
    addresses = []
    for row in np.flatnonzero(store.tokens.held_out_R):
        ids = store.tokens.rows(row, row + 1)[0]
        addresses += [row * 16 + p for p in range(1, 16) if ids[p] != 0]
    return store.read("a", 0, store.n_tokens)[torch.tensor(addresses)], np.array(addresses)


def evalset(store: ActivationStore) -> EvalSet:
    return EvalSet(store, None, None, store.mask, ["a"], 4, ALONE)


def constant_sae(bias: torch.Tensor) -> Sae:
    """x̂ = bias for every x: its only latent never fires."""
    config = SaeConfig(d_in=D, num_latents=1, k=1, provenance={})
    return Sae(config, torch.zeros(1, D), torch.tensor([-1.0]), torch.zeros(1, D), bias)


def signed_identity() -> Sae:
    """x̂ = x: latents ±e_i."""
    rows = torch.cat([torch.eye(D), -torch.eye(D)])
    config = SaeConfig(d_in=D, num_latents=2 * D, k=D, provenance={})
    return Sae(config, rows.clone(), torch.zeros(2 * D), rows.clone(), torch.zeros(D))


def random_sae(seed: int, k: int = 3, f: int = 24) -> Sae:
    generator = torch.Generator().manual_seed(seed)
    w_dec = torch.nn.functional.normalize(torch.randn(f, D, generator=generator), dim=1)
    config = SaeConfig(d_in=D, num_latents=f, k=k, provenance={})
    return Sae(config, w_dec * 0.5, torch.zeros(f), w_dec, torch.full((D,), 20.0))


def reconstruct(store: ActivationStore, saes: dict[str, Sae], max_tokens: int = 10**9) -> Reconstruction:
    chosen = evalset(store)
    return Reconstruction(saes, dict.fromkeys(saes, "a"), chosen).run(chosen.chunks(max_tokens))


def over(found: Reconstruction) -> Bootstrap:
    return Split(found.sums.documents).all

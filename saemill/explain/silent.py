"""Places drawn at random at which a latent is silent.

At each the SAE is computed at every token that is shown, and the latent fires at none of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from saemill.assess.evalset import EvalSet
from saemill.assess.firing import AROUND
from saemill.assess.reader import reader_of
from saemill.common.log import progress
from saemill.common.sae.sae import Sae
from saemill.common.stores.features import Passage, Snippet

SEED = 23
N_PLACES = 512
"""Places drawn in all, from which each latent takes those where it is silent."""
TRIES = 20
"""Addresses tried for a place, where most are masked."""


@dataclass(frozen=True, slots=True)
class Case:
    """A context that an explanation is tested on."""

    place: Snippet | Passage
    fires: bool
    neighbour: int | None = None
    """Latent for which a place was chosen where another, much like it, is silent; None of others."""


class Silent:
    """Places drawn at random, and which latents fire at each.

    Args:
        sae: the SAE.
        evalset: where activations and texts come from.
    """

    def __init__(self, sae: Sae, evalset: EvalSet) -> None:
        self.evalset, self.reader = evalset, reader_of(evalset.text)
        self.addresses = _drawn(evalset)
        self.firing = _firing(sae, evalset, self.addresses)
        """Latents that fire around each place."""
        self.units = evalset.units(np.array(self.addresses, np.int64))

    def of(self, latent: int, taken: set[int], n: int) -> list[Case]:
        """Choose places where a latent is silent, in documents that are not taken: at most n, one of each.
        Their documents are taken then."""
        order = np.random.default_rng((SEED, latent)).permutation(len(self.addresses))
        cases: list[Case] = []
        for at in order.tolist():
            unit = int(self.units[at])
            if len(cases) < n and unit not in taken and latent not in self.firing[at]:
                taken.add(unit)
                cases.append(Case(self.reader.place(self.addresses[at]), fires=False))
        return cases


def _drawn(evalset: EvalSet) -> list[int]:
    """Draw unmasked addresses of the cache, each once."""
    random, text = np.random.default_rng(SEED), evalset.text
    chosen: dict[int, None] = {}
    for address in random.integers(0, evalset.store.n_tokens, TRIES * N_PLACES).tolist():
        row, position = divmod(address, text.ctx_len)
        if len(chosen) < N_PLACES and text.keep(row, row + 1, evalset.mask)[0][position]:
            chosen.setdefault(address)
    return sorted(chosen)


def _firing(sae: Sae, evalset: EvalSet, addresses: Sequence[int]) -> list[set[int]]:
    """Find the latents that fire at each place or at an unmasked token around it, in the same row."""
    array, store = evalset.arrays[str(sae.site)], evalset.store
    found: list[set[int]] = []
    with progress("check silent places", len(addresses), "places") as advance, torch.inference_mode():
        for address in addresses:
            shard = address // store.shard_tokens
            around = _around(evalset, address)
            x_TD = array.gather(shard, around - shard * store.shard_tokens)
            codes = sae.encode(x_TD.to(sae.W_enc.device, torch.float32))
            found.append(set(codes.top_indices[codes.active].tolist()))
            advance(1)
    return found


def _around(evalset: EvalSet, address: int) -> NDArray[np.int64]:
    """List the unmasked addresses of a row that are shown around one."""
    ctx_len = evalset.text.ctx_len
    row, position = divmod(address, ctx_len)
    kept: NDArray[Any] = np.flatnonzero(evalset.text.keep(row, row + 1, evalset.mask)[0])
    near = kept[abs(kept - position) <= AROUND]
    return (near + row * ctx_len).astype(np.int64)

"""Which contexts of a latent its explanation is written from, and which it is tested on.

The contexts are those of `features.json`: the strongest, and those drawn from each fifth of the activations.
They are divided by document, so that no document is on both sides: an explanation that repeats what it was
shown gains nothing by it. Beside the firing contexts on the test's side stand as many silent ones, places
drawn at random from the cache. At each the SAE is computed at every token that is shown, and the latent fires
at none of them.
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
from saemill.common.stores.features import Context, Latent, Passage, Snippet

SEED = 23
LEAST_DOCUMENTS = 4
"""Fewest documents in which a latent fires for it to be explained: two to write from, two to test on."""
N_PLACES = 512
"""Places drawn in all, from which each latent takes those where it is silent."""
TRIES = 20
"""Addresses tried for a place, where most are masked."""


@dataclass(frozen=True, slots=True)
class Case:
    """A context that an explanation is tested on."""

    place: Snippet | Passage
    fires: bool


@dataclass(frozen=True, slots=True)
class Sides:
    """The contexts of one latent."""

    latent: int
    shown: list[Context]
    """Contexts that the explanation is written from, the strongest first."""
    cases: list[Case]
    """Contexts that it is tested on, in random order; as many silent ones as firing ones, or fewer."""


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
        """Choose places where a latent is silent, in documents that are not taken: at most n, one of each."""
        order = np.random.default_rng((SEED, latent)).permutation(len(self.addresses))
        cases: list[Case] = []
        seen = set(taken)
        for at in order.tolist():
            unit = int(self.units[at])
            if len(cases) < n and unit not in seen and latent not in self.firing[at]:
                seen.add(unit)
                cases.append(Case(self.reader.place(self.addresses[at]), fires=False))
        return cases


def divide(latent: Latent, silent: Silent) -> Sides | None:
    """Divide the contexts of a latent; None where it fires in too few documents."""
    every = [*latent.contexts, *(context for stratum in latent.strata for context in stratum.contexts)]
    addresses = np.array([context.place.address for context in every], np.int64)
    units = silent.evalset.units(addresses).tolist() if every else []
    of_document: dict[int, Context] = {}
    for unit, context in zip(units, every, strict=True):
        of_document.setdefault(unit, context)
    if len(of_document) < LEAST_DOCUMENTS:
        return None
    ordered = sorted(of_document.values(), key=lambda context: -context.activation)
    shown, tested = ordered[::2], ordered[1::2]
    cases = [Case(context.place, fires=True) for context in tested]
    cases += silent.of(latent.latent, set(of_document), len(tested))
    order = np.random.default_rng((SEED, latent.latent, 1)).permutation(len(cases))
    return Sides(latent.latent, shown, [cases[at] for at in order.tolist()])


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

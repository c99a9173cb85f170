"""Which contexts of a latent its explanation is written from, and which it is tested on.

The contexts are those of `features.json`: the strongest, and those drawn from each fifth of the activations.
They are divided by document, so that no document is on both sides: an explanation that repeats what it was
shown gains nothing by it. Beside the firing contexts on the test's side stand as many silent ones, drawn at
random, and as many where a latent fires that is much like it (`neighbours`).
"""

from dataclasses import dataclass

import numpy as np

from saemill.common.stores.features import Context, Latent
from saemill.explain.neighbours import Neighbours
from saemill.explain.silent import SEED, Case, Silent

LEAST_DOCUMENTS = 4
"""Fewest documents in which a latent fires for it to be explained: two to write from, two to test on."""


@dataclass(frozen=True, slots=True)
class Sides:
    """The contexts of one latent."""

    latent: int
    shown: list[Context]
    """Contexts that the explanation is written from, the strongest first."""
    cases: list[Case]
    """Contexts that it is tested on, in random order: firing ones; as many silent ones, or fewer; as many of
    neighbours, or fewer."""


def divide(latent: Latent, silent: Silent, neighbours: Neighbours) -> Sides | None:
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
    taken = set(of_document)
    cases += silent.of(latent.latent, taken, len(tested))
    cases += neighbours.of(latent, taken, len(tested))
    order = np.random.default_rng((SEED, latent.latent, 1)).permutation(len(cases))
    return Sides(latent.latent, shown, [cases[at] for at in order.tolist()])

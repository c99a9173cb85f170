"""The work of an assessment, dealt to the processes of a run.

Batches are the same for any number of processes and are dealt whole, in contiguous slices. So a batch
gives the same figures wherever it runs, and few documents lie on two processes.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from saemill.common.log import progress
from saemill.common.world import Group

Addresses = NDArray[np.int64]
"""A batch: the addresses of the tokens in it, of any shape."""

Result = TypeVar("Result")


def dealt(label: str, batches: Sequence[Addresses], everyone: Group, units: str) -> Iterator[Addresses]:
    """Yield this process's share of the batches. Progress is shown scaled to all of them, in `units`."""
    own_batches = batches[everyone.slice_of(len(batches))]
    n_tokens, n_own_tokens = (sum(batch.size for batch in some) for some in (batches, own_batches))
    n_done = 0
    with progress(label, n_tokens, units) as advance:
        for batch in own_batches:
            yield batch
            before, n_done = n_done, n_done + batch.size
            advance(n_tokens * n_done // n_own_tokens - n_tokens * before // n_own_tokens)


def for_each(names: Sequence[str], figure: Callable[[str], Result], everyone: Group) -> dict[str, Result]:
    """Compute `figure(name)` of every name, each on one process, and share the results with all."""
    own_results = {name: figure(name) for name in names[everyone.slice_of(len(names))]}
    return {
        name: result
        for results in everyone.all_gather_objects(own_results)
        for name, result in results.items()
    }

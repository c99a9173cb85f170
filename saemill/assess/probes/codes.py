"""The examples' activations, and the latents of each dictionary on them."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray

from saemill.assess.evalset import EvalSet
from saemill.assess.probes.examples import Examples
from saemill.assess.reconstruction import ROWS_AT_ONCE
from saemill.common.log import progress
from saemill.common.sae.sae import Sae

Codes: TypeAlias = Any
"""Activations of latents, float32 [N, F]: a `scipy.sparse.csc_array`."""


def read(
    examples: Examples, evalset: EvalSet, max_tokens: int, sites: list[str]
) -> dict[str, NDArray[np.float32]]:
    """Read the activations of the examples at some sites, alike on every process.

    Args:
        examples: chosen among the first `max_tokens` tokens.
        evalset: the tokens.
        max_tokens: as above.
        sites: where.

    Returns: site → [N, D].
    """
    found: dict[str, list[NDArray[np.float32]]] = {site: [] for site in sites}
    with progress("read examples", len(examples.addresses_N), f"{evalset.text.unit}s") as advance:
        for batch in evalset.batches(max_tokens):
            some = batch[np.isin(batch, examples.addresses_N, assume_unique=True)]
            if len(some):
                chunk = evalset.read(some)
                for site in sites:
                    found[site].append(chunk.x[site].float().numpy())
                advance(len(some))
    return {site: np.concatenate(pieces) for site, pieces in found.items()}


def encode(sae: Sae, x_ND: NDArray[np.float32]) -> Codes:
    """Compute the latents' activations."""
    counts, columns, values = [], [], []
    with torch.inference_mode():
        for start in range(0, len(x_ND), ROWS_AT_ONCE):
            x = torch.from_numpy(x_ND[start : start + ROWS_AT_ONCE]).to(sae.W_enc.device)
            codes = sae.encode(x)
            active = codes.active
            counts.append(active.sum(1).cpu().numpy())
            columns.append(codes.top_indices[active].int().cpu().numpy())
            values.append(codes.top_acts[active].float().cpu().numpy())
    ends_N = np.cumsum(np.concatenate([[0], *counts]))
    if ends_N[-1] <= np.iinfo(np.int32).max:  # else scipy would write all indices in 8 bytes
        ends_N = ends_N.astype(np.int32)
    by_row = (np.concatenate(values), np.concatenate(columns), ends_N)
    return scipy.sparse.csr_array(by_row, shape=(len(x_ND), sae.config.num_latents)).tocsc()


def sites_of(saes: Mapping[str, Sae]) -> list[str]:
    """List the sites that some SAEs read."""
    return list(dict.fromkeys(str(sae.site) for sae in saes.values()))

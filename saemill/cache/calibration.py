"""Calibration of int8: how a site's activations are spread, from the store's first tokens.

It is done before the first shard is written, from the same tokens whichever worker does it, and becomes part
of the site's record under the claim on the store: the first one that is there holds for all workers, for
runs that go on, and for shards that are written again.
"""

import torch
from torch import Tensor

from saemill.common.models.model import LanguageModel, attention_of
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.forms.int8 import Calibration, calibrate

CALIBRATION_TOKENS = 16384
"""Tokens, the first of the store, that calibrate it; in whole rows."""


def first_rows(store: ActivationStore) -> range:
    """List the rows, or passages, that calibrate a store."""
    return range(min(store.text.n_rows, max(1, CALIBRATION_TOKENS // store.ctx_len)))


def calibration_of(store: ActivationStore, x_TD: Tensor) -> Calibration:
    """Calibrate a site by its activations at the training positions of the first rows; by all of these where
    they have none.

    Args:
        store: the store.
        x_TD: activations of all tokens of `first_rows`, in address order, on the CPU.
    """
    rows = first_rows(store)
    keep_RS = store.text.keep(0, len(rows), store.mask) & ~store.text.held_out_R[: len(rows), None]
    keep_T = torch.from_numpy(keep_RS.reshape(-1))
    return calibrate(x_TD[keep_T] if bool(keep_T.any()) else x_TD)


def calibrations_by(
    model: LanguageModel, store: ActivationStore, sites: list[str], batch_size: int
) -> dict[str, Calibration]:
    """Run the model over the first rows and calibrate some sites.

    Args:
        model: what computes the activations.
        store: the store.
        sites: names of the sites; none of them costs nothing.
        batch_size: rows per forward pass.
    """
    pieces: dict[str, list[Tensor]] = {site: [] for site in sites}
    rows = first_rows(store)
    for row in rows[::batch_size] if sites else ():
        ids = store.tokens.rows(row, min(row + batch_size, rows.stop))
        ids_RS = torch.from_numpy(ids.astype("int64"))
        captured = model.capture(ids_RS, sites, attention_of(ids_RS, store.tokens.tokenizer))
        for site, x_RSD in captured.items():
            pieces[site].append(x_RSD.flatten(0, 1).cpu())
    return {site: calibration_of(store, torch.cat(some)) for site, some in pieces.items()}

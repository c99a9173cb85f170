"""Latent caches of delphi (0.1.3): what its `LatentDataset` explains and scores latents from.

`<site>/<first>_<last>.safetensors` of a range of latents each, and `<site>/config.json`:

    locations    [N, 3], row, position, latent − first; uint16 where that holds them, else uint32
    activations  [N] float16
    tokens       [rows, ctx] int64, the same in every file, as delphi's own

N counts the activations above 1e-5, in the order of the rows. Masked positions have none; their tokens are
there. An activation beyond float16's largest number is written as that, and the user is told how many were.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from saemill.common import durable
from saemill.common.log import counted, progress, say
from saemill.common.sae.sae import Sae
from saemill.latents.codes import Codes
from saemill.latents.rows import Entries, Rows, entries

LEAST = 1e-5
"""What delphi itself takes for no activation."""
LARGEST = float(np.finfo(np.float16).max)
N_SPLITS = 5
"""As by delphi's own default."""


def write(
    sae: Sae, rows: Rows, latents: NDArray[np.int64], folder: Path, model: str, n_splits: int | None
) -> None:
    """Write the cache of one SAE.

    Args:
        sae: the SAE; of a transcoder the cache is of the site that it reads.
        rows: the tokens.
        latents: those to write, ascending; of others there are no activations.
        folder: where the folder of the SAE's site goes.
        model: hub id or folder, whose tokenizer delphi loads.
        n_splits: number of files, at most one for each latent; None for delphi's default.

    Raises:
        DiskError: the disk is full.
    """
    site = str(sae.site)
    edges = _edges(sae.config.num_latents, n_splits or N_SPLITS)
    codes = Codes(folder / ".codes", latents, edges[:-1])
    for _, some in entries(sae, rows, f"encode {site}", LEAST):
        codes.add(some)
    tokens_RS = rows.ids(0, rows.n_rows).astype(np.int64)
    n_clipped = 0
    with progress(f"write {site}", len(codes.firsts), "files") as advance:
        for part, (first, stop) in enumerate(pairwise(edges)):
            content, n = _content(codes.take(part), rows, int(first), int(stop))
            n_clipped += n
            path = folder / site / f"{first}_{stop - 1}.safetensors"
            with durable.replacing(path) as partial:
                save_file(content | {"tokens": tokens_RS}, partial)
            advance(1)
    codes.folder.rmdir()
    durable.write_json(folder / site / "config.json", _config(rows, model, len(codes.firsts)))
    if n_clipped:
        say(
            f"{site}: {counted(n_clipped, 'activation')} beyond float16 written as its largest number, "
            f"{LARGEST:,.0f}: delphi cannot rank them among each other"
        )


def _edges(n_latents: int, n_splits: int) -> NDArray[np.int64]:
    """Divide latents among files as delphi does: as evenly as whole numbers allow. int64 [files + 1]."""
    return np.linspace(0, n_latents, min(n_splits, n_latents) + 1).astype(np.int64)


def _content(codes: Entries, rows: Rows, first: int, stop: int) -> tuple[dict[str, NDArray[Any]], int]:
    """Make the tensors of a file, and count the activations that float16 cannot hold."""
    is_small = max(rows.n_rows, rows.ctx, stop - first) <= 1 << 16
    locations = np.empty((len(codes.place_N), 3), np.uint16 if is_small else np.uint32)
    locations[:, 0], locations[:, 1] = np.divmod(codes.place_N, rows.ctx)
    locations[:, 2] = codes.latent_N - first
    acts = np.minimum(codes.act_N, LARGEST).astype(np.float16)
    return {"locations": locations, "activations": acts}, int((codes.act_N > LARGEST).sum())


def _config(rows: Rows, model: str, n_splits: int) -> dict[str, Any]:
    """Describe the cache with the fields of delphi's `CacheConfig`."""
    manifest = rows.store.tokens.manifest
    of_source = manifest.settings.model_dump(mode="json")
    return {
        "dataset_repo": manifest.source.name,
        "dataset_split": str(of_source.get("split") or ""),
        "dataset_name": str(of_source.get("subset") or ""),
        "dataset_column": manifest.source.column or "",
        "batch_size": 1,
        "cache_ctx_len": rows.ctx,
        "n_tokens": rows.n_tokens,
        "n_splits": n_splits,
        "model_name": model,
    }

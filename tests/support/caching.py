"""A corpus of 150 rows, the cache of it, and the hidden states that it must hold."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers
import zarr
from numpy.typing import NDArray
from torch import Tensor

from saemill.cache import run as cache_run
from saemill.cache.config import CacheConfig
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.tokens import TokenStore
from saemill.tokenize.config import TokenizeConfig
from saemill.tokenize.run import run as tokenize

N_ROWS, CTX_LEN, SHARD, BATCH = 150, 32, 512, 5
N_SHARDS = 10
"""Nine shards of 16 rows and one of 6."""


def changed_model(folder: str, out: Path, name: str, change: Callable[[Tensor], Tensor]) -> str:
    """A copy of a checkpoint with one tensor changed."""
    shutil.copytree(folder, out)
    weights = safetensors.torch.load_file(out / "model.safetensors")
    weights[name] = change(weights[name])
    safetensors.torch.save_file(weights, out / "model.safetensors", {"format": "pt"})
    return str(out)


def tokenized(corpus: Path, tokenizer: str, out: Path, **changes: Any) -> TokenStore:
    """Tokenize the first 150 rows of a corpus, some of which are held out."""
    settings: dict[str, Any] = {"ctx_len": CTX_LEN, "max_tokens": N_ROWS * CTX_LEN, "held_out_fraction": 0.2}
    return tokenize(TokenizeConfig(dataset=str(corpus), tokenizer=tokenizer, out=out, **settings | changes))


def cache(tokens: TokenStore | Path, model: str, out: Path, **changes: Any) -> ActivationStore:
    """Cache in shards of 16 rows, block 1 unless told otherwise."""
    path = tokens.path if isinstance(tokens, TokenStore) else tokens
    settings: dict[str, Any] = {"shard_tokens": SHARD, "batch_size": BATCH}
    if not changes.keys() & {"layers", "sites", "layer_stride"}:
        settings["layers"] = (1,)
    return cache_run.run(CacheConfig(tokens=path, model=model, out=out, **settings | changes))


def hidden_states(
    store: TokenStore, model: str, layer: int, n_rows: int = N_ROWS, mask: Tensor | None = None
) -> Tensor:
    """Oracle: transformers' hidden states after a block, in the batches that the cache makes.

    Returns: fp32 [n_rows * ctx_len, D], in address order.
    """
    network = transformers.AutoModel.from_pretrained(model).eval()
    ids = torch.from_numpy(store.rows(0, n_rows).astype(np.int64))
    found = []
    rows_per_shard = SHARD // store.ctx_len
    for first in range(0, n_rows, rows_per_shard):
        last = min(first + rows_per_shard, n_rows)
        for row in range(first, last, BATCH):
            chosen = slice(row, min(row + BATCH, last))
            attention = None if mask is None else mask[chosen]
            with torch.no_grad():
                output = network(ids[chosen], attention_mask=attention, output_hidden_states=True)
            found.append(output.hidden_states[layer + 1].flatten(0, 1))
    return torch.cat(found)


def marks(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file: both change when it is written again."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(f.relative_to(folder)): (f.stat().st_ino, f.stat().st_mtime_ns) for f in files}


def with_zarr(path: Path) -> NDArray[Any]:
    """Read an array with plain zarr-python."""
    return np.asarray(zarr.open_array(str(path), mode="r")[:])

"""A store whose rows hold their own addresses, written through saemill's writers without a model.

Two rows of 256 tokens count as a document. The first four values of an activation are the digits of its
address in base 256, which bf16 holds exactly; the others are random.
"""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from saemill.cache.claims.worker import Worker
from saemill.cache.folder import write_group
from saemill.cache.placing import OnDisk
from saemill.cache.plan import SHARD_TOKENS
from saemill.cache.spare import Spare
from saemill.cache.writer import SiteWriter
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.site_records import Site, StoreSettings
from saemill.common.stores.token_writer import copy_rows
from saemill.common.stores.tokens import TokenStore
from saemill.demo import MODEL
from saemill.tokenize.config import TokenizeConfig
from saemill.tokenize.run import run as tokenize

SITE = "addressed"
CTX_LEN = 256
DOCUMENT_TOKENS = 2 * CTX_LEN
N_DIGITS = 4
NOTHING_LEFT_OUT = MaskConfig(special_tokens=False, first_positions=0)
"""So that the loader reads and hands out the same bytes as a plain read."""


def make(folder: Path, n_tokens: int, width: int) -> Path:
    """Write the store, bf16.

    Args:
        folder: where; it exists.
        n_tokens: a multiple of `DOCUMENT_TOKENS`.
        width: D.

    Returns: its path.
    """
    tokens, path = _tokens(folder, n_tokens // CTX_LEN), folder / "acts"
    copy_rows(tokens, tokens.n_rows, path / "tokens")
    settings = StoreSettings(
        tokens_fingerprint=tokens.fingerprint,
        n_rows=tokens.n_rows,
        shard_tokens=min(n_tokens, SHARD_TOKENS),
        dtype="bf16",
        model_dtype="float32",
        model_fingerprint="none",
        mask=NOTHING_LEFT_OUT,
        model="none",
        revision=None,
        versions={},
    )
    noise_TD = torch.randn(
        settings.shard_tokens, width, generator=torch.Generator().manual_seed(0)
    ).bfloat16()
    with Worker(OnDisk(path), threading.Event()) as worker, worker.hold("store") as claim:
        write_group(path, settings, worker)
        store = ActivationStore(path)
        writer, spare = SiteWriter(store, Site(SITE, width), worker), Spare()
        for shard in range(store.n_shards):
            x_TD = noise_TD[: store.shard_length(shard)]
            x_TD[:, :N_DIGITS] = _digits(shard * store.shard_tokens, len(x_TD))
            writer.write(shard, x_TD, claim, spare)
        writer.finish()
    return path


def _tokens(folder: Path, n_rows: int) -> TokenStore:
    """Write rows of random ids, none held out."""
    ids_RS = np.random.default_rng(0).integers(1, 8192, (n_rows, CTX_LEN))
    pq.write_table(pa.table({"input_ids": list(ids_RS)}), folder / "ids.parquet")
    return tokenize(
        TokenizeConfig(
            dataset=str(folder / "ids.parquet"),
            tokenizer=str(MODEL),
            out=folder / "tokens",
            shuffle_seed=None,
            held_out_fraction=0,
        )
    )


def _digits(first: int, n: int) -> Tensor:
    """Compute the digits of the addresses first..first + n. bf16 [n, N_DIGITS]."""
    address_T = torch.arange(first, first + n)
    return torch.stack([address_T // 256**i % 256 for i in range(N_DIGITS)], dim=1).bfloat16()


def addresses(x_TD: Tensor) -> NDArray[Any]:
    """Read the addresses of stored rows. int64 [T]."""
    digits = x_TD[:, :N_DIGITS].to(torch.int64).numpy()
    return digits @ 256 ** np.arange(N_DIGITS)

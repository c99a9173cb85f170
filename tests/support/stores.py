"""Stores with known content, written through saemill's own writers."""

import threading
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from numpy.typing import NDArray

from saemill.cache.calibration import calibration_of, first_rows
from saemill.cache.claims.worker import Worker
from saemill.cache.folder import write_group
from saemill.cache.placing import OnDisk
from saemill.cache.writer import SiteWriter
from saemill.common.config import plain
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.forms.form import empty
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.shards import ShardedArray
from saemill.common.stores.site_records import Site, StoreSettings
from saemill.common.stores.token_writer import cut_documents, write_token_store
from saemill.common.stores.tokens import TokenizerInfo, TokenStore
from saemill.common.stores.word_labels import WordLabels
from saemill.demo import MODEL
from saemill.embeddings.config import ImportConfig
from saemill.embeddings.run import run as import_activations

INFO = TokenizerInfo(
    name=str(MODEL), hash="none", vocab_size=8192, prefix_ids=(), suffix_ids=(), separator_id=0,
    special_ids=(0,), pad_id=None, mask_id=None,
)  # fmt: skip


Labels = Mapping[str, tuple[tuple[str, ...], NDArray[np.uint16]]]
"""By column the names of labels, and the number of each token's, [n_rows, ctx_len]."""


def make_tokens(
    path: Path,
    n_rows: int,
    ctx_len: int,
    seed: int = 0,
    parent: str | None = None,
    labels: Labels = MappingProxyType({}),
) -> TokenStore:
    """Random tokens; one document per row but for every fifth row, which continues the one before.

    Every eighth row is held out.
    """
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, 8192, (n_rows, ctx_len)).astype(np.uint16)
    ids[generator.random(ids.shape) < 0.05] = 0
    tokens = ShardedArray.create(path / "tokens", ids.shape, n_rows, torch.uint16, {})
    tokens.write_shard(0, ids)
    for column, (_, numbers) in labels.items():
        array = ShardedArray.create(path / "labels" / column, ids.shape, n_rows, torch.uint16, {})
        array.write_shard(0, numbers)
    rows = np.arange(n_rows)
    number = np.cumsum(rows % 5 != 4) - 1
    held_out = number % 8 == 1
    transformers.AutoTokenizer.from_pretrained(str(MODEL)).save_pretrained(path / "tokenizer")
    segments = pa.table({"start": rows * ctx_len, "document": number})
    n_documents = int(number.max()) + 1
    documents = pa.table(
        {
            "source_index": np.arange(n_documents),
            "held_out": np.arange(n_documents) % 8 == 1,
            "text_hash": np.arange(n_documents).astype(np.uint64) + 1000 * (seed + 1),
        }
    )
    write_token_store(
        path,
        tokens=tokens,
        held_out_R=held_out,
        segments=segments,
        documents=cut_documents(documents, segments, n_rows * ctx_len),
        labels=[WordLabels(column=column, names=names) for column, (names, _) in labels.items()],
        tokenizer=INFO,
        extra={
            "document": "text",
            "n_used_ids": INFO.vocab_size,
            "source": {"name": "test", "fingerprint": "test", "column": "text"},
            "settings": {"held_out_fraction": 0.125},
            "versions": {},
            "parent_fingerprint": parent,
        },
    )
    return TokenStore(path)


def make_store(
    path: Path,
    n_rows: int,
    ctx_len: int,
    d: int,
    shard_tokens: int,
    values_TD: torch.Tensor | None = None,
    b_TD: torch.Tensor | None = None,
    seed: int = 0,
    model: str = "none",
    form: tuple[str, str | None] = ("fp32", None),
    labels: Labels = MappingProxyType({}),
) -> ActivationStore:
    """An activation store with sites `a` and `b`.

    Args:
        values_TD: values of site a by address; by default dimensions 0 and 1 tell the address
            (a // 256, a % 256) and the others are random.
        b_TD: those of site b, of any width; by default those of a, plus 1.
        seed: of the tokens.
        model: what made the activations.
        form: stored type and compression.
        labels: of the tokens.
    """
    acts = path / "acts"
    tokens = make_tokens(acts / "tokens", n_rows, ctx_len, seed, parent="a token store", labels=labels)
    settings = StoreSettings.made(
        {},
        tokens_fingerprint=tokens.manifest.parent_fingerprint,
        n_rows=n_rows,
        shard_tokens=shard_tokens // ctx_len * ctx_len,
        dtype=form[0],
        compression=form[1],
        model_dtype="float32",
        model_fingerprint=model,
        mask=plain(MaskConfig()),
        model=model,
        revision=None,
        versions={"saemill": version("saemill")},
    )
    with Worker(OnDisk(acts), threading.Event()) as worker:
        write_group(acts, settings, worker)
    store = ActivationStore(acts)
    if values_TD is None:
        values_TD = torch.randn(store.n_tokens, d, generator=torch.Generator().manual_seed(0))
        address = torch.arange(store.n_tokens)
        values_TD[:, 0], values_TD[:, 1] = (address // 256).float(), (address % 256).float()
    with Worker(OnDisk(acts), threading.Event()) as worker, worker.hold("store") as claim:
        for name, site_TD in (("a", values_TD), ("b", values_TD + 1 if b_TD is None else b_TD)):
            writer = SiteWriter(store, Site(name, site_TD.shape[1]), worker)
            if form[0] == "int8":
                n_first = len(first_rows(store)) * store.ctx_len
                writer.note(None, calibration_of(store, site_TD[:n_first]))
            for shard in range(store.n_shards):
                start = shard * store.shard_tokens
                x_TD = site_TD[start : start + store.shard_length(shard)]
                stored_TC = empty(writer.form, len(x_TD))
                writer.form.encode(x_TD, stored_TC)
                writer.write(shard, stored_TC, claim)
            writer.finish()
    return store


def make_embeddings(folder: Path) -> tuple[Path, Callable[[Path], ActivationStore]]:
    """A store of 40 embeddings with texts, in three shards, and what makes or mends one."""
    vectors = np.random.default_rng(0).standard_normal((40, 4)).astype("f4")
    texts = [f"text {i}" for i in range(40)]
    columns = {"embedding": pa.array(list(vectors), pa.list_(pa.float32())), "text": texts}
    pq.write_table(pa.table(columns), folder / "x.parquet")

    def make(out: Path) -> ActivationStore:
        return import_activations(ImportConfig(source=str(folder / "x.parquet"), out=out, shard_rows=16))

    return make(folder / "acts").path, make


def files_of(folder: Path) -> list[str]:
    """Paths of all files below a folder."""
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())

"""Rows of a token store as a dataset of other tools: a `save_to_disk` folder with a column `input_ids`.

SAELens and sparsify train on such a folder, and read it with `datasets.load_from_disk`. What SAELens' own
pretokenizer writes down stands beside it, in `sae_lens.json`.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from saemill.common import config as settings
from saemill.common import durable
from saemill.common.errors import ConfigError
from saemill.common.log import counted, say
from saemill.common.stores.tokens import TokenStore

METADATA = "sae_lens.json"


def export(path: Path, out: Path, held_out: bool) -> datasets.Dataset:
    """Write a store's rows of one side to a new folder, in their order.

    Args:
        path: the token store.
        out: the folder, new or empty.
        held_out: whether the rows that training never sees are written, in place of the others.

    Returns: the dataset: `input_ids`, int32 of the rows' length, in the format of torch.

    Raises:
        ConfigError: there is no such row, or the output holds files.
        StoreError: the store is damaged.
    """
    settings.check_folder(out)
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} holds files; choose another folder, or empty that one")
    store = TokenStore(path)
    rows_R = np.flatnonzero(store.held_out_R == held_out)
    if not len(rows_R):
        raise ConfigError(f"{path} has no {'held-out' if held_out else 'training'} row to export")
    with durable.writing(out):
        _save(store, rows_R, out)
    side = "held-out" if held_out else "training"
    left_out = "" if held_out else f"; {store.n_rows - len(rows_R):,} held-out rows left out"
    say(f"{out}: {counted(len(rows_R), f'{side} row')} of {store.ctx_len} ids{left_out}")
    saved = datasets.load_from_disk(str(out))
    assert isinstance(saved, datasets.Dataset)
    return saved


def _save(store: TokenStore, rows_R: NDArray[np.int64], out: Path) -> None:
    """Save some rows as a dataset, whole or not at all."""
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"), length=store.ctx_len)})

    def rows() -> Iterator[dict[str, Any]]:
        for row in rows_R:
            yield {"input_ids": store.rows(row, row + 1)[0].astype(np.int32)}

    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        made = datasets.Dataset.from_generator(
            rows,
            features=features,
            cache_dir=scratch,
            split=datasets.Split.TRAIN,
            fingerprint=store.fingerprint,
        )
        made.set_format("torch", columns=["input_ids"])
        made.save_to_disk(str(partial))
    durable.write_bytes(partial / METADATA, [metadata(store)])
    if out.exists():
        out.rmdir()
    partial.replace(out)
    durable.sync_folder(out.absolute().parent)


def metadata(store: TokenStore) -> bytes:
    """Write what SAELens' pretokenizer says of its datasets, as far as a token store knows it."""
    manifest, info = store.manifest, store.tokenizer
    given = manifest.settings.model_dump(mode="json")
    told = {
        "sae_lens_version": f"saemill {version('saemill')}",
        "tokenizer_name": info.name,
        "original_dataset": manifest.source.name,
        "original_dataset_name": given.get("subset"),
        "original_split": given.get("split"),
        "original_data_files": None,
        "original_column_name": manifest.source.column,
        "context_size": store.ctx_len,
        "shuffled": given.get("shuffle_seed") is not None,
        "seed": given.get("shuffle_seed"),
        "begin_batch_token": info.prefix_ids[0] if len(info.prefix_ids) == 1 else None,
        "begin_sequence_token": manifest.document_start_id,
        "sequence_separator_token": None if manifest.document == "kept row" else info.separator_id,
        "disable_concat_sequences": manifest.document == "kept row",
        "use_chat_formatting": bool(manifest.roles),
    }
    return json.dumps(told, indent=2, ensure_ascii=False).encode()

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

from saemill.common import config as settings
from saemill.common import durable
from saemill.common.errors import ConfigError
from saemill.common.log import counted, say
from saemill.common.stores.tokens import TokenStore

METADATA = "sae_lens.json"
READ_ROWS = 1024


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
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"), length=store.ctx_len)})

    def rows() -> Iterator[dict[str, Any]]:
        for start in range(0, store.n_rows, READ_ROWS):
            ids_RS = store.rows(start, min(start + READ_ROWS, store.n_rows))
            for row in np.flatnonzero(store.held_out_R[start : start + READ_ROWS] == held_out):
                yield {"input_ids": ids_RS[row].astype(np.int32)}

    with durable.writing(out), tempfile.TemporaryDirectory() as scratch:
        made = datasets.Dataset.from_generator(rows, features=features, cache_dir=scratch, split="train")
        assert isinstance(made, datasets.Dataset)
        made.set_format("torch", columns=["input_ids"])
        partial = out.with_name(f"{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        made.save_to_disk(str(partial))
        durable.write_bytes(partial / METADATA, [metadata(store)])
        if out.exists():
            out.rmdir()
        partial.replace(out)
    side = "held-out" if held_out else "training"
    say(
        f"{out}: {counted(len(rows_R), f'{side} row')} of {store.ctx_len} ids, for SAELens and sparsify"
        + ("" if held_out else f"; {store.n_rows - len(rows_R):,} held-out rows left out")
    )
    saved = datasets.load_from_disk(str(out))
    assert isinstance(saved, datasets.Dataset)
    return saved


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

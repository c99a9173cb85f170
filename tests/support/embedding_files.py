"""Small files of embeddings of every kind."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import safetensors.torch
import torch

X = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
IDS, TEXTS = [f"i{i}" for i in range(9)], [f"text {i}" for i in range(9)]
RAW = {"width": 4, "raw_dtype": "fp32"}


def write_all(folder: Path) -> dict[Path, dict[str, Any]]:
    """One file of each kind, with the options that it is imported with."""
    table = pa.table({"embedding": list(X), "id": IDS, "text": TEXTS})
    fixed = pa.table({"embedding": pa.FixedSizeListArray.from_arrays(pa.array(X.ravel()), 4)})
    lines = "".join(
        json.dumps({"embedding": x.tolist(), "id": i, "text": t}) + "\n"
        for x, i, t in zip(X, IDS, TEXTS, strict=True)
    )
    pq.write_table(table, folder / "a.parquet", row_group_size=5)
    pq.write_table(fixed, folder / "b.parquet", compression="none")
    pyarrow.feather.write_feather(table, str(folder / "a.arrow"), compression="uncompressed")
    with pa.ipc.new_stream(folder / "b.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=4)
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    np.save(folder / "a.npy", X)
    np.savez(folder / "a.npz", wanted=X)
    np.savez_compressed(folder / "b.npz", wanted=X)
    torch.save({"wanted": torch.from_numpy(X)}, folder / "a.pt")
    torch.save(torch.from_numpy(X), folder / "b.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file({"wanted": torch.from_numpy(X)}, folder / "a.safetensors")
    X.tofile(folder / "a.bin")
    return {file: RAW if file.suffix == ".bin" else {} for file in sorted(folder.iterdir())}

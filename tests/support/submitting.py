"""A small pipeline to submit, as a config file."""

from pathlib import Path
from typing import Any

import yaml

from saemill.demo import MODEL, TEXT

TINY: dict[str, dict[str, Any]] = {
    "tokenize": {
        "dataset": str(TEXT), "tokenizer": str(MODEL), "ctx_len": 64, "max_tokens": 64 * 400, "out": "tokens",
    },
    "cache": {"model": str(MODEL), "layers": [2], "shard_tokens": 8192, "out": "acts", "device": "cpu"},
    "train": {
        "site": ["layers.2"], "k": [8, 16], "num_latents": [256], "batch_size": 256, "max_tokens": 256 * 1000,
        "buffer_tokens": 8192, "log_every": 1, "out": "run", "device": "cpu",
    },
    "assess": {"model_tokens": 500, "max_tokens": 1000, "n_latents": 1, "device": "cpu"},
    "slurm": {"cpus": 1},
}  # fmt: skip
"""The whole pipeline in seconds; the folders between stages are named once."""


def config(folder: Path, **changes: dict[str, Any] | None) -> Path:
    """A file with TINY's sections and changes to them; None leaves a section out."""
    sections = {name: values | (changes.get(name) or {}) for name, values in TINY.items()}
    sections = {name: values for name, values in sections.items() if changes.get(name, {}) is not None}
    file = folder / "pipeline.yaml"
    file.write_text(yaml.safe_dump(sections))
    return file

"""Samples of the demo's model."""

import threading
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from saemill.common.models.model import LanguageModel
from saemill.demo import MODEL
from saemill.generate.config import GenerateConfig

NEVER = threading.Event()


def config(out: Path, *models: str, **changes: Any) -> GenerateConfig:
    """Return settings of ten samples of twelve tokens, of the demo's model unless others are named."""
    values = {"n_samples": 10, "max_tokens": 12, "batch_size": 4, "device": "cpu"} | changes
    return GenerateConfig(model=models or (str(MODEL),), out=out, **values)


def load(name: str) -> LanguageModel:
    """Load a model with its head, in fp32 on the CPU."""
    return LanguageModel(name, revision=None, dtype=torch.float32, device=torch.device("cpu"), with_head=True)


def read(file: Path) -> list[dict[str, Any]]:
    """Read a dataset's rows."""
    rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
    return rows

"""A small store whose activations have structure, and runs that train on it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from stores import make_store

from saemill.common.stores.activations import ActivationStore
from saemill.train.config import TrainConfig
from saemill.train.run import run
from saemill.train.trainer import Trainer

D = 16


def structured(n: int) -> torch.Tensor:
    """Sparse sums of 40 directions, far from the origin."""
    generator = torch.Generator().manual_seed(7)
    directions = torch.randn(40, D, generator=generator)
    picks = torch.randint(0, 40, (n, 3), generator=generator)
    return directions[picks].sum(1) + 0.1 * torch.randn(n, D, generator=generator) + 30


def structured_store(folder: Path, **changes: Any) -> ActivationStore:
    """256 rows of 32 such activations at site `a`, and at `b` those plus 1."""
    values = {"values_TD": structured(256 * 32)} | changes
    return make_store(folder, n_rows=256, ctx_len=32, d=D, shard_tokens=2048, **values)


def config(store: ActivationStore, out: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "acts": store.path, "out": out, "site": ("a",), "k": (2, 8), "num_latents": (48, 64), "lr": (3e-3,),
        "batch_size": 256, "max_tokens": 256 * 24, "save_every": 7, "log_every": 5, "precision": "fp32",
        "dead_after_tokens": 512, "device": "cpu",
    }  # fmt: skip
    return TrainConfig(**settings | changes)


def files(out: Path) -> dict[str, bytes]:
    """All weights of a run, and its metrics without the times."""
    found = {str(f.relative_to(out)): f.read_bytes() for f in out.rglob("sae.safetensors")}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s")} for line in lines]
    return found | {"metrics": json.dumps(timeless).encode()}


def killed_at(step: int, settings: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies before a step, without the time to save."""
    one_step = Trainer._one_step

    def failing(self: Trainer) -> None:
        if self.step == step:
            raise KeyboardInterrupt
        one_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_one_step", failing)
        with pytest.raises(KeyboardInterrupt):
            run(settings)


def halved(store: ActivationStore, out: Path, **changes: Any) -> TrainConfig:
    """Settings of two variants in 25 steps, of which halving stops one; kernels in torch."""
    settings: dict[str, Any] = {
        "k": (2,), "num_latents": (48,), "lr": (1e-4, 3e-3), "max_tokens": 256 * 25, "kernels": "torch",
        "halving": 1,
    }  # fmt: skip
    return config(store, out, **settings | changes)

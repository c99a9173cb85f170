"""TensorBoard's events, read back by TensorBoard."""

import json
from pathlib import Path
from typing import Any

import pytest
from stores import make_store
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import D, config, killed_at, structured

from saemill.common.errors import ConfigError
from saemill.train import run as train
from saemill.train.run import run


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_events_are_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: metrics.jsonl, also of a run that was killed: each step once."""
    store = make_store(
        tmp_path, n_rows=256, ctx_len=32, d=D, shard_tokens=2048, values_TD=structured(256 * 32)
    )
    out = tmp_path / "r"
    settings: dict[str, Any] = {
        "k": (4, 8),
        "num_latents": (48,),
        "log_to_tensorboard": True,
        "eval_every": 10,
    }
    killed_at(17, config(store, out, **settings), monkeypatch)
    folders = run(config(store, out, **settings))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    for folder in folders:
        found = scalars(out / "tensorboard" / folder.name)
        measured = {"eval_fvu", "eval_l0", "eval_dead_fraction"}
        assert set(found) == {"fvu", "loss", "auxk", "l0", "dead_fraction", "lr", "tokens_per_s"} | measured
        assert len(found["eval_fvu"]) == 3
        for tag in set(found) - {"tokens_per_s"}:
            assert found[tag] == [
                (line["tokens"], pytest.approx(line["variants"][folder.name][tag], rel=1e-6))
                for line in lines
                if tag in line["variants"][folder.name]
            ]


def test_without_tensorboard_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the message, which says how to install it."""
    store = make_store(
        tmp_path, n_rows=256, ctx_len=32, d=D, shard_tokens=2048, values_TD=structured(256 * 32)
    )
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'saemill\[tensorboard\]'"):
        run(config(store, tmp_path / "r", log_to_tensorboard=True))
    assert not (tmp_path / "r").exists()

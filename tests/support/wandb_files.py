"""Runs as wandb wrote them: its log file (LevelDB's log format) with its own protobuf messages."""

import json
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK_BYTES, FILE_HEADER_BYTES, HEADER = 32768, 7, struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> list[Any]:
    """All messages of a `.wandb` file; every checksum is checked."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, whole, found = FILE_HEADER_BYTES, b"", []
    while at < len(data):
        left = BLOCK_BYTES - at % BLOCK_BYTES
        if left < HEADER.size:
            at += left
            continue
        checksum, size, kind = HEADER.unpack_from(data, at)
        part = data[at + HEADER.size : at + HEADER.size + size]
        assert zlib.crc32(bytes([kind]) + part) == checksum
        at += HEADER.size + size
        whole = part if kind in (FULL, FIRST) else whole + part
        if kind in (FULL, LAST):
            message = Record()
            message.ParseFromString(whole)
            found.append(message)
    return found


@dataclass
class Written:
    """One process's part of one run."""

    run: Any
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    """Values by name, and `_step`."""
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    exit_code: int | None = None
    preempting: bool = False
    metrics: list[str] = field(default_factory=list)
    """Names that define_metric gave another x axis."""


def written(folder: Path) -> dict[str, list[Written]]:
    """What is below RUN/wandb: by the name of the run, in the order of time."""
    found: dict[str, list[Written]] = {}
    for path in sorted(folder.glob("wandb/*run-*/*.wandb"), key=lambda path: path.parent.name):
        part = _written(records(path))
        found.setdefault(part.run.display_name, []).append(part)
    return found


def _written(messages: list[Any]) -> Written:
    part = Written(run=next(message.run for message in messages if message.HasField("run")))
    part.config = _values(part.run.config.update)
    for message in messages:
        kind = message.WhichOneof("record_type")
        if kind == "history":
            part.history.append(_values(message.history.item))
        elif kind == "summary":
            part.summary |= _values(message.summary.update)
        elif kind == "exit":
            part.exit_code = message.exit.exit_code
        elif kind == "preempting":
            part.preempting = True
        elif kind == "artifact":
            part.artifacts.append(message.artifact)
        elif kind == "metric" and message.metric.step_metric:
            part.metrics.append(message.metric.name or message.metric.glob_name)
    return part


def _values(items: Any) -> dict[str, Any]:
    """Values by name; of what is nested, by its path."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}

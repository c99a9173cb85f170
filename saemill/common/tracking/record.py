"""Settings for the process that talks to wandb, `wandb.json`, and its progress, `wandb-logged.json`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import JsonValue

from saemill.common import records
from saemill.common.errors import MissingError
from saemill.common.records import Name, Positive, Record
from saemill.common.stores.runs import WANDB, WANDB_LOGGED

REPAIR = "Remove the file: the run's folder holds all that wandb was sent, and wandb keeps what it has."


class Entry(Record):
    """The wandb run of a variant."""

    id: str
    """Id of the wandb run."""
    config: dict[str, JsonValue]


class Assessed(Record):
    """An assessment that was logged."""

    id: str
    """Id of the assessment's own wandb run."""
    folder: str


class WandbSettings(Record):
    """`wandb.json`."""

    format: Literal["saemill wandb 2"] = "saemill wandb 2"
    project: str
    entity: str | None
    group: str
    prefix: str
    """Prefix of the names of wandb's runs."""
    log_frequency: Positive
    """Training steps between logged records."""
    artifacts: bool
    runs: dict[Name, Entry]
    """Wandb runs by variant."""
    assessments: dict[str, Assessed]
    """Assessments by the prefix of their figures."""


class Logged(Record):
    """`wandb-logged.json`."""

    format: Literal["saemill wandb log 2"] = "saemill wandb log 2"
    tokens: int = -1
    """Training tokens at the last line of metrics.jsonl that went to wandb."""
    ended: tuple[Name, ...] = ()
    """Variants whose wandb runs have all of training."""


def settings(folder: Path) -> WandbSettings:
    """Read `wandb.json`.

    Raises:
        MissingError: the run was not logged to wandb.
        StoreError: it is damaged.
    """
    return records.read(folder / WANDB, WandbSettings, REPAIR)


def logged(folder: Path) -> Logged:
    """Read `wandb-logged.json`; nothing was logged where there is none.

    Raises:
        StoreError: it is damaged.
    """
    try:
        return records.read(folder / WANDB_LOGGED, Logged, REPAIR)
    except MissingError:
        return Logged()


def note(folder: Path, progress: Logged) -> None:
    """Write `wandb-logged.json`, whole or not at all for any reader, but not flushed to disk each time."""
    partial = folder / f".{WANDB_LOGGED}.partial"
    partial.write_text(json.dumps(records.content(progress)) + "\n")
    partial.replace(folder / WANDB_LOGGED)


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a config to what JSON has: lists in place of tuples."""
    values: dict[str, Any] = json.loads(json.dumps(config))
    return values

"""Whether a run's folder is whole: every file of it that saemill wrote, against the records."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from saemill.common import durable, records
from saemill.common.errors import StoreError
from saemill.common.records import File
from saemill.common.sae import of_run
from saemill.common.sae.formats import sparsify
from saemill.common.stores import runs
from saemill.common.stores.runs import (
    ANEW,
    CHECKPOINT,
    CHECKPOINTS,
    CONFIG,
    FINISHED,
    HALVING,
    METRICS,
    UNITS,
)
from saemill.train.record import checkpoint
from saemill.train.stream import units

SAME = "The same `saemill train` writes it again."


def problems(run: Path) -> list[str]:
    """List each bad file of a run, finished or not, with what repairs it.

    Files of other tools (wandb's, TensorBoard's, a profile) are not checked, nor is the assessment, which
    has its own check.

    Args:
        run: its folder.
    """
    lines = settings_problems(run)
    lines += _finished(run) if runs.is_finished(run) else _unfinished(run)
    return list(dict.fromkeys(lines))


def settings_problems(run: Path) -> list[str]:
    """List the problems of a run's two files of settings."""
    try:
        if runs.is_finished(run) and runs.finished(run).imported:
            return []
        identity = runs.identity(run)
    except StoreError as error:
        return [str(error)]
    file = run / CONFIG
    if not file.is_file():
        return [f"{file}: file is missing. {SAME}"]
    if durable.hash_file(file) != identity.config:
        return [f"{file} is damaged: its content differs from its hash. {SAME}"]
    return []


def _finished(run: Path) -> list[str]:
    """List the problems of a finished run: the record, the SAEs, and the other files that it lists."""
    try:
        record = runs.finished(run)
    except StoreError as error:
        return [str(error)]
    lines = [f"{line}. {ANEW}" for line in records.problems(run, record.files)]
    for name, cfg in record.cfgs.items():
        lines += _sae(run / name, cfg, run / FINISHED)
    return lines


def _unfinished(run: Path) -> list[str]:
    """List the problems of a run that goes on: its checkpoint, the log up to it, and the SAEs stopped
    early."""
    lines = stopped_problems(run)
    if (run / UNITS).exists():
        lines += _message_of(partial(units.read, run, ""))
    try:
        record = checkpoint.read(run)
    except StoreError as error:
        return [*lines, str(error)]
    if record is not None:
        return [*lines, *checkpoint.problems(run, record), *_log(run / METRICS, record.metrics)]
    if any(run.glob(f"{CHECKPOINTS}*")):
        lines.append(f"{run / CHECKPOINT}: file is missing. The same `saemill train` begins anew.")
    return lines


def stopped_problems(run: Path) -> list[str]:
    """List the problems of halving's record, and of the SAEs that it lists."""
    lines = []
    try:
        for rung in runs.looks(run):
            for name, lost in rung.stopped.items():
                lines += _sae(run / name, lost.cfg, run / HALVING)
    except StoreError as error:
        lines.append(str(error))
    return lines


def _sae(folder: Path, cfg: str, record: Path) -> list[str]:
    """List the problems of an SAE's two files; one is that the record names another SAE."""
    return _message_of(partial(of_run.check, folder, cfg, record)) or _message_of(
        partial(sparsify.check, folder)
    )


def _log(path: Path, expected: File) -> list[str]:
    """List the problems of the log up to the checkpoint. Lines after it are written again when the run goes
    on."""
    if not path.exists():
        return [f"{path}: file is missing. The same `saemill train` goes on without it."]
    with path.open("rb") as file:
        content = file.read(expected.bytes)
    if len(content) == expected.bytes and durable.hash_bytes(content) == expected.xxh3:
        return []
    return [
        f"{path} is damaged: its lines up to the checkpoint differ from their hash. Move it away; the same "
        "`saemill train` goes on without it."
    ]


def _message_of(check: Callable[[], object]) -> list[str]:
    """Return the message of the error that a check raises, if it does."""
    try:
        check()
    except StoreError as error:
        return [str(error)]
    return []

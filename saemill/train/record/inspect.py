"""Whether a run's folder is whole: every file of it that saemill wrote, against the records."""

from functools import partial
from pathlib import Path

from saemill.common import durable, records
from saemill.common.errors import StoreError
from saemill.common.records import File
from saemill.common.sae import of_run
from saemill.common.sae.formats import sparsify
from saemill.common.stores import runs
from saemill.common.stores.runs import ANEW, CHECKPOINT, CHECKPOINTS, CONFIG, FINISHED, HALVING, METRICS
from saemill.train.record import checkpoint

SAME = "The same `saemill train` writes it again."


def problems(run: Path) -> list[str]:
    """List each bad file of a run, finished or not, with what repairs it.

    Files of other tools (wandb's, TensorBoard's, a profile) are not looked at, nor is the assessment, which
    answers for itself.

    Args:
        run: its folder.
    """
    found = settings_problems(run)
    found += _finished(run) if runs.is_finished(run) else _unfinished(run)
    return list(dict.fromkeys(found))


def settings_problems(run: Path) -> list[str]:
    """List the problems of a run's two files of settings."""
    try:
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
    found = [f"{line}. {ANEW}" for line in records.problems(run, record.files)]
    for name, cfg in record.cfgs.items():
        found += _sae(run / name, cfg, run / FINISHED)
    return found


def _unfinished(run: Path) -> list[str]:
    """List the problems of a run that goes on: its checkpoint, the log up to it, and the SAEs stopped
    early."""
    found = stopped_problems(run)
    try:
        record = checkpoint.read(run)
    except StoreError as error:
        return [*found, str(error)]
    if record is not None:
        return [*found, *checkpoint.problems(run, record), *_log(run / METRICS, record.metrics)]
    if any(run.glob(f"{CHECKPOINTS}*")):
        found.append(f"{run / CHECKPOINT}: file is missing. The same `saemill train` begins anew.")
    return found


def stopped_problems(run: Path) -> list[str]:
    """List the problems of halving's record, and of the SAEs that it lists."""
    found = []
    try:
        for look in runs.looks(run):
            for name, lost in look.stopped.items():
                found += _sae(run / name, lost.cfg, run / HALVING)
    except StoreError as error:
        found.append(str(error))
    return found


def _sae(folder: Path, cfg: str, record: Path) -> list[str]:
    """List the problems of an SAE's two files; one is that the record names another SAE."""
    return _told(partial(of_run.check, folder, cfg, record)) or _told(partial(sparsify.check, folder))


def _log(path: Path, kept: File) -> list[str]:
    """List the problems of the log up to the checkpoint. Lines after it are written again when the run goes
    on."""
    if not path.exists():
        return [f"{path}: file is missing. The same `saemill train` goes on without it."]
    with path.open("rb") as file:
        content = file.read(kept.bytes)
    if len(content) == kept.bytes and durable.hash_bytes(content) == kept.xxh3:
        return []
    return [
        f"{path} is damaged: its lines up to the checkpoint differ from their hash. Move it away; the same "
        "`saemill train` goes on without it."
    ]


def _told(check: partial[None]) -> list[str]:
    """Return the message of the error that a check raises, if it does."""
    try:
        check()
    except StoreError as error:
        return [str(error)]
    return []

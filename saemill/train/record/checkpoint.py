"""Checkpoints: a folder of files, whole or absent, from which a run goes on bit by bit.

    checkpoint.json                          the step, and a hash of every file; it makes a folder count
    checkpoint-<step>/<variant>/<a>-<b>.pt   latents a to b of a variant, with their moments

Every process writes and hashes what it holds. Since the record says which latents are in which file,
another number of processes, spread in another way, finds its rows in them. A file is compared with its
hash before a tensor of it is used.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from saemill.common import durable, records
from saemill.common.errors import StoreError
from saemill.common.log import say
from saemill.common.records import Count, File, Hash, Positive, Record
from saemill.common.stores import runs
from saemill.common.stores.runs import ANEW, CHECKPOINT, CHECKPOINTS, VariantName
from saemill.common.world import Group
from saemill.train.learner.learner import Learner
from saemill.train.record.metrics import JsonlSink


class LatentsFile(Record):
    """A file: some latents of a variant."""

    variant: VariantName
    start: Count
    """The first latent."""
    stop: Positive
    """The one after the last."""
    bytes: Positive
    xxh3: Hash

    @property
    def path(self) -> Path:
        """Return the file's path below the checkpoint's folder."""
        return Path(self.variant) / f"{self.start}-{self.stop}.pt"


class Checkpoint(Record):
    """`checkpoint.json`."""

    format: Literal["saemill checkpoint 2"] = "saemill checkpoint 2"
    run: Hash
    step: Positive
    """Steps done."""
    seconds: float
    """Time spent in them, in seconds."""
    parts: tuple[LatentsFile, ...]
    metrics: File
    """The log as it was then; it may have grown since."""

    @property
    def folder(self) -> str:
        """Name of the files' folder."""
        return f"{CHECKPOINTS}{self.step}"


def save(
    folder: Path,
    run: str,
    step: int,
    learners: list[Learner],
    seconds: float,
    everyone: Group,
    log: JsonlSink | None,
) -> None:
    """Write the state after `step` steps: parameters, optimizers, dead counters, sums.

    The stream needs no state beyond `step`; the training step draws no random numbers.

    Args:
        folder: the run's folder.
        run: the hash that names it.
        step: the number of steps done.
        learners: this process's.
        seconds: time spent.
        everyone: all processes, which call it together.
        log: of the first process, which writes for all.

    Raises:
        DiskError: the disk is full; the checkpoint before counts.
    """
    checkpoint_folder = folder / f"{CHECKPOINTS}{step}"
    own_files = [
        _save_learner(checkpoint_folder, learner)
        for learner in learners
        if learner.backend.team.tokens.rank == 0
    ]
    # The record follows the last file.
    files = [file for process_files in everyone.all_gather_objects(own_files) for file in process_files]
    if log is not None:
        record = Checkpoint(run=run, step=step, seconds=seconds, parts=tuple(files), metrics=log.synced())
        records.write(folder / CHECKPOINT, record)
        _remove_others(folder, record.folder)


def _save_learner(checkpoint_folder: Path, learner: Learner) -> LatentsFile:
    rows, whole = learner.checkpoint_tensors()
    name, latents = learner.variant.name, learner.rows
    state = {
        "variant": name,
        "start": latents.start,
        "stop": latents.stop,
        "rows": rows,
        "whole": whole,
        "n_steps": learner.optimizer.n_steps,
        "frozen": learner.frozen,
    }
    path = checkpoint_folder / name / f"{latents.start}-{latents.stop}.pt"
    n_bytes = sum(tensor.nbytes for tensor in (*rows, *whole))
    with durable.replacing(path, n_bytes) as partial:
        with partial.open("wb") as file:  # torch's own opening of a path hides why writing fails
            torch.save(state, file)
        size, xxh3 = partial.stat().st_size, durable.hash_file(partial)
    return LatentsFile(variant=name, start=latents.start, stop=latents.stop, bytes=size, xxh3=xxh3)


def load(folder: Path, learners: list[Learner], everyone: Group) -> Checkpoint | None:
    """Load the last state into the learners, whose copies are to be refreshed then.

    Returns: its record; none where there is no checkpoint.

    Raises:
        StoreError: a file is missing or damaged, or the checkpoint is another run's.
    """
    # One process reads for all: what the others see of a network's file system may be older.
    record = everyone.first(lambda: read(folder))
    if record is None:
        return None
    for learner in learners:
        _load_learner(folder / record.folder, record, learner)
    return record


def read(folder: Path) -> Checkpoint | None:
    """Read the record of a run's checkpoint; None where there is none.

    Raises:
        StoreError: it is damaged, or of another run.
    """
    if not (folder / CHECKPOINT).exists():
        return None
    record = records.read(folder / CHECKPOINT, Checkpoint, ANEW)
    runs.check_run(folder / CHECKPOINT, record.run, folder, ANEW)
    return record


def steps_done(folder: Path, everyone: Group) -> int:
    """Read how many steps a run's checkpoint is after; 0 where there is none. All processes call it together.

    Raises:
        StoreError: as `read`.
    """
    record = everyone.first(lambda: read(folder))
    return 0 if record is None else record.step


def problems(folder: Path, record: Checkpoint) -> Iterator[str]:
    """List each bad file of a checkpoint."""
    for entry in record.parts:
        file = File(path=str(entry.path), bytes=entry.bytes, xxh3=entry.xxh3)
        for line in records.problems(folder / record.folder, [file]):
            yield f"{line}. {ANEW}"


def _load_learner(checkpoint_folder: Path, record: Checkpoint, learner: Learner) -> None:
    own, missing = learner.rows, learner.rows.stop - learner.rows.start
    rows, whole = learner.checkpoint_tensors()
    for entry in record.parts:
        first, last = max(entry.start, own.start), min(entry.stop, own.stop)
        if entry.variant != learner.variant.name or first >= last:
            continue
        file = checkpoint_folder / entry.path
        state = _read(file, entry)
        _copy(
            [tensor[first - own.start : last - own.start] for tensor in rows],
            [tensor[first - entry.start : last - entry.start] for tensor in state["rows"]],
            file,
        )
        _copy(whole, state["whole"], file)
        learner.optimizer.n_steps, learner.frozen = state["n_steps"], state["frozen"]
        missing -= last - first
    if missing:
        raise StoreError(f"{missing:,} latents are missing in the checkpoint {checkpoint_folder}. {ANEW}")


def _read(file: Path, entry: LatentsFile) -> dict[str, Any]:
    """Load a file whose content is as it was written; torch itself does not check mapped bytes."""
    if not file.is_file():
        raise StoreError(f"{file}: file is missing. {ANEW}")
    if file.stat().st_size != entry.bytes or durable.hash_file(file) != entry.xxh3:
        raise StoreError(f"{file} is damaged: its content differs from its hash. {ANEW}")
    state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if (state.get("variant"), state.get("start"), state.get("stop")) != (
        entry.variant,
        entry.start,
        entry.stop,
    ):
        raise StoreError(f"{file} holds other latents than {CHECKPOINT} says. {ANEW}")
    return state


def _copy(into: list[Tensor], saved: list[Tensor], file: Path) -> None:
    layout, saved_layout = ([(x.shape, x.dtype) for x in tensors] for tensors in (into, saved))
    if layout != saved_layout:
        raise StoreError(f"the checkpoint {file} was written by another version of saemill. {ANEW}")
    for tensor, saved_tensor in zip(into, saved, strict=True):
        tensor.copy_(saved_tensor)


def tidy(folder: Path) -> None:
    """Remove what a crash left of a checkpoint without a record."""
    record = read(folder)
    if record is None and any(folder.glob(f"{CHECKPOINTS}*")):
        say(
            f"{folder} has no {CHECKPOINT}: what a crash left of a checkpoint is removed, the run begins anew"
        )
    _remove_others(folder, record.folder if record else None)


def remove(folder: Path) -> None:
    """Remove all checkpoints of a run."""
    (folder / CHECKPOINT).unlink(missing_ok=True)
    _remove_others(folder, None)


def _remove_others(folder: Path, current: str | None) -> None:
    for other in folder.glob(f"{CHECKPOINTS}*"):
        if other.name != current:
            shutil.rmtree(other)

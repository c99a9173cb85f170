"""Checkpoints: a folder of files, whole or absent, from which a run goes on bit by bit.

    checkpoint.json                          the step; it alone makes a folder count
    checkpoint-<step>/<variant>/<a>-<b>.pt   latents a to b of a variant, with their moments

Every process writes what it holds. Since a file says which latents are in it, another number of
processes, spread in another way, finds its rows in them.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saemill.common import durable
from saemill.common.errors import StoreError
from saemill.common.world import Group
from saemill.train.bank import Bank

RECORD = "checkpoint.json"
ANEW = "Start anew with --no-resume."


def save(folder: Path, step: int, banks: list[Bank], seconds: float, everyone: Group) -> None:
    """Write the state after `step` steps: parameters, optimizers, dead counters, sums.

    The stream needs no state beyond `step`; the training step draws no random numbers.
    """
    there = folder / f"checkpoint-{step}"
    for bank in banks:
        if bank.team.tokens.rank == 0:
            for i in range(len(bank.variants)):
                _save_variant(there, bank, i)
    everyone.meet()  # the record follows the last file
    if everyone.rank == 0:
        durable.write_json(folder / RECORD, {"step": step, "seconds": seconds})
        _remove_others(folder, there)


def _save_variant(there: Path, bank: Bank, i: int) -> None:
    rows, whole = bank.kept(i)
    state = {
        "rows": rows,
        "whole": whole,
        "n_steps": bank.optimizers[i].n_steps,
        "frozen": bank.frozen[i],
    }
    name = f"{bank.rows.start}-{bank.rows.stop}.pt"
    with durable.replacing(there / bank.variants[i].name / name) as partial:
        torch.save(state, partial)


def load(folder: Path, banks: list[Bank], everyone: Group) -> tuple[int, float] | None:
    """Load the last state into the banks.

    Returns: the steps done and the seconds they took; none where there is no checkpoint.

    Raises:
        StoreError: a file is missing or cannot be read.
    """
    # One process looks for all: what the others see of a network's file system may be older.
    record = everyone.first(lambda: _record(folder) if (folder / RECORD).exists() else None)
    if record is None:
        return None
    for bank in banks:
        for i, variant in enumerate(bank.variants):
            _load_variant(folder / f"checkpoint-{record['step']}" / variant.name, bank, i)
        bank.refresh()
    return record["step"], record["seconds"]


def _record(folder: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = durable.read_json(folder / RECORD)
    except StoreError as error:
        raise StoreError(f"{error}. {ANEW}") from error
    return record


def _load_variant(there: Path, bank: Bank, i: int) -> None:
    mine, missing = bank.rows, bank.rows.stop - bank.rows.start
    rows, whole = bank.kept(i)
    for file in there.glob("*-*.pt"):
        start, stop = map(int, file.stem.split("-"))
        first, last = max(start, mine.start), min(stop, mine.stop)
        if first >= last:
            continue
        state = _read(file)
        _copy(
            [tensor[first - mine.start : last - mine.start] for tensor in rows],
            [tensor[first - start : last - start] for tensor in state["rows"]],
            file,
        )
        _copy(whole, state["whole"], file)
        bank.optimizers[i].n_steps, bank.frozen[i] = state["n_steps"], state["frozen"]
        missing -= last - first
    if missing:
        raise StoreError(f"{missing:,} latents are missing in the checkpoint {there}. {ANEW}")


def _read(file: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise StoreError(f"cannot read the checkpoint {file}: {error}. {ANEW}") from error
    return state


def _copy(into: list[Tensor], saved: list[Tensor], file: Path) -> None:
    mine, theirs = ([(tensor.shape, tensor.dtype) for tensor in kept] for kept in (into, saved))
    if mine != theirs:
        raise StoreError(f"the checkpoint {file} was written by another version of saemill. {ANEW}")
    for tensor, kept in zip(into, saved, strict=True):
        tensor.copy_(kept)


def tidy(folder: Path) -> None:
    """Remove what a crash left of a checkpoint without a record."""
    there = (folder / RECORD).exists()
    _remove_others(folder, folder / f"checkpoint-{_record(folder)['step']}" if there else None)


def remove(folder: Path) -> None:
    """Remove all checkpoints of a run."""
    (folder / RECORD).unlink(missing_ok=True)
    _remove_others(folder, None)


def _remove_others(folder: Path, kept: Path | None) -> None:
    for other in folder.glob("checkpoint-*"):
        if other != kept:
            shutil.rmtree(other)

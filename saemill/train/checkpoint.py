"""Checkpoints: one file, whole or absent, from which a run goes on bit by bit."""

from pathlib import Path
from typing import Any

import torch

from saemill.common import durable
from saemill.common.errors import StoreError
from saemill.train.bank import Bank


def save(path: Path, step: int, banks: list[Bank], seconds: float) -> None:
    """Write the state after `step` steps: parameters, optimizers, dead counters, sums, RNG.

    The stream needs no state beyond `step`. The training step draws no random numbers; torch's
    generator is kept so that this stays true of whatever is added to it.
    """
    state = {
        "step": step,
        "seconds": seconds,
        "banks": [bank.state() for bank in banks],
        "torch_rng": torch.get_rng_state(),
    }
    with durable.replacing(path) as partial:
        torch.save(state, partial)


def load(path: Path, banks: list[Bank], device: torch.device) -> dict[str, Any]:
    """Load the state into the banks.

    Returns: the rest of it: `step`, `seconds`.

    Raises:
        StoreError: the file cannot be read.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise StoreError(
            f"cannot read the checkpoint {path}: {error}. Start anew with --no-resume."
        ) from error
    for bank, saved in zip(banks, state.pop("banks"), strict=True):
        bank.load_state(saved)
    torch.set_rng_state(state["torch_rng"].cpu())
    return state

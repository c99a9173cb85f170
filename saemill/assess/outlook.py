"""What an assessment will go over, and what it needs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from saemill.assess.config import AssessConfig
from saemill.assess.evalset import CHUNK_TOKENS
from saemill.assess.firing import EVERY, FIRING_BYTES
from saemill.assess.reconstruction import ROWS_AT_ONCE
from saemill.assess.report.shards import LATENT_BYTES, n_files
from saemill.common.log import counted
from saemill.common.outlook import Outlook, process_bytes

COPIES = 4
"""Times that pre-activations of some rows are in memory: chosen, sorted, and as codes."""
ROW_BYTES = 12
"""Bytes of a number of the activations in hand: as it is stored, and in float64."""
EXAMPLE_BYTES = 8
"""Bytes of a number of the examples: as it is, and standardised."""
CODE_BYTES = 24
"""Bytes of a latent that is active on an example: sorted by latent, and before."""
LOSS_COPIES = 6
"""Times that log probabilities of a batch are in memory: with and without the SAE, and their divergence."""


class Dictionary(NamedTuple):
    """An SAE that is measured."""

    site: str
    """Site that it reconstructs or predicts."""
    d: int
    """Width of it."""
    n_latents: int
    l0: int
    """Active latents per token that it is meant to have."""

    @property
    def bytes(self) -> int:
        """Bytes of its weights, float32."""
        return 4 * (2 * self.d + 1) * self.n_latents


class Model(NamedTuple):
    """The model that SAEs are spliced into."""

    bytes: int
    """Bytes of its weights."""
    n_ids: int
    """Size of its vocabulary."""
    batch_tokens: int
    """Tokens of a forward pass."""


class Amounts(NamedTuple):
    """Tokens of each pass."""

    reconstructed: int
    spliced: int
    """0 where no model is run."""
    searched: int
    """Tokens among which contexts are looked for."""
    probed: int = 0
    """Examples that probes are fitted to and tried on at once."""


def outlook_of(
    config: AssessConfig,
    dictionaries: Sequence[Dictionary],
    amounts: Amounts,
    device: torch.device,
    model: Model | None = None,
    unit: str = "token",
) -> Outlook:
    """Work out what is measured on how much, and how much memory it takes.

    Args:
        config: of the stage.
        dictionaries: the SAEs of the run.
        amounts: tokens of each pass.
        device: that it runs on.
        model: what runs; None without.
        unit: what the store holds.
    """
    beside = _beside(config, dictionaries)
    widest = max(each.n_latents for each in dictionaries)
    baselines = {(each.site, each.l0): Dictionary(*each[:2], widest, each.l0) for each in dictionaries}
    on_device = {
        "model": model.bytes if model else 0,
        "losses": LOSS_COPIES * 4 * model.n_ids * min(amounts.spliced, model.batch_tokens) if model else 0,
        "SAEs": sum(each.bytes for each in dictionaries),
        "baselines": sum(each.bytes for each in baselines.values()),
        "scratch": COPIES * 4 * min(ROWS_AT_ONCE, amounts.reconstructed) * widest,
    }
    memory = _in_memory(config, dictionaries, amounts)
    on_gpu = device.type == "cuda"
    return Outlook(
        stage="assess",
        what=(
            f"{counted(len(dictionaries), 'SAE')} and {counted(len(baselines), 'pair')} of baselines on "
            f"{device}: {', '.join(_passes(config, amounts, unit))}",
        ),
        folder=config.folder,
        amounts={
            "max_tokens": amounts.reconstructed,
            "model_tokens": amounts.spliced or config.model_tokens,
            "context_tokens": amounts.searched,
        },
        unit=unit,
        disk={"latents beside the report": beside * LATENT_BYTES[unit]} if beside else {},
        n_files=n_files(beside) if beside else 0,
        memory=memory | ({} if on_gpu else on_device),
        gpu=on_device if on_gpu else {},
    )


def _in_memory(config: AssessConfig, dictionaries: Sequence[Dictionary], amounts: Amounts) -> dict[str, int]:
    """Estimate the bytes of what is in the process's memory on any device."""
    d_of_all = sum({each.site: each.d for each in dictionaries}.values())
    memory = {
        "libraries": process_bytes(),
        "activations": min(CHUNK_TOKENS, amounts.searched) * d_of_all * ROW_BYTES,
        "firings": _firing_bytes(config, dictionaries, amounts.searched),
    }
    if amounts.probed:
        most_active = max(each.l0 for each in dictionaries)
        memory["examples"] = amounts.probed * (EXAMPLE_BYTES * d_of_all + CODE_BYTES * most_active)
    return memory


def _passes(config: AssessConfig, amounts: Amounts, unit: str) -> list[str]:
    """Say what is measured on how much."""
    shows = config.n_latents > 0 or bool(config.latents)
    return [
        f"reconstructions of {counted(amounts.reconstructed, unit)}",
        *([f"losses on {counted(amounts.spliced, unit)}"] if amounts.spliced else []),
        *([f"contexts among {counted(amounts.searched, unit)}"] if shows else []),
        *([f"probes on {counted(amounts.probed, 'example')}"] if amounts.probed else []),
    ]


def _beside(config: AssessConfig, dictionaries: Sequence[Dictionary]) -> int:
    """Count the latents that will be written beside the page, of the widest SAE that may be shown."""
    if not config.n_latents and not config.latents:
        return 0
    return max((n for each in dictionaries if (n := each.n_latents) <= config.most_beside), default=0)


def _firing_bytes(config: AssessConfig, dictionaries: Sequence[Dictionary], n_tokens: int) -> int:
    """Work out the memory of the firings of the latents that are shown, and of all in some rows."""
    n_shown = config.n_latents + len(config.latents)
    if not n_shown:
        return 0
    shares = [
        1.0 if each.n_latents <= config.most_beside else min(1.0, n_shown / each.n_latents)
        for each in dictionaries
    ]
    firings = [
        n_tokens * each.l0 * (share + 1 / EVERY) for each, share in zip(dictionaries, shares, strict=True)
    ]
    return round(max(firings) * FIRING_BYTES)

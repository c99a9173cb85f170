"""What training will do and needs: steps, SAEs, memory; what cannot fit is refused, with what would."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from saemill.common.errors import ConfigError
from saemill.common.log import counted
from saemill.common.outlook import Outlook, free_bytes, machine_bytes, process_bytes, shown
from saemill.common.stores.forms.packing import BLOCK_TOKENS
from saemill.common.stores.statistics import warnings
from saemill.train.config import TrainConfig
from saemill.train.stream.loader import Loader
from saemill.train.stream.whole_rows import WholeRows
from saemill.train.sweep.placement import Placement
from saemill.train.sweep.sizes import scratch_bytes, sizes
from saemill.train.sweep.variant import Variant

MOST_DEAD_AFTER_TOKENS = 10_000_000
FEW_STEPS = 100
"""Steps below which the plan says that more may help."""
WINDOWS = 2
"""Windows of the stream in memory at each site, beside the one that is being shuffled."""
WINDOW_NAME = "windows of the stream"
FILES_OF_RUN, FILES_PER_SAE = 5, 2
"""identity, settings, metrics, the record of the end and the lock; cfg.json and the weights of each SAE."""


class Stream(NamedTuple):
    """What is trained on, as far as it decides steps and memory."""

    widths: Mapping[str, int]
    """D of each site, joined ones as one."""
    row_bytes: Mapping[str, int]
    """Bytes of a token's stored activation at each site."""
    n_tokens: int
    """Tokens of the store."""
    epoch_tokens: int
    """Tokens that are trained on in an epoch."""
    unit: str = "token"


class Computed(NamedTuple):
    """What computes the steps."""

    device: torch.device
    kernels: str
    """torch, numba or triton."""
    dtype: torch.dtype
    """Of the encoder's product."""


def dead_after_tokens(config: TrainConfig, n_steps: int) -> int:
    """Choose the tokens without firing after which a latent is dead."""
    return config.dead_after_tokens or min(MOST_DEAD_AFTER_TOKENS, n_steps * config.step_tokens // 10)


def outlook_of(
    config: TrainConfig,
    variants: Sequence[Variant],
    placement: Placement,
    stream: Stream,
    n_steps: int,
    by: Computed,
    held_out: str = "",
) -> Outlook:
    """Work out what a run does and needs.

    Args:
        config: of the run.
        variants: all of it.
        placement: on processes; the needs are those of the one that has most to do.
        stream: what is trained on.
        n_steps: of the run.
        by: what computes it.
        held_out: a phrase on held-out rows.
    """
    n_tokens, unit = n_steps * config.step_tokens, stream.unit
    if by.kernels == "triton" and all(variant.n_layers > 1 for variant in variants):
        by = by._replace(kernels="torch")  # whatever steps others
    precision = str(by.dtype).removeprefix("torch.")
    what = [
        f"{counted(len(variants), 'variant')} on {by.device}, {placement.describe()}; products in "
        f"{precision} by {by.kernels}; {counted(n_steps, 'step')}, {counted(n_tokens, unit)} "
        f"({n_tokens / stream.epoch_tokens:.2f} epochs of {stream.epoch_tokens:,}); dead after "
        f"{counted(dead_after_tokens(config, n_steps), unit)}{held_out}"
    ]
    if n_steps < FEW_STEPS:
        what.append(f"few steps to learn in ({n_steps}): more epochs or a smaller batch may help much")
    own = max(placement.teams, key=lambda team: sum(_kept(team, stream, by).values()))
    kept = {name: n // placement.latent_ranks for name, n in _kept(own, stream, by).items()}
    batch = _batch(config, own, stream) | {"scratch": _scratch(config, own, stream, by)}
    libraries = {"libraries": process_bytes()}
    windows = {WINDOW_NAME: _windows(config, own, stream)}
    on_gpu = by.device.type != "cpu"
    return Outlook(
        stage="train",
        what=(*what, *_per_sae(own, stream, by)),
        folder=config.out,
        amounts={"max_tokens": n_tokens},
        least=config.step_tokens,
        unit=unit,
        disk=_disk(config, variants, stream),
        n_files=FILES_OF_RUN + (1 + config.n_checkpoints) * FILES_PER_SAE * len(variants),
        memory=libraries | windows | ({} if on_gpu else kept | batch),
        gpu=kept | batch if on_gpu else {},
    )


def outlook_of_run(
    config: TrainConfig,
    loader: Loader | WholeRows,
    placement: Placement,
    n_steps: int,
    by: Computed,
    measured: str,
    is_done: bool,
) -> Outlook:
    """Work out the same of a run on activations that are there, with what may go wrong.

    Args:
        config: of the run.
        loader: of its stream.
        placement: of all variants.
        n_steps: of the run.
        by: what computes it.
        measured: a phrase on when SAEs are measured.
        is_done: whether it is finished already.

    Raises:
        ConfigError: the disk or the memory cannot hold it.
    """
    store, sites = loader.store, loader.every_site
    stream = Stream(
        widths={name: site.width for name, site in sites.items()},
        row_bytes={name: site.columns * site.stored.itemsize for name, site in sites.items()},
        n_tokens=store.n_tokens,
        epoch_tokens=loader.epoch_tokens,
        unit=store.text.unit,
    )
    n_held_out = counted(store.text.manifest.n_held_out_rows, store.text.row)
    held_out = f"; {n_held_out} held out{measured}"
    outlook = outlook_of(config, placement.variants, placement, stream, n_steps, by, held_out)
    if not is_done:
        check_room(config, outlook, len(placement.variants), stream.n_tokens)
    notes = [] if config.follow else notes_on(loader)  # else known when the first shards are there
    return replace(outlook, what=(*outlook.what, *notes), is_done=is_done)


def notes_on(loader: Loader | WholeRows) -> list[str]:
    """Write sentences on the rows that are trained on."""
    notes = [*loader.rows.describe()]
    for name, array in loader.rows.sites.items():
        notes += warnings(name, loader.rows.statistics(name), array.dtype, loader.store.text.unit)
    return notes


def _widths(variant: Variant, stream: Stream) -> list[int]:
    return [stream.widths[site] for site in variant.sites]


def _sites(variants: Sequence[Variant], stream: Stream) -> dict[str, int]:
    """List the widths of the sites that some variants are trained on."""
    return {site: stream.widths[site] for variant in variants for site in variant.sites}


def _kept(variants: Sequence[Variant], stream: Stream, by: Computed) -> dict[str, int]:
    """Sum up what SAEs keep from step to step, by what it is."""
    total: Counter[str] = Counter()
    for variant in variants:
        total.update(sizes(variant, _widths(variant, stream), by.kernels, by.dtype).describe())
    gradients = [sizes(v, _widths(v, stream), by.kernels, by.dtype).gradients for v in variants]
    return dict(total) | ({"gradients": max(gradients)} if any(gradients) else {})  # of one SAE at a time


def _per_sae(variants: Sequence[Variant], stream: Stream, by: Computed) -> list[str]:
    """Describe the bytes of one SAE of each kind."""
    kinds = Counter(
        (f"{v.architecture} of {v.num_latents:,} latents", sizes(v, _widths(v, stream), by.kernels, by.dtype))
        for v in variants
    )
    return [
        f"  {n} × {name}: {shown(sum(each))} each ("
        + ", ".join(f"{what} {shown(n_bytes)}" for what, n_bytes in each.describe().items())
        + ")"
        for (name, each), n in kinds.items()
    ]


def _windows(config: TrainConfig, variants: Sequence[Variant], stream: Stream) -> int:
    """Compute the bytes of the windows of the stream: two of each site."""
    n_rows = min(config.buffer_tokens, stream.n_tokens) * stream.epoch_tokens // stream.n_tokens
    row_bytes = [stream.row_bytes[site] for site in _sites(variants, stream)]
    return WINDOWS * sum(row_bytes) * n_rows


def _batch(config: TrainConfig, variants: Sequence[Variant], stream: Stream) -> dict[str, int]:
    """Compute the bytes of a batch: as it is stored, in hand and the next one; and of one site in float32 and
    in the product's type."""
    sites = _sites(variants, stream)
    stored = sum(stream.row_bytes[site] for site in sites)
    return {"batches": config.step_tokens * (2 * stored + 6 * max(sites.values()))}


def _scratch(config: TrainConfig, variants: Sequence[Variant], stream: Stream, by: Computed) -> int:
    n_threads, kind = torch.get_num_threads(), by.device.type
    return scratch_bytes(variants, stream.widths, config.step_tokens, by.kernels, kind, n_threads)


def _disk(config: TrainConfig, variants: Sequence[Variant], stream: Stream) -> dict[str, int]:
    """Compute the bytes of the SAEs, and of two checkpoints, as one is written before the other goes."""
    each = [sizes(v, _widths(v, stream), "torch", torch.float32) for v in variants]
    saes, checkpoint = (
        sum(size.weights for size in each),
        sum(size.weights + size.moments + size.averages + size.counters for size in each),
    )
    return {"SAEs": saes * (1 + config.n_checkpoints), "two checkpoints, meanwhile": 2 * checkpoint}


def check_room(config: TrainConfig, outlook: Outlook, n_variants: int, store_tokens: int) -> None:
    """Refuse a run that the disk or the memory cannot hold, and say what may help.

    Args:
        config: of the run.
        outlook: of it.
        n_variants: all of it.
        store_tokens: tokens of the store.

    Raises:
        ConfigError: with the bytes that are needed and those that are there.
    """
    assert outlook.folder is not None
    free, there = free_bytes(outlook.folder), machine_bytes()
    if outlook.disk_bytes > free:
        raise ConfigError(
            f"{shown(outlook.disk_bytes)} are needed in {outlook.folder} for SAEs and checkpoints, "
            f"{shown(free)} are free; choose another disk, fewer SAEs, or --optimizer-state bf16"
        )
    if outlook.memory_bytes > there:
        buffer = min(config.buffer_tokens, store_tokens)
        may_help = _repairs(config, outlook, n_variants, buffer, outlook.memory_bytes - there)
        raise ConfigError(
            f"{shown(outlook.memory_bytes)} of memory are needed, this machine has {shown(there)}; "
            f"{' or '.join(may_help) or 'use a smaller buffer and fewer variants together'}"
        )


def _repairs(
    config: TrainConfig, outlook: Outlook, n_variants: int, buffer_tokens: int, excess_bytes: int
) -> list[str]:
    """List what would bring the memory down by so many bytes, each by itself.

    Args:
        config: of the run.
        outlook: of it.
        n_variants: all of it.
        buffer_tokens: that are in a window now.
        excess_bytes: that are too many.
    """
    found, windows = [], outlook.memory.get(WINDOW_NAME, 0)
    if windows > excess_bytes:
        fewer = int(buffer_tokens * (1 - excess_bytes / windows)) // BLOCK_TOKENS * BLOCK_TOKENS
        found += [f"say --buffer-tokens {fewer}"] if fewer else []
    kept = sum(outlook.memory.get(name, 0) for name in ("weights", "moments", "copies", "averages"))
    if n_variants > 1 and kept > excess_bytes:
        most = int(n_variants * (1 - excess_bytes / kept))
        found += [f"train at most {most} of the {n_variants} variants at a time"] if most else []
    if config.optimizer_state == "fp32" and outlook.memory.get("moments", 0) / 2 > excess_bytes:
        found.append("say --optimizer-state bf16")
    return found

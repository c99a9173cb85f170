"""From variants to a trainer: which process trains which, the backend, and the learners in their banks."""

from threading import Event
from typing import TYPE_CHECKING

import torch

from saemill.common.errors import ConfigError
from saemill.common.stores.activations import ActivationStore
from saemill.common.world import Group
from saemill.train.backends.base import Backend
from saemill.train.backends.choose import choose_kernels, choose_product_dtype, kernels_of, make_backend
from saemill.train.backends.plain import Plain
from saemill.train.config import TrainConfig
from saemill.train.learner.bank import Bank
from saemill.train.learner.learner import Learner
from saemill.train.losses import IN_MODEL
from saemill.train.outlook import dead_after_tokens
from saemill.train.record.checkpoint import steps_done
from saemill.train.stream.feed import Feed
from saemill.train.stream.loader import Loader
from saemill.train.stream.scaling import scaling_of
from saemill.train.stream.whole_rows import WholeRows
from saemill.train.sweep.placement import Placement, allowed_latent_ranks, choose
from saemill.train.sweep.schedule import Schedule
from saemill.train.sweep.variant import Variant
from saemill.train.trainer import Trainer

if TYPE_CHECKING:
    from saemill.train.objective.model import ModelLoss

SAMPLE_TOKENS = 8192
"""Tokens from which the initial gain and the geometric median are computed, whatever the batch size."""


def place(
    config: TrainConfig,
    store: ActivationStore,
    variants: list[Variant],
    everyone: Group,
    device: torch.device,
    idle_allowed: bool = False,
) -> Placement:
    """Place the variants on the processes."""
    widths = {site: store.site(site).width for variant in variants for site in variant.sites}
    if config.runs_model and (config.data_ranks or 1) > 1:
        raise ConfigError(
            f"data_ranks {config.data_ranks}: a loss of the model needs whole rows in one process; "
            "leave it out"
        )
    if config.data_ranks and config.step_tokens < config.data_ranks:
        raise ConfigError(
            f"{config.step_tokens} tokens per step cannot be shared by data_ranks {config.data_ranks}"
        )
    on_gpu = device.type == "cuda"
    memory_bytes = torch.cuda.get_device_properties(device).total_memory if on_gpu else None
    return choose(
        variants,
        widths,
        everyone.size,
        config.data_ranks,
        allowed_latent_ranks(config.latent_ranks, variants, kernels_of(config.kernels, device), widths),
        idle_allowed=idle_allowed,
        memory_bytes=memory_bytes,
    )


def build(
    config: TrainConfig,
    loader: Loader | WholeRows,
    schedule: Schedule,
    placement: Placement,
    everyone: Group,
    device: torch.device,
    stop: Event,
    above: "ModelLoss | None",
) -> Trainer:
    """Make the trainer of a placement: backend, banks and learners of this process."""
    team = placement.team_of(everyone)
    variants = list(placement.teams[everyone.rank // placement.team_size])
    # Sums of bf16 products stay in float32, as on a CPU.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    dead_after = dead_after_tokens(config, schedule.n_steps)
    dtype = choose_product_dtype(config.precision, device)
    backend = make_backend(choose_kernels(config.kernels, device), dtype, team)
    loader.restrict(list(dict.fromkeys(site for variant in variants for site in variant.sites)))
    step = steps_done(config.out, everyone)
    banks = _banks(loader, variants, backend, dead_after, device, above, step)
    return Trainer(
        loader=loader,
        feed=Feed(loader, device),
        banks=banks,
        names=[variant.name for variant in placement.variants],
        schedule=schedule,
        log_every=config.log_every,
        save_every=config.save_every,
        folder=config.out,
        device=device,
        stop=stop,
        everyone=everyone,
        team=team,
        profile=config.profile,
    )


def _banks(
    loader: Loader | WholeRows,
    variants: list[Variant],
    backend: Backend,
    dead_after: int,
    device: torch.device,
    above: "ModelLoss | None",
    step: int,
) -> list[Bank]:
    """Make the learners of this process, in a bank for each site, and for each pair of sites. Those that go
    on after a step are filled in from the checkpoint."""
    stretch = loader.sample(SAMPLE_TOKENS, step * loader.batch_tokens)
    scalings = {site: scaling_of(loader.rows, site, device) for site in loader.sites}
    sample = {site: scalings[site].standardise(rows.to(device)) for site, rows in stretch.items()}
    banks = []
    for sites in dict.fromkeys(variant.sites for variant in variants):
        site, target = sites[0], sites[1] if len(sites) > 1 else None
        target_sample = None if target is None else (scalings[target], sample[target])
        here = [variant for variant in variants if variant.sites == sites]
        by_torch = backend.name == "triton" and here[0].n_layers > 1
        own = Plain(backend.dtype, backend.team) if by_torch else backend
        learners = [
            Learner(variant, scalings[site], own, sample[site], dead_after, target_sample) for variant in here
        ]
        target_units = None if target is None else (target, scalings[target])
        in_model = above if any(learner.variant.loss in IN_MODEL for learner in learners) else None
        banks.append(Bank(site, scalings[site], own, learners, target_units, in_model))
    return banks

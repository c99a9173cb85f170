"""What wandb gets of a run: where it belongs, and each variant's config."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any

from saemill.common.config import plain
from saemill.common.setting import axes
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.tokens import TokenStore
from saemill.common.tracking.process import Wandb, write_record
from saemill.train.config import TrainConfig
from saemill.train.sweep.variant import Variant
from saemill.train.sweep.variants import describe
from saemill.train.trainer import Trainer

OF_VARIANTS = (*axes(TrainConfig), "variants")
"""Settings that are lists for the run, and one value in each variant."""
BYTES_PER_WEIGHT = 4


def follow(config: TrainConfig, trainer: Trainer, variants: Sequence[Variant], resources: ExitStack) -> None:
    """Start the process that logs to wandb; it ends with `resources`, when the SAEs are on disk."""
    store = trainer.loader.store
    widths = {variant.name: store.site(variant.site).width for variant in variants}
    folder = config.out.absolute().name
    group = config.run_name or folder
    settings = {
        "project": config.wandb_project or os.environ.get("WANDB_PROJECT") or "saemill",
        "entity": config.wandb_entity or os.environ.get("WANDB_ENTITY"),
        "group": group,
        "prefix": "" if group == folder else f"{folder}/",
        "log_frequency": config.wandb_log_frequency or config.log_every,
        "artifacts": config.wandb_artifacts,
    }
    shared = {**_shared(config, trainer), **_store(store), "versions": _versions()}
    configs = {v.name: {**shared, **describe(v), **_shape(v, store, widths[v.name])} for v in variants}
    write_record(config.out, settings, configs)
    n_weights = sum(
        variant.num_latents * sum(store.site(site).width for site in (variant.sites[0], variant.sites[-1]))
        for variant in variants
    )
    n_bytes = BYTES_PER_WEIGHT * n_weights if config.wandb_artifacts else 0
    resources.enter_context(Wandb(config.out, artifact_bytes=n_bytes))


def _shared(config: TrainConfig, trainer: Trainer) -> dict[str, Any]:
    """List the run's settings, with what was left open as it was decided."""
    settings = {key: value for key, value in config.identity().items() if key not in OF_VARIANTS}
    schedule, learner = trainer.schedule, trainer.learners[0]
    return settings | {
        "mask": settings["mask"] | plain(trainer.loader.mask),
        "n_long_tokens": trainer.loader.n_long(0),
        "n_steps": schedule.n_steps,
        "n_tokens": schedule.n_steps * config.step_tokens,
        "step_tokens": config.step_tokens,
        "warmup_steps": schedule.warmup_steps,
        "lr_end": schedule.end,
        "lr_cycles": schedule.n_cycles,
        "lr_decay_fraction": config.decay_fraction,
        "dead_after_tokens": learner.dead_after_tokens,
        "precision": str(learner.backend.dtype).removeprefix("torch."),
        "device": trainer.device.type,
        "n_processes": trainer.everyone.size,
        "epoch_tokens": trainer.loader.epoch_tokens,
    }


def _store(store: ActivationStore) -> dict[str, Any]:
    """Describe what was trained on."""
    settings = store.settings
    return {
        "model": settings.model,
        "model_revision": settings.revision,
        "dataset": store.text.manifest.source.name,
        "tokenizer": store.tokens.tokenizer.name if isinstance(store.text, TokenStore) else None,
        "ctx_len": store.ctx_len,
        "store": {
            "path": store.place,
            "dtype": settings.dtype,
            "model_dtype": settings.model_dtype,
            "n_tokens": store.n_tokens,
            "n_held_out_rows": store.text.manifest.n_held_out_rows,
            "fingerprint": store.fingerprint,
            "tokens_fingerprint": store.text.fingerprint,
            "model_fingerprint": settings.model_fingerprint,
        },
    }


def _shape(variant: Variant, store: ActivationStore, width: int) -> dict[str, Any]:
    return {
        "d_in": width,
        "expansion_factor": variant.num_latents / width,
        "site_variance": store.site(variant.sites[-1]).statistics.total_variance,
    }


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("saemill", "torch", "transformers")}

"""What a finished run leaves: a folder per SAE, and the record that makes the run finished."""

import resource
from importlib.metadata import version
from pathlib import Path
from typing import Any

from saemill.common import durable
from saemill.common.activations import ActivationStore
from saemill.common.config import plain
from saemill.common.log import counted, duration, say
from saemill.train import checkpoint
from saemill.train.trainer import Trainer
from saemill.train.variants import Variant, describe


def export(
    out: Path,
    variants: list[Variant],
    store: ActivationStore,
    trainer: Trainer,
    identity: dict[str, Any],
    stopped: dict[str, dict[str, Any]],
) -> list[Path]:
    """Write the SAEs, then the mark that the run is finished; the checkpoint is not needed then.

    Args:
        out: the run's folder.
        variants: all of the run.
        store: what they were trained on.
        trainer: at its end.
        identity: the settings that decided the result.
        stopped: variants stopped early, which are written already.

    Returns: the SAEs' folders, in the run's order.
    """
    everyone = trainer.everyone
    save_banks(out, trainer, store, set(trainer.names))
    diverged = {
        variant.name: step
        for bank in trainer.banks
        for variant, step in zip(bank.variants, bank.diverged_step_V.tolist(), strict=True)
        if step >= 0
    }
    peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    shared = everyone.share((diverged, peak_rss_bytes))  # every SAE is on disk when this returns
    every = {name: step for part, _ in shared for name, step in part.items()}
    finished = {
        "variants": [variant.name for variant in variants],
        "acts": str(store.path.absolute()),
        "steps": trainer.step,
        "tokens": trainer.step * trainer.loader.batch_tokens,
        "seconds": trainer.seconds,
        "peak_rss_bytes": max(peak for _, peak in shared),
        "diverged": {variant.name: every[variant.name] for variant in variants if variant.name in every},
        "stopped": stopped,
        "mask": identity["mask"] or plain(store.mask),
    }
    if everyone.rank == 0:
        durable.write_json(out / "finished.json", finished)
        checkpoint.remove(out)
    say(f"{out}: {counted(len(variants), 'SAE')}, trained in {duration(trainer.seconds)}")
    return [out / variant.name for variant in variants]


def save_banks(out: Path, trainer: Trainer, store: ActivationStore, names: set[str]) -> None:
    """Write the SAEs of these variants as they are now, each from its team's first process."""
    mask = trainer.loader.mask
    for bank in trainer.banks:
        for i, variant in enumerate(bank.variants):
            if variant.name not in names:
                continue
            step = int(bank.diverged_step_V[i])
            provenance = {
                "variant": describe(variant),
                "site": variant.site,
                "model": store.settings.model,
                "revision": store.settings.revision,
                **store.text.provenance(mask),
                "model_fingerprint": store.settings.model_fingerprint,
                "acts_fingerprint": store.fingerprint,
                "tokens_trained": trainer.step * trainer.loader.batch_tokens,
                "input_scale": bank.frame.scale,
                "diverged_at_step": step if step >= 0 else None,
                "versions": {name: version(name) for name in ("saemill", "torch")},
            }
            if sae := bank.export(i, provenance):
                sae.save(out / variant.name)

"""What a finished run leaves: a folder per SAE, and the record that makes the run finished."""

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from saemill.common import records
from saemill.common.log import counted, duration, say
from saemill.common.outlook import process_bytes
from saemill.common.records import File
from saemill.common.sae.formats import sparsify
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.joined import model_of
from saemill.common.stores.runs import FINISHED, HALVING, UNITS, Finished, Stopped
from saemill.train.record import checkpoint
from saemill.train.sweep.halving import Halving
from saemill.train.sweep.variant import Variant
from saemill.train.sweep.variants import describe
from saemill.train.trainer import Trainer


def export(
    out: Path,
    variants: list[Variant],
    store: ActivationStore,
    trainer: Trainer,
    halving: Halving,
) -> list[Path]:
    """Write the SAEs, then the mark that the run is finished; the checkpoint is not needed then.

    Args:
        out: the run's folder.
        variants: all of the run.
        store: what they were trained on.
        trainer: at its end.
        halving: with the variants that were stopped early, which are written already.

    Returns: the SAEs' folders, in the run's order.
    """
    names = [variant.name for variant in variants]
    own_cfgs = halving.cfgs | save_saes(out, trainer, store, set(trainer.names))
    finished = finished_of(trainer, names, own_cfgs, halving.stopped)
    if trainer.log is not None:
        others = (*([HALVING] if halving.past else []), *([UNITS] if (out / UNITS).exists() else []))
        files = (trainer.log.entry, *(File.of(out, name) for name in others))
        records.write(out / FINISHED, finished.model_copy(update={"files": files}))
        checkpoint.remove(out)
    say(f"{out}: {counted(len(variants), 'SAE')}, trained in {duration(trainer.seconds)}")
    return [out / variant.name for variant in variants]


def finished_of(
    trainer: Trainer, names: list[str], own_cfgs: dict[str, str], stopped: dict[str, Stopped]
) -> Finished:
    """Describe what a run has come to. All processes call it together, when they have written their SAEs; all
    SAEs are on disk when it returns.

    Args:
        trainer: as it is now.
        names: of the variants.
        own_cfgs: the checksums of the cfg.json of those that this process knows of, by variant.
        stopped: the variants that were stopped early.
    """
    own_steps = {
        learner.variant.name: step
        for learner in trainer.learners
        if (step := int(learner.diverged_step)) >= 0
    }
    store = trainer.loader.store
    peak_rss_bytes = process_bytes()
    shared = trainer.everyone.all_gather_objects((own_steps, own_cfgs, peak_rss_bytes))
    steps = {name: step for diverged, _, _ in shared for name, step in diverged.items()}
    cfgs = {name: cfg for _, written, _ in shared for name, cfg in written.items()}
    return Finished(
        run=trainer.run_hash,
        variants=tuple(names),
        cfgs={name: cfgs[name] for name in names},
        acts=store.place,
        with_acts=None if store.beside is None else store.beside.place,
        steps=trainer.step,
        tokens=trainer.step * trainer.loader.batch_tokens,
        seconds=trainer.seconds,
        peak_rss_bytes=max(peak for _, _, peak in shared),
        diverged={name: steps[name] for name in names if name in steps},
        stopped=stopped,
        mask=trainer.loader.mask,
        norm_over_median=trainer.loader.rows.norm_over_median,
        n_long_tokens=trainer.loader.n_long(trainer.step * trainer.loader.batch_tokens),
        files=(),
    )


def save_saes(out: Path, trainer: Trainer, store: ActivationStore, names: set[str]) -> dict[str, str]:
    """Write the SAEs of these variants as they are now, each from its team's first process.

    Returns: the checksums of the cfg.json that this process wrote, by variant.
    """
    mask, written = trainer.loader.mask, {}
    for learner in trainer.learners:
        variant, step = learner.variant, int(learner.diverged_step)
        if variant.name not in names:
            continue
        provenance = {
            "variant": describe(variant),
            "site": variant.site,
            **({} if variant.target_site is None else {"target_site": variant.target_site}),
            "model": store.settings.model,
            "revision": store.settings.revision,
            **({"trust_remote_code": True} if store.settings.trust_remote_code else {}),
            **({"roles": roles} if (roles := _roles(store, variant.sites)) else {}),
            **store.text.provenance(mask),
            "norm_over_median": trainer.loader.rows.norm_over_median,
            "model_fingerprint": store.settings.model_fingerprint,
            **({} if store.beside is None else {"with": model_of(store.beside)}),
            "acts_fingerprint": store.fingerprint,
            "tokens_trained": trainer.step * trainer.loader.batch_tokens,
            "input_scale": learner.scaling.scale,
            "diverged_at_step": step if step >= 0 else None,
            "versions": {name: version(name) for name in ("saemill", "torch")},
        }
        if parts := learner.export(provenance):  # of one that diverged the weights need not be finite
            written[variant.name] = sparsify.write(parts, out / variant.name)
    return written


def _roles(store: ActivationStore, sites: Iterable[str]) -> dict[str, Any]:
    """Collect what is at a variant's sites, as far as it is known."""
    arrays = {name: array for site in sites for name, array in store.site(site).parts.items()}
    return {name: array.role.model_dump(mode="json") for name, array in arrays.items() if array.role}

"""`saemill diff`: a crosscoder is trained, its latents are measured, and a page shows them."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from saemill.assess.evalset import EvalSet, check_tokens
from saemill.assess.firing import Firing
from saemill.assess.reader import reader_of
from saemill.common import config as settings
from saemill.common import durable
from saemill.common.errors import ConfigError, StoreError
from saemill.common.log import say
from saemill.common.sae import of_run
from saemill.common.sae.sae import Sae
from saemill.common.setting import identity
from saemill.common.stores import diffs, runs
from saemill.common.stores.activations import ActivationStore, keep_locally
from saemill.common.stores.site_names import BESIDE
from saemill.common.world import Group, World
from saemill.diff.config import DiffConfig, crosscoder_of
from saemill.diff.latents import KINDS, TURNED, Latents
from saemill.diff.measure import Sides, Sums
from saemill.diff.report import table, write
from saemill.train.config import TrainConfig
from saemill.train.run import run as train

BINS = 20
"""Bars of a histogram."""


def run(config: DiffConfig, training: Mapping[str, Any]) -> diffs.Diff:
    """Train a crosscoder of two sites, measure its latents, and write the page. What is there is not done
    again; a run that was interrupted goes on.

    Args:
        config: of the measurement, with the folder.
        training: settings of `saemill train`, with the store, or the two.

    Returns: what `diff.json` holds.

    Raises:
        ConfigError: stores or sites that do not belong together, and settings that contradict each other:
            before anything is trained.
        StoreError: a file is damaged, or the folder holds something else.
        Interrupted: a signal came; the same call goes on.
    """
    _check_out(config.out)
    store = _open(training)
    task = crosscoder_of(config.out, training, _common_sites(store))
    store.site(task.site[0])
    check_tokens(store, None, with_model=False)
    (folder,) = train(task)
    of = durable.hash_file(task.out / runs.FINISHED)
    if (found := _found(config, of)) is not None:
        say(f"{config.out / diffs.FILE} is there already\n{table(found)}")
        return found
    world = World.here()
    device = world.device(task.device)
    with world.connected(device) as everyone:
        diff, latents = _measure(config, store, task, folder.name, of, device, everyone)
        written = everyone.first(lambda: write(config.out, diff, latents))
    say(f"{table(written)}\n{config.out}: {diffs.FILE}, {diffs.LATENTS}, {diffs.REPORT}")
    return written


def _check_out(out: Path) -> None:
    """Refuse a folder that holds something else."""
    settings.check_folder(out)
    if (
        out.exists()
        and any(out.iterdir())
        and not ((out / diffs.RUN).exists() or (out / diffs.FILE).exists())
    ):
        raise ConfigError(f"{out} holds something else than a diff; choose another folder")


def _open(training: Mapping[str, Any]) -> ActivationStore:
    """Open the store, with the second one beside it, if there is one."""
    if not training.get("acts"):
        raise ConfigError("name a folder made by `saemill cache`, or two: saemill diff BASE CHAT -o OUT")
    beside = training.get("with_acts")
    store = ActivationStore(Path(str(training["acts"])), None if beside is None else Path(str(beside)))
    kept = training.get("local_cache")
    keep_locally([store], None if kept is None else str(kept))
    return store


def _common_sites(store: ActivationStore) -> list[str]:
    """List the sites that both stores have; those of the one where there is one."""
    others = store.sites if store.beside is None else store.beside.sites
    return [site for site in store.sites if site in others]


def _found(config: DiffConfig, of: str) -> diffs.Diff | None:
    """Read what is there already of this run by these settings, whole; None if it is to be measured."""
    try:
        found = diffs.read(config.out)
        is_same = (found.of, found.settings) == (of, identity(config))
        return found if is_same and not diffs.problems(config.out) else None
    except StoreError:  # measured again, it is whole
        return None


def _measure(
    config: DiffConfig,
    store: ActivationStore,
    task: TrainConfig,
    name: str,
    of: str,
    device: torch.device,
    everyone: Group,
) -> tuple[diffs.Diff, Latents]:
    """Measure the latents on held-out tokens, and find where some of each kind fire most."""
    finished = runs.finished(task.out)
    if name in finished.diverged:
        raise StoreError(
            f"the crosscoder in {task.out} diverged at step {finished.diverged[name]:,}; remove {config.out} "
            "and train at a lower --lr"
        )
    sae = of_run.load(task.out, name, finished, device)
    sides = Sides.of(sae)
    evalset = EvalSet(store, None, None, finished.mask, [sides.site], 1, everyone)
    sums = Sums(sides).run(evalset.chunks(config.measure_tokens), everyone)
    if int(sums.n_tokens) == 0:
        raise ConfigError(f"{store.path}: every held-out {store.text.unit} is masked; nothing to measure on")
    latents = Latents.of(sums)
    kinds = latents.kinds
    diff = diffs.Diff(
        of=of,
        settings=identity(config),
        variant=name,
        described=sae.config.described,
        sides=_sides(store, sae, sums),
        unit=store.text.unit,
        n_tokens=int(sums.n_tokens),
        l0=sums.l0,
        kinds={kind: int((kinds == kind).sum()) for kind in KINDS},
        relative_norms=_counts(kinds, latents.relative_norm, (0, 1)),
        cosines=_counts(kinds, latents.cosine, (-1, 1)),
        shown=_shown(config, evalset, sides, latents),
        notes=_notes(sides),
        versions={package: version(package) for package in ("saemill", "torch")},
        files=(),
    )
    return diff, latents


def _counts(
    kinds: NDArray[np.str_], values: NDArray[np.float64], span: tuple[float, float]
) -> dict[str, tuple[int, ...]]:
    """Count the latents of each kind in bins; those without a value are left out."""
    counted = {kind: values[(kinds == kind) & np.isfinite(values)].clip(*span) for kind in KINDS}
    return {kind: tuple(np.histogram(some, BINS, span)[0].tolist()) for kind, some in counted.items()}


def _sides(store: ActivationStore, sae: Sae, sums: Sums) -> tuple[diffs.Side, diffs.Side]:
    """Name the two that are compared, and how well each is reconstructed."""
    stores = [store.beside if part.site.startswith(BESIDE) else store for part in sae.config.joined]
    settings_of = [of.settings for of in stores if of is not None]
    sites = [part.site.removeprefix(BESIDE) for part in sae.config.joined]
    if store.beside is None:
        names = sites
    else:  # two checkpoints may lie in folders of one name, or be revisions of one model
        forms = (
            [Path(str(s.model)).name for s in settings_of],
            [str(s.model) for s in settings_of],
            [f"{s.model}@{s.revision}" for s in settings_of],
        )
        models = next((form for form in forms if form[0] != form[1]), ["A", "B"])
        names = [f"{model} {site}" for model, site in zip(models, sites, strict=True)]
    a, b = (
        diffs.Side(name=name, site=site, model=of.model, fvu=fvu)
        for name, site, of, fvu in zip(names, sites, settings_of, sums.fvu, strict=True)
    )
    return a, b


def _notes(sides: Sides) -> tuple[str, ...]:
    """List what the reader should know before the figures."""
    notes = [
        "The histogram alone misleads: a latent that writes to one side may have its direction in the other "
        "too, in what is not reconstructed there or through other latents. Latent scaling tells these apart.",
        "Each side is in its own units, in which it varies as much as it has dimensions.",
    ]
    if sides.share_a_room:
        notes.append(
            "Cosines and latent scaling look for a direction of one side in the other. That means something "
            "where both share a basis, as a model and its fine-tuned copy do, or two layers of a residual "
            "stream."
        )
    else:
        notes.append(
            "The sides are of two widths, so no direction of one can be looked for in the other: kinds are "
            "by norms alone."
        )
    return tuple(notes)


def _shown(config: DiffConfig, evalset: EvalSet, sides: Sides, latents: Latents) -> tuple[diffs.Shown, ...]:
    """Describe the latents of each kind that add most, and those that turned most, with the places where each
    fires most."""
    groups = {kind: latents.strongest(kind, config.n_latents) for kind in KINDS if kind != "rare"}
    groups[TURNED] = latents.turned(config.n_latents)
    chosen = {latent: group for group, some in groups.items() for latent in some}
    chunks = evalset.context_chunks(config.context_tokens) if chosen and config.n_contexts else ()
    firing = Firing(sides.sae, list(chosen), evalset).run(chunks)
    reader = reader_of(evalset.text)
    figures = latents.table()
    shown = []
    for latent, group in chosen.items():
        row = {key: values[0] for key, values in figures.slice(latent, 1).to_pydict().items()}
        numbers = {
            key: float(value) if np.isfinite(value) else None
            for key, value in row.items()
            if key not in ("latent", "kind")
        }
        fires = firing.of(latent)
        contexts = tuple(reader.context(fires, at) for at in fires.strongest(config.n_contexts).tolist())
        shown.append(diffs.Shown(latent=latent, group=group, figures=numbers, contexts=contexts))
    return tuple(shown)

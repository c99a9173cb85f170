"""`saemill assess`: held-out tokens through every SAE of a run, then through the model; the verdict."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from saemill.assess.config import PROBE_K, AssessConfig
from saemill.assess.done import hash_of
from saemill.assess.entries import Beside, Entry, Measured
from saemill.assess.evalset import EvalSet
from saemill.assess.features import Describer, Wanted, choose_latents
from saemill.assess.health import least_c_dec
from saemill.assess.inputs import Trained, open_models, open_run, open_tokens
from saemill.assess.measure import measure
from saemill.assess.outlook import Amounts, Dictionary, Model, outlook_of
from saemill.assess.probes import run as probing
from saemill.assess.probes.figures import described, of_dictionary
from saemill.assess.probes.run import Pool
from saemill.assess.reconstruction import Reconstruction
from saemill.assess.table import table
from saemill.assess.write import write
from saemill.common import config as settings
from saemill.common import durable
from saemill.common.errors import ConfigError
from saemill.common.log import duration, say
from saemill.common.models.model import LanguageModel
from saemill.common.outlook import Before, Outlook, tell
from saemill.common.steer.losses import check_mask_token
from saemill.common.stores import assessments, runs
from saemill.common.tracking import process as wandb
from saemill.common.weights import check_devices
from saemill.common.world import Group, World, speak_for


def run(config: AssessConfig, model: Any = None, before: Before = tell) -> dict[str, Any]:
    """Assess every variant of a run; write `final_assessment.json` and `report.html`.

    Of several processes each measures its share; the first one writes.

    Args:
        config: the settings.
        model: the model itself, in evaluation mode, where it is in memory.
        before: takes the outlook, when all is checked and nothing is written yet; on the first process.

    Returns: the content of `final_assessment.json`, on every process.

    Raises:
        StoreError: the run is not finished, or its activations are not to be found.
        ConfigError: settings that do not fit the run.
    """
    world = World.here()
    speak_for(world)
    device = world.device(config.device)
    check_devices(config.spread, world.size, torch.cuda.device_count())
    with world.connected(device) as everyone, ExitStack() as resources:
        return _assess(config, device, everyone, resources, model, before)


def _assess(
    config: AssessConfig,
    device: torch.device,
    everyone: Group,
    resources: ExitStack,
    given: Any,
    before: Before,
) -> dict[str, Any]:
    started = time.perf_counter()
    trained = open_run(config, device)
    other = open_tokens(config, trained)
    content_hash, out = hash_of(config), config.folder
    settings.check_folder(out)
    to_wandb = everyone.first(lambda: _logs_to_wandb(config))
    models, model_check = open_models(config, trained, other, device, given)
    model = models[0] if models else None
    evalset = EvalSet(
        *(trained.store, other, model, trained.mask, trained.sites, config.batch_size, everyone),
        is_training_known=not trained.is_imported,
    )
    for model in models:
        check_mask_token(model, evalset.tokens)
    pools = probing.prepare(config, evalset)
    everyone.first(lambda: before(_outlook(config, trained, evalset, models, device, pools)))
    everyone.first(lambda: _lock(out, resources))
    measured, beside, controls = measure(config, trained.saes, trained.sets, evalset, models)
    entries = measured.ranking(trained.left_out, beside)
    first, *at_other_sites = measured.bests(entries)
    best = first["variant"]
    shown = config.variant or best
    assessment: dict[str, Any] = {
        "format": assessments.FORMAT,
        "settings": config.identity(),
        "of": content_hash,
        "data": measured.data(best) | {"model_check": model_check},
        "thresholds": settings.plain(config.thresholds),
        "best_variant": best,
        "best_on_other_documents": first["on_other_documents"],
        "best_at_other_sites": at_other_sites,
        "variants": entries,
        "controls": controls,
        "least_c_dec": least_c_dec(entries, trained.settings),
        "probes": _probes(config, pools, measured, beside, [*entries, *controls]),
        "n_processes": everyone.size,
        "versions": {name: version(name) for name in ("saemill", "torch", "transformers")},
    }
    latents, wanted = _shown(config, shown, measured.reconstruction)
    n_beside = trained.saes[shown].config.num_latents if latents else 0
    every = range(n_beside if n_beside <= config.most_beside else 0)
    describer = Describer(wanted, every or latents, shown, trained.saes, evalset, config.model)
    features = describer.features(latents, content_hash)
    assessment["seconds"] = time.perf_counter() - started
    assessment = everyone.first_at_length(
        lambda: write(out, assessment, features, measured, describer, every, config.page_bytes)
    )
    say(table(assessment))
    if everyone.rank == 0 and to_wandb:
        _log_to_wandb(config.run, out)
    took = duration(time.perf_counter() - started)
    say(f"{out / assessments.FILE}, {runs.REPORT} written in {took}")
    return assessment


def _probes(
    config: AssessConfig, pools: list[Pool], measured: Measured, beside: Beside, entries: list[Entry]
) -> dict[str, Any] | None:
    """Probe the dictionaries, and add what is found to the entries of those that have figures."""
    if not pools:
        return None
    every = {name: its.reconstruction.saes[name] for name, its in beside.measured.items()}
    every |= measured.reconstruction.saes
    with_figures = (e["name"] for e in entries if e["metrics"]["fvu"]["value"] is not None)
    usable = {name: every[name] for name in with_figures}
    found = probing.probe(pools, config, usable, measured.reconstruction.evalset)
    for entry in entries:
        if (name := entry["name"]) in usable:
            random = beside.of[name]["random"]
            of_it = of_dictionary(found, name, random if random in usable and random != name else None)
            figures, entry["probes"], entry["absorbed"] = of_it
            entry["metrics"] |= figures
    return described(found, config.probe_k or PROBE_K)


def _outlook(
    config: AssessConfig,
    trained: Trained,
    evalset: EvalSet,
    models: Sequence[LanguageModel],
    device: torch.device,
    pools: list[Pool],
) -> Outlook:
    """Work out what the passes go over."""
    saes = [
        Dictionary(str(sae.target_site), len(sae.b_dec), sae.config.num_latents, sae.config.k or 0)
        for sae in trained.measured.values()
    ]
    runs_on = None
    if models:
        n_bytes = sum(weight.nbytes for model in models for weight in model.model.parameters())
        runs_on = Model(n_bytes, models[0].n_ids, config.batch_size * evalset.tokens.ctx_len)
    n_kept = evalset.n_kept()
    has_losses = bool(models) and all(model.head is not None for model in models)
    amounts = Amounts(
        min(config.max_tokens, n_kept),
        min(config.model_tokens, len(evalset.rows_R) * evalset.tokens.ctx_len) if has_losses else 0,
        min(config.context_tokens, trained.store.n_tokens if evalset.cached else n_kept),
        max((len(pool.examples.addresses_N) for pool in pools), default=0),
    )
    return outlook_of(config, saes, amounts, device, runs_on, evalset.text.unit)


def _shown(config: AssessConfig, name: str, measured: Reconstruction) -> tuple[list[int], Wanted]:
    """Choose the latents that the page shows, none of an SAE whose activations are no numbers, and say how
    much is told of each."""
    live = measured.live(name, config.dead_percentage_threshold)
    usable = not measured.unusable(name)
    latents = choose_latents(live, config.latents, config.n_latents) if usable else []
    return latents, Wanted(
        asked=config.latents,
        n_live=int(live.sum()),
        n_contexts=config.n_contexts,
        n_samples=config.n_samples,
        context_tokens=config.context_tokens,
    )


def _lock(out: Path, resources: ExitStack) -> None:
    """Lock the folder, and remove the files that a killed assessment left half written."""
    resources.enter_context(durable.exclusive(out))
    for leftover in out.glob(durable.PARTIAL):
        durable.remove(leftover)


def _logs_to_wandb(config: AssessConfig) -> bool:
    """Tell whether the assessment goes to wandb.

    Raises:
        ConfigError: it cannot.
    """
    logged = (config.run / runs.WANDB).exists()
    if config.log_to_wandb and not logged:
        raise ConfigError(
            f"log_to_wandb: {config.run} was not logged to wandb ({runs.WANDB} is missing); "
            "train with --log-to-wandb"
        )
    enabled = logged if config.log_to_wandb is None else config.log_to_wandb
    if enabled:
        wandb.check()
    return enabled


def _log_to_wandb(run: Path, out: Path) -> None:
    """Log what was written; wait for it, but not for long."""
    with wandb.Wandb(run, assessment=out):
        pass

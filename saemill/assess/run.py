"""`saemill assess`: held-out tokens through every SAE of a run, then through the model; the verdict."""

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from saemill.assess import features
from saemill.assess.controls import controls
from saemill.assess.entries import Measured
from saemill.assess.evalset import EvalSet, check_tokens
from saemill.assess.model import check_model, load_model
from saemill.assess.reconstruction import Reconstruction
from saemill.assess.report import table, write_html
from saemill.assess.splicing import Splicing, check_mask_token
from saemill.assess.sums import DocumentSums
from saemill.assess.verdict import Thresholds
from saemill.common import config as settings
from saemill.common import durable, records
from saemill.common.errors import ConfigError, StoreError
from saemill.common.log import duration, say
from saemill.common.models.model import LanguageModel
from saemill.common.sae import of_run
from saemill.common.sae.sae import Sae
from saemill.common.stores import assessments, runs
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.passages import PassageStore
from saemill.common.stores.tokens import TokenStore
from saemill.common.tracking import process as wandb
from saemill.common.world import Group, World, speak_for


@dataclass(frozen=True, slots=True, kw_only=True)
class AssessConfig:
    """Settings of the stage."""

    run: Path
    """Folder of a finished run."""
    acts: Path | None = None
    """The activation store, if it is no longer where training read it."""
    model: str | None = None
    """Hub id or local folder; by default the one that was cached."""
    with_model: bool = True
    """Run the model with the SAEs spliced in; false leaves out the losses."""
    tokens: Path | None = None
    """Assess on this token store instead of the held-out rows."""
    out: Path | None = None
    """Where to write; by default the run's folder, or `on-<name>` in it for other tokens."""
    max_tokens: int = 1_000_000
    """Most tokens for reconstruction and firing."""
    model_tokens: int = 100_000
    """Most tokens for the losses, in whole rows."""
    batch_size: int = 8
    """Rows per forward pass."""
    device: str = "auto"
    dead_percentage_threshold: float = 0.0005
    """A latent that fires on a smaller share of the tokens counts as dead."""
    thresholds: Thresholds = field(default_factory=Thresholds)
    latents: tuple[int, ...] = ()
    """Latents of the shown variant whose contexts are wanted, beside random live ones."""
    variant: str | None = None
    """The variant whose latents are shown; by default the best."""
    n_latents: int = 12
    """Random live latents shown."""
    n_contexts: int = 8
    """Contexts per latent, at most one per document."""
    context_tokens: int = 500_000
    """Most tokens searched for contexts."""
    log_to_wandb: bool | None = None
    """Add the assessment to the run's wandb runs; by default where training logged to wandb."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "model_tokens", "batch_size", "n_contexts", "context_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not 0 <= self.dead_percentage_threshold < 1:
            raise ConfigError(
                f"dead_percentage_threshold must be in [0, 1), got {self.dead_percentage_threshold}"
            )
        settings.at_least(self, 0, "latents")
        if self.n_latents < 0:
            raise ConfigError(f"n_latents must be 0 or more, got {self.n_latents}")
        if self.variant is not None and self.n_latents == 0 and not self.latents:
            raise ConfigError("variant has no effect where no latent is shown; leave it out")
        if self.model is not None and not self.with_model and self.tokens is None:
            raise ConfigError("model has no effect with --no-model; leave one out")

    @property
    def folder(self) -> Path:
        """Where the assessment is written."""
        return self.out or (self.run if self.tokens is None else self.run / f"on-{self.tokens.name}")

    def is_done(self) -> bool:
        """Whether the folder holds, whole, the assessment of this run, on this text, by these settings."""
        try:
            found = assessments.read(self.folder)
            whole = not assessments.problems(self.folder)
        except StoreError:  # assessed again, it is whole
            return False
        try:
            of = self.of()
        except FileNotFoundError:
            return False
        return whole and (found["settings"], found["of"]) == (self.identity(), of)

    def of(self) -> str:
        """A hash of what is assessed: the run, whose SAEs know their store, and the tokens if they are named.

        Raises:
            FileNotFoundError: the run or the tokens are unfinished.
        """
        run = durable.hash_file(self.run / "finished.json")
        if self.tokens is None:
            return run
        return durable.hash_json([run, TokenStore(self.tokens).fingerprint])

    def identity(self) -> dict[str, Any]:
        """The settings that decide the result, but for the run."""
        skip = ("run", "acts", "model", "out", "device", "log_to_wandb")
        return {key: value for key, value in settings.plain(self).items() if key not in skip}


@dataclass(frozen=True, slots=True)
class _Run:
    """A finished run, opened."""

    store: ActivationStore
    saes: dict[str, Sae]
    left_out: dict[str, tuple[Sae, str]]
    """Variants that diverged or were stopped early, and the reason: listed, not measured."""
    sites: dict[str, str]
    mask: MaskConfig
    finished: runs.Finished


def run(config: AssessConfig) -> dict[str, Any]:
    """Assess every variant of a run; write `final_assessment.json` and `report.html`.

    Of several processes each measures a part; the first one writes.

    Returns: the content of `final_assessment.json`, on every process.

    Raises:
        StoreError: the run is not finished, or its activations are not to be found.
        ConfigError: settings that do not fit the run.
    """
    world = World.here()
    speak_for(world)
    device = world.device(config.device)
    with world.connected(device) as everyone, ExitStack() as held:
        return _assess(config, device, everyone, held)


def _assess(config: AssessConfig, device: torch.device, everyone: Group, held: ExitStack) -> dict[str, Any]:
    started = time.perf_counter()
    opened = _open(config, device)
    if isinstance(opened.store.text, PassageStore):
        _check_without_model(config)
    other = TokenStore(config.tokens) if config.tokens else None
    check_tokens(opened.store, other, config.with_model)
    of = config.of()
    out = config.folder
    settings.check_folder(out)
    to_wandb = everyone.first(lambda: _logs_to_wandb(config))
    model, model_check = None, None
    if config.with_model and isinstance(opened.store.text, TokenStore):
        model = load_model(config.model, opened.store, other, device)
        model_check = check_model(config.model, model, opened.store)
    sites = list(dict.fromkeys(opened.sites.values()))
    evalset = EvalSet(opened.store, other, model, opened.mask, sites, config.batch_size, everyone)
    if model is not None:
        check_mask_token(model, evalset.tokens)
    no_loss = None if model is None else _no_loss(model, evalset)
    everyone.first(lambda: _take(out, held))
    found = _measure(config, opened.saes, evalset, model, no_loss)
    entries = found.ranking(opened.left_out)
    best = entries[0]["name"]
    beside = evalset.at(opened.sites[best], " controls")
    baselines = controls(opened.saes[best], opened.sites[best], beside)
    untrained = _measure(config, baselines, beside, model, no_loss)
    assessment: dict[str, Any] = {
        "format": assessments.FORMAT,
        "settings": config.identity(),
        "of": of,
        "data": _data(found, best) | {"model_check": model_check},
        "thresholds": settings.plain(config.thresholds),
        "best_variant": best,
        "best_on_other_documents": found.on_other_documents(best),
        "variants": entries,
        "controls": untrained.entries(),
        "features": _features(config, opened, evalset, found.reconstruction, config.variant or best),
        "n_processes": everyone.size,
        "versions": {name: version(name) for name in ("saemill", "torch", "transformers")},
    }
    assessment["seconds"] = time.perf_counter() - started
    assessment = everyone.first(lambda: _write(out, assessment, found))
    say(table(assessment))
    if everyone.rank == 0 and to_wandb:
        _log_to_wandb(config.run, out)
    say(f"{out / assessments.FILE}, report.html written in {duration(assessment['seconds'])}")
    return assessment


def _take(out: Path, held: ExitStack) -> None:
    """Make the folder this assessment's own; clear away what a killed one left of its files."""
    held.enter_context(durable.exclusive(out))
    for litter in out.glob(durable.PARTIAL):
        litter.unlink()


def _check_without_model(config: AssessConfig) -> None:
    """Refuse what embeddings of passages do not have."""
    for name in ("model", "tokens"):
        if getattr(config, name) is not None:
            raise ConfigError(
                f"{name} has no effect on embeddings, which have no language model; leave it out"
            )


def _open(config: AssessConfig, device: torch.device) -> _Run:
    if not runs.is_finished(config.run):
        raise StoreError(
            f"{config.run} is no finished run (finished.json is missing); finish it with `saemill train`"
        )
    finished = runs.finished(config.run)
    path = config.acts or Path(finished.acts)
    if not path.exists():
        raise StoreError(f"the run's activations are no longer at {path}; say where with --acts")
    store = ActivationStore(path)
    saes = {name: of_run.load(config.run, name, finished, device) for name in finished.variants}
    for name, sae in saes.items():
        if sae.config.provenance["acts_fingerprint"] != store.fingerprint:
            raise StoreError(f"{name} was not trained on {path}; name the right store with --acts")
    left_out = {name: (saes.pop(name), reason) for name, reason in _left_out(finished).items()}
    if not saes:
        raise StoreError(f"every variant of {config.run} diverged; train again at lower learning rates")
    if config.variant is not None and config.variant not in saes:
        raise ConfigError(f"no variant {config.variant!r}; {settings.nearest(config.variant, saes)}")
    may_be_shown = saes.values() if config.variant is None else [saes[config.variant]]
    features.check_latents(config.latents, [sae.config.num_latents for sae in may_be_shown])
    sites = {name: sae.config.provenance["site"] for name, sae in saes.items()}
    return _Run(store, saes, left_out, sites, finished.mask, finished)


def _left_out(finished: runs.Finished) -> dict[str, str]:
    """Variants that are not worth measuring, and why."""
    reasons = {name: f"diverged at step {step:,}" for name, step in finished.diverged.items()}
    for name, look in finished.stopped.items():
        value = "diverged" if look.value is None else f"{look.metric} {look.value:.4g}"
        reasons[name] = f"stopped by halving at step {look.step:,}: {value}"
        if look.best is not None:
            reasons[name] += f", the best {look.best:.4g}"
    return reasons


def _no_loss(model: LanguageModel, evalset: EvalSet) -> str | None:
    """Why next-token losses of a model mean nothing, if it sees the tokens that it is to predict."""
    row = int(evalset.rows_R[0])
    ids_RS = torch.from_numpy(evalset.tokens.rows(row, row + 1).astype(np.int64))
    if model.head == "causal" and model.sees_later_tokens(ids_RS):
        return f"{model.name} sees the tokens after each position, so it has no next-token loss"
    return None


def _measure(
    config: AssessConfig,
    saes: dict[str, Sae],
    evalset: EvalSet,
    model: LanguageModel | None,
    no_loss: str | None,
) -> Measured:
    """Some SAEs on the evaluation tokens; the losses, or why there are none."""
    sites = {name: sae.config.provenance["site"] for name, sae in saes.items()}
    reconstruction = Reconstruction(saes, sites, evalset).run(evalset.chunks(config.max_tokens))
    if reconstruction.n_tokens == 0:
        raise ConfigError("every position of the evaluation tokens is masked or was seen in training")
    splicing: Splicing | str = "run with --no-model"
    if isinstance(evalset.text, PassageStore):
        splicing = "embeddings have no language model"
    elif model is not None and model.head is None:
        splicing = f"{model.name} has no language-model head"
    elif model is not None:
        splicing = Splicing(saes, sites, evalset, model, no_loss).run(config.model_tokens)
        if splicing.n_tokens == 0:
            splicing = "no position to predict in the evaluation rows"
    return Measured(reconstruction, splicing, config.thresholds, config.dead_percentage_threshold)


def _data(found: Measured, best: str) -> dict[str, Any]:
    reconstruction, splicing, evalset = found.reconstruction, found.splicing, found.reconstruction.evalset
    places = {site: reconstruction.place(site) for site in evalset.sites}
    return {
        "chosen": evalset.description,
        "tokens_fingerprint": evalset.text.fingerprint,
        "unit": evalset.text.unit,
        "document": evalset.text.document,
        "n_tokens": reconstruction.n_tokens,
        "n_documents": len(reconstruction.sums.rows),
        "n_documents_left_out_as_seen": evalset.n_seen_documents,
        "n_tokens_with_losses": splicing.n_tokens if isinstance(splicing, Splicing) else 0,
        "mask": settings.plain(evalset.mask),
        "dead_percentage_threshold": found.dead_share,
        "identity_splice_nats": splicing.identity if isinstance(splicing, Splicing) else None,
        "sites": places,
        "notes": [note for site in places for note in found.notes(site, best)],
    }


def _features(
    config: AssessConfig, opened: _Run, evalset: EvalSet, reconstruction: Reconstruction, shown: str
) -> dict[str, Any]:
    density = reconstruction.density(shown)
    live = reconstruction.live(shown, config.dead_percentage_threshold)
    latents = features.choose_latents(live, config.latents, config.n_latents)
    if reconstruction.unusable(shown):
        latents = []  # its activations are no numbers
    site, sae = opened.sites[shown], opened.saes[shown]
    chunks = evalset.context_chunks(config.context_tokens) if latents else ()
    text, unit = evalset.text, f"{evalset.text.unit}s"
    among = f" of the cache, training {text.row}s included" if evalset.cached else " of the evaluation tokens"
    found = features.top_addresses(chunks, site, sae, latents, text, config.n_contexts, evalset.everyone)
    reader = features.PassageReader(text) if isinstance(text, PassageStore) else features.Reader(text)
    firing = reconstruction.firing[shown]
    return {
        "variant": shown,
        "unit": text.unit,
        "searched": f"up to {config.context_tokens:,} {unit}{among}",
        "latents": [
            {
                "latent": latent,
                "density": float(density[latent]),
                "mean_when_active": float(firing.sum_F[latent] / max(1, int(firing.count_F[latent]))),
                "contexts": [settings.plain(reader.context(*entry)) for entry in found[latent]],
            }
            for latent in latents
        ],
    }


def _write(out: Path, values: dict[str, Any], found: Measured) -> dict[str, Any]:
    """The verdict, the report, and the sums and firing counts they follow from: all of them or none.

    Whole files are beside their places before the first takes its own; the old verdict goes before that, the
    new one comes last.

    Returns: the content of `final_assessment.json`.
    """
    assessment = assessments.checked(values | {"files": []}).model_dump(mode="json")
    sums = {"documents.parquet": found.reconstruction.sums}
    if isinstance(found.splicing, Splicing):
        sums["documents_model.parquet"] = found.splicing.sums
    tables = {name: _sums_table(table) for name, table in sums.items()}
    tables["latents.parquet"] = _latents_table(found.reconstruction)
    densities = {name: found.reconstruction.density(name) for name in found.reconstruction.saes}
    with ExitStack() as held:  # which closes the last opened first
        verdict = held.enter_context(durable.replacing(out / assessments.FILE))
        partials = {
            name: held.enter_context(durable.replacing(out / name)) for name in [*tables, "report.html"]
        }
        for name, table in tables.items():
            with durable.writing(out / name, table.nbytes):
                pq.write_table(table, partials[name])
        with durable.writing(out / "report.html"):
            write_html(partials["report.html"], assessment, densities)
        assessment["files"] = [
            {"path": name, "bytes": file.stat().st_size, "xxh3": durable.hash_file(file)}
            for name, file in partials.items()
        ]
        with durable.writing(out / assessments.FILE):
            records.write(verdict, assessments.checked(assessment))
        for old in (assessments.FILE, *({"documents_model.parquet"} - set(tables))):
            (out / old).unlink(missing_ok=True)
    return assessment


def _latents_table(reconstruction: Reconstruction) -> pa.Table:
    """How every latent of every variant fired."""
    parts = [
        pa.table(
            {
                "variant": [name] * len(firing.count_F),
                "latent": np.arange(len(firing.count_F)),
                "density": reconstruction.density(name),
                "mean_when_active": (firing.sum_F / firing.count_F.clamp(min=1)).numpy(),
                "max": firing.max_F.numpy(),
            }
        )
        for name, firing in reconstruction.firing.items()
    ]
    return pa.concat_tables(parts)


def _sums_table(sums: DocumentSums) -> pa.Table:
    hashes = pa.array(sums.documents, pa.uint64())
    return pa.table({"text_hash": hashes} | {name: sums.column(name) for name in sums.names})


def _logs_to_wandb(config: AssessConfig) -> bool:
    """Whether the assessment goes to wandb.

    Raises:
        ConfigError: it cannot.
    """
    logged = (config.run / wandb.RECORD).exists()
    if config.log_to_wandb and not logged:
        raise ConfigError(
            f"log_to_wandb: {config.run} was not logged to wandb ({wandb.RECORD} is missing); "
            "train with --log-to-wandb"
        )
    wanted = logged if config.log_to_wandb is None else config.log_to_wandb
    if wanted:
        wandb.check()
    return wanted


def _log_to_wandb(run: Path, out: Path) -> None:
    """Hand over what was written; wait for it, but not for long."""
    with wandb.Wandb(run, assessment=out):
        pass

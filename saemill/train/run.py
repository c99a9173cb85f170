"""`saemill train`: from settings to banks, the loop, and the SAEs on disk."""

from contextlib import ExitStack, closing
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from typing import NamedTuple, Self

import torch

from saemill.common.errors import ConfigError
from saemill.common.log import say
from saemill.common.outlook import Before, Outlook, tell
from saemill.common.signals import stop_on_signal
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.runs import METRICS, TENSORBOARD
from saemill.common.tracking import process as wandb
from saemill.common.world import Group, World, speak_for
from saemill.train.backends.base import described
from saemill.train.backends.choose import choose_kernels, choose_product_dtype, kernels_of
from saemill.train.batch import check_batch
from saemill.train.build import build, place
from saemill.train.config import TrainConfig
from saemill.train.export import export, save_saes
from saemill.train.following import Following, following_of
from saemill.train.inputs import check_mse, load_model_loss, open_store, open_stream, with_site
from saemill.train.outlook import Computed, notes_on, outlook_of_run
from saemill.train.points import Points, points_of
from saemill.train.profile import PROFILED_STEPS, SKIPPED_STEPS
from saemill.train.record.checkpoint import steps_done
from saemill.train.record.folder import Folder
from saemill.train.record.metrics import ConsoleSink, JsonlSink, Sink, TensorBoardSink
from saemill.train.stream.loader import Loader
from saemill.train.stream.whole_rows import WholeRows
from saemill.train.sweep.halving import Halving
from saemill.train.sweep.placement import (
    WITHOUT_KERNELS,
    Placement,
    is_stepped_by_torch,
)
from saemill.train.sweep.schedule import Schedule, schedule_of
from saemill.train.sweep.sources import sources_of
from saemill.train.sweep.variant import Variant
from saemill.train.sweep.variants import of_config
from saemill.train.tracking import follow
from saemill.train.trainer import Trainer
from saemill.train.watch.watch import Watch, watch_of


class Beside(NamedTuple):
    """What goes along with the steps of a run."""

    watch: Watch | None
    points: Points
    following: Following | None

    @classmethod
    def of(
        cls, config: TrainConfig, run_hash: str, loader: Loader | WholeRows, n_steps: int, stop: Event
    ) -> Self:
        """Make what a run's settings ask for."""
        watch = watch_of(config, loader.store, loader.mask, n_steps)
        points = points_of(config.out, config.n_checkpoints, n_steps)
        n_held_out = watch.plan.n_tokens if watch else 0
        return cls(watch, points, following_of(loader, config.out, run_hash, n_steps, n_held_out, stop))


def run(config: TrainConfig, before: Before = tell) -> list[Path]:
    """Train all variants into `config.out`, alone or as one of several processes that share them out.

    Args:
        config: the settings.
        before: takes the outlook, when all is checked and nothing is written yet; on the first process.

    Returns: the folders of the SAEs.

    Raises:
        ConfigError: settings that contradict each other, the data, or what is in `out`.
        StoreError: a site is missing or damaged, or so is the run that `out` holds; another process is
            training it.
        DiskError: the disk is full; what was written before counts.
        Interrupted: a signal came; the same call goes on.
    """
    world = World.here()
    speak_for(world)
    device = world.device(config.device)
    store = open_store(config)
    check_batch(config.batch_size, store.ctx_len)
    sources = sources_of(config)
    config = with_site(config, store.sites, sources, store.consumed)
    folder = Folder(config, store.fingerprint, sources)
    with (
        stop_on_signal() as stop,
        world.connected(device) as everyone,
        closing(open_stream(config, store, sources, folder.run)) as loader,
        ExitStack() as resources,
    ):
        schedule = schedule_of(config, loader.epoch_tokens, f"{store.text.unit}s")
        widths = {name: store.site(name).width for name in loader.sites}
        variants = of_config(config, widths, schedule.n_steps, sources)
        placement = place(config, store, variants, everyone, device)
        metric = config.halving_metric or "fvu"
        halving = Halving(config.out, folder.run, variants, schedule.n_steps, config.halving, metric)
        beside = Beside.of(config, folder.run, loader, schedule.n_steps, stop)
        saes = [config.out / variant.name for variant in variants]
        is_done = everyone.first(folder.is_finished)
        outlook = partial(
            _outlook, config, loader, placement, schedule.n_steps, beside.watch, device, is_done
        )
        everyone.first(lambda: before(outlook()))
        if is_done:
            everyone.first(folder.mend)
        else:
            _begin(config, loader, variants, folder, beside.following, everyone, resources)
            trainer = _train(
                config, folder.run, loader, schedule, halving, beside, everyone, device, stop, resources
            )
            saes = export(config.out, variants, store, trainer, halving)
        if beside.following is not None:
            everyone.first(beside.following.ended)
        return saes


def _begin(
    config: TrainConfig,
    loader: Loader | WholeRows,
    variants: list[Variant],
    folder: Folder,
    following: Following | None,
    everyone: Group,
    resources: ExitStack,
) -> None:
    """Lock the run's folder; see to it that what training begins with is there."""
    if following is None:
        check_mse(loader, variants)
        everyone.first(lambda: folder.lock(resources))
        return
    step = steps_done(config.out, everyone) if config.resume else 0
    everyone.first(lambda: following.check(step))
    everyone.first(lambda: folder.lock(resources))
    following.begin(steps_done(config.out, everyone), everyone)
    check_mse(loader, variants)


def _outlook(
    config: TrainConfig,
    loader: Loader | WholeRows,
    placement: Placement,
    n_steps: int,
    watch: Watch | None,
    device: torch.device,
    is_done: bool,
) -> Outlook:
    """Work out what is going to be done; refuse what this machine cannot do."""
    if not is_done:
        check_machine(config)
    by = Computed(device, kernels_of(config.kernels, device), choose_product_dtype(config.precision, device))
    measured = watch.plan.describe() if watch else ""
    return outlook_of_run(config, loader, placement, n_steps, by, measured, is_done)


def _train(
    config: TrainConfig,
    run_hash: str,
    loader: Loader | WholeRows,
    schedule: Schedule,
    halving: Halving,
    beside: Beside,
    everyone: Group,
    device: torch.device,
    stop: Event,
    resources: ExitStack,
) -> Trainer:
    """Train from rung to rung of halving, if there is any, with the variants that are left.

    wandb follows until `resources` is closed, which is after the SAEs are written.

    Returns: the trainer at its end.
    """
    watch = beside.watch
    halving.past = everyone.first(halving.read)
    log: JsonlSink | None = None
    sinks: list[Sink] = []
    ends, above = halving.ends, load_model_loss(config, loader.store, everyone, device)
    with ExitStack() as open_sinks:
        for end in ends:
            idle_allowed = bool(halving.past)
            placement = place(config, loader.store, halving.alive, everyone, device, idle_allowed)
            trainer = build(config, loader, schedule, placement, everyone, device, stop, above)
            trainer.run_hash, (trainer.watch, trainer.points, trainer.following) = run_hash, beside
            if watch is not None:
                model = None if above is None else above.model
                everyone.together(partial(watch.prepare, trainer.learners, model))
            trainer.resume()
            if end == ends[0]:
                _check_profile(trainer, end)
                _say_how(config, trainer, placement, loader.store)
                log = everyone.alone(partial(JsonlSink, config.out / METRICS, trainer.logged))
                if log is not None:
                    open_sinks.enter_context(closing(log))
                    sinks = _start_sinks(config, trainer, open_sinks)
                    if config.log_to_wandb:
                        follow(config, trainer, halving.variants, resources)
                if watch is not None and trainer.step == 0:
                    _say_start(trainer, watch)
            trainer.log, trainer.sinks = log, sinks
            trainer.profile = config.profile and end == ends[0]
            trainer.run(end)
            if end < schedule.n_steps:
                _halve(config, halving, trainer, end)
                if beside.following is not None:
                    beside.following.wait_at(end, everyone)
    return trainer


def _say_start(trainer: Trainer, watch: Watch) -> None:
    """Say how good the SAEs are that training starts from, where they are finished ones."""
    for figures in trainer.everyone.all_gather_objects(watch.at_start(trainer.learners)):
        for name, measured in figures.items():
            known = (f"{key} {value:.4g}" for key, value in measured.items() if value is not None)
            say(f"{name} starts at {', '.join(known)}")


def _halve(config: TrainConfig, halving: Halving, trainer: Trainer, end: int) -> None:
    """Stop variants at step `end`: write the SAEs of the worse halves as they are, and go on without them."""
    losers = halving.choose(trainer.scores(halving.metric))
    own_cfgs = save_saes(config.out, trainer, trainer.loader.store, set(losers))
    written = trainer.everyone.all_gather_objects(own_cfgs)  # all are on disk before the record says so
    cfgs = {name: cfg for process_cfgs in written for name, cfg in process_cfgs.items()}
    trainer.everyone.first(lambda: halving.stop(end, losers, cfgs))
    halving.past = trainer.everyone.all_gather_objects(halving.past)[0]
    trainer.banks.clear()  # their memory is free before the next are made


def _check_profile(trainer: Trainer, end: int) -> None:
    left = end - trainer.step
    if trainer.profile and left < SKIPPED_STEPS + PROFILED_STEPS:
        raise ConfigError(
            f"--profile needs {SKIPPED_STEPS + PROFILED_STEPS} steps, {left} are left; "
            "raise --max-tokens or lower --batch-size"
        )


def check_machine(config: TrainConfig) -> None:
    """Refuse before the work what cannot be done here.

    Raises:
        ConfigError: the kernels do not run on the device or are not installed, TensorBoard is not
            installed, or wandb has no API key.
    """
    world = World.here()
    device = world.device(config.device)
    choose_kernels(config.kernels, device)
    if config.log_to_tensorboard and find_spec("tensorboard") is None:
        raise ConfigError("log_to_tensorboard needs tensorboard: pip install 'saemill[tensorboard]'")
    if config.log_to_wandb:
        wandb.check()


def _start_sinks(config: TrainConfig, trainer: Trainer, opened: ExitStack) -> list[Sink]:
    """Start what shows the metrics; the sinks are closed with `opened`."""
    step_tokens = config.step_tokens
    n_steps = trainer.schedule.n_steps
    units = f"{trainer.loader.store.text.unit}s"
    sinks: list[Sink] = [ConsoleSink(n_steps, n_steps * step_tokens, units)]
    if config.log_to_tensorboard:
        sinks.append(TensorBoardSink(config.out / TENSORBOARD, trainer.step * step_tokens))
    for sink in sinks:
        opened.enter_context(closing(sink))
    return sinks


def _say_how(config: TrainConfig, trainer: Trainer, placement: Placement, store: ActivationStore) -> None:
    """Say what is known only now of how steps are computed, and from where the run goes on."""
    if trainer.everyone.rank > 0:
        return  # which may be without a variant after a rung
    backend = trainer.banks[0].backend
    if backend.describe() != described(backend.dtype, backend.name):
        say(backend.describe())
    for note in notes_on(trainer.loader) if config.follow else ():
        say(note)
    if backend.name == "torch" and trainer.device.type == "cuda" and config.kernels == "auto":
        say("triton is not installed; with it training is faster on a GPU")
    if backend.name == "triton" and any(
        is_stepped_by_torch(v, {site: store.site(site).width for site in v.sites}) for v in placement.variants
    ):
        say(f"steps with {WITHOUT_KERNELS} are made by torch on a GPU, more slowly than by Triton's kernels")
    if backend.name == "triton" and any(v.n_layers > 1 for v in placement.variants):
        say("steps of cross-layer transcoders are made by torch on a GPU")
    if trainer.step:
        say(f"continuing after step {trainer.step:,}")

"""`saemill train`: from settings to banks, the loop, and the SAEs on disk."""

import resource
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from threading import Event
from typing import Any, Literal

import torch

from saemill.common import config as settings
from saemill.common import durable
from saemill.common.activations import ActivationStore
from saemill.common.errors import ConfigError, StoreError
from saemill.common.log import counted, duration, say
from saemill.common.mask import MaskConfig
from saemill.common.model import choose_device
from saemill.common.signals import stop_on_signal
from saemill.train.bank import Bank, Frame
from saemill.train.feed import Feed
from saemill.train.loader import Loader
from saemill.train.metrics import ConsoleSink, JsonlSink, Sink, WandbSink
from saemill.train.profile import PROFILED_STEPS, SKIPPED_STEPS
from saemill.train.schedule import Schedule
from saemill.train.trainer import Trainer
from saemill.train.variants import Variant, describe, groups, resolve

MOST_DEAD_AFTER_TOKENS = 10_000_000
MOST_WARMUP_STEPS = 1000
SAMPLE_TOKENS = 8192
"""From which the initial gain and the geometric median are computed, whatever the batch size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Settings of the stage. Lists form a grid: every combination is a variant."""

    acts: Path
    """An activation store."""
    out: Path
    """Folder of the run."""
    site: tuple[str, ...] = ()
    """Sites to train on; required unless each of `variants` names its own."""
    k: tuple[int, ...] = (32,)
    """Active latents per token."""
    expansion_factor: tuple[int, ...] = ()
    """Number of latents as multiples of D; 8 if `num_latents` is not given either."""
    num_latents: tuple[int, ...] = ()
    lr: tuple[Literal["auto"] | float, ...] = ("auto",)
    """Peak learning rates; auto: by width, number of latents and steps (`variants.auto_lr`), for adam."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the initial weights."""
    variants: tuple[Mapping[str, Any], ...] = ()
    """Variants listed one by one, each with any of: site, k, num_latents, expansion_factor, lr,
    seed, optimizer, optimizer_state, weight_decay, auxk_alpha, k_aux, loss, b_dec_init, name."""
    batch_size: int = 4096
    """Tokens per batch."""
    grad_acc_steps: int = 1
    """Batches per optimizer step. No more memory is needed than for the activations: latents are
    computed in chunks in any case."""
    max_tokens: int | None = None
    """Tokens to train on; more than the store has means several epochs."""
    epochs: int | None = None
    """Passes over the store, in place of `max_tokens`; 1 if neither is given."""
    optimizer: Literal["adam", "sgd"] = "adam"
    optimizer_state: Literal["fp32", "bf16", "8bit"] = "fp32"
    """How Adam's moments are kept: 8, 4 or 2 bytes per weight."""
    weight_decay: float = 0.0
    warmup_steps: int | None = None
    """Optimizer steps of linear warm-up; by default a 20th of the run, at most 1,000."""
    lr_decay: Literal["none", "linear", "cosine"] = "linear"
    """How the rate falls to 0 at the end."""
    lr_decay_fraction: float | None = None
    """Share of the run over which it falls; by default 0.2."""
    auxk_alpha: float = 1 / 32
    k_aux: int | None = None
    """Dead latents per token in the auxiliary loss; by default D / 2."""
    dead_after_tokens: int | None = None
    """A latent is dead after so many tokens without firing; by default a 10th of the run, at most
    10,000,000."""
    loss: Literal["fvu", "mse"] = "fvu"
    """fvu: squared error over the site's cached variance; mse: per dimension, in the activations'
    own units. Under Adam the two differ by no more than rounding."""
    b_dec_init: Literal["mean", "geometric_median"] = "mean"
    save_every: int = 1000
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between log lines."""
    buffer_tokens: int = 262_144
    """Rows of the shuffling buffer, in whole blocks of 256; two of them are in memory per site, three
    while one is being filled."""
    shuffle_seed: int = 0
    """Seed of the stream's order."""
    mask: MaskConfig | None = None
    """Positions left out; by default those of the store."""
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the encoder's product; auto: bf16 on a GPU and on CPUs with bf16 instructions."""
    resume: bool = True
    """Go on from the run's checkpoint, if there is one; false starts anew."""
    profile: bool = False
    """Write a trace of some steps and a table of where their time goes."""
    log_to_wandb: bool = False
    wandb_project: str | None = None
    """By default saemill."""
    run_name: str | None = None
    """Name of the run in wandb (the variants' group); by default the output folder's."""

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "grad_acc_steps",
            "save_every",
            "log_every",
            "buffer_tokens",
            "max_tokens",
            "epochs",
            "dead_after_tokens",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be 1 or more, got {value}")
        if not 0 <= self.decay_fraction <= 1:
            raise ConfigError(f"lr_decay_fraction must be in [0, 1], got {self.lr_decay_fraction}")
        no_wandb = not self.log_to_wandb
        without_effect = {
            "lr_decay_fraction": (self.lr_decay == "none", "with lr_decay none"),
            "k_aux": (self.auxk_alpha == 0 and not self.variants, "with auxk_alpha 0"),
            "wandb_project": (no_wandb, "without log_to_wandb"),
            "run_name": (no_wandb, "without log_to_wandb"),
        }
        for name, (idle, why) in without_effect.items():
            if idle and getattr(self, name) is not None:
                raise ConfigError(f"{name} has no effect {why}; leave it out")
        if self.max_tokens is not None and self.epochs is not None:
            raise ConfigError("give max_tokens or epochs, not both")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ConfigError(f"warmup_steps must be 0 or more, got {self.warmup_steps}")

    @property
    def decay_fraction(self) -> float:
        """`lr_decay_fraction` with its default."""
        return 0.2 if self.lr_decay_fraction is None else self.lr_decay_fraction

    @property
    def step_tokens(self) -> int:
        """Tokens per optimizer step."""
        return self.batch_size * self.grad_acc_steps

    def identity(self) -> dict[str, Any]:
        """The settings that decide the result."""
        skip = (
            "out",
            "acts",
            "device",
            "resume",
            "save_every",
            "profile",
            "log_to_wandb",
            "wandb_project",
            "run_name",
        )
        return {key: value for key, value in settings.plain(self).items() if key not in skip}


def run(config: TrainConfig) -> list[Path]:
    """Train all variants into `config.out`.

    Returns: the folders of the SAEs.

    Raises:
        ConfigError: settings that contradict each other, the data, or what is in `out`.
        StoreError: a site is missing or damaged.
        Interrupted: a signal came; the same call goes on.
    """
    store = ActivationStore(config.acts)
    with stop_on_signal() as stop, closing(_loader(config, store)) as loader:
        schedule = _schedule(config, loader.epoch_tokens)
        variants = _variants(config, store, list(loader.sites), schedule.n_steps)
        identity = config.identity() | {"acts_fingerprint": store.fingerprint}
        if _finished(config, identity, variants):
            return [config.out / variant.name for variant in variants]
        trainer = _build(config, loader, schedule, variants, stop)
        with durable.exclusive(config.out):
            durable.write_json(config.out / "identity.json", identity)
            settings.write_yaml(config.out / "config.yaml", "train", settings.plain(config))
            trainer.resume()
            _check_profile(trainer)
            _start_sinks(config, trainer, variants)
            _print_plan(config, trainer, variants, store)
            try:
                trainer.run()
            finally:
                for sink in trainer.sinks:
                    sink.close()
            return _export(config, store, trainer, identity)


def _loader(config: TrainConfig, store: ActivationStore) -> Loader:
    named = [str(entry["site"]) for entry in config.variants if "site" in entry]
    sites = list(dict.fromkeys([*config.site, *named]))
    if not sites:
        raise ConfigError(f"name a site with --site; the store has {', '.join(store.sites)}")
    return Loader(
        store,
        sites,
        config.mask or store.mask,
        batch_tokens=config.step_tokens,
        buffer_tokens=config.buffer_tokens,
        seed=config.shuffle_seed,
    )


def _variants(config: TrainConfig, store: ActivationStore, sites: list[str], n_steps: int) -> list[Variant]:
    widths = {site: store.site(site).width for site in sites}
    shared = ("optimizer", "optimizer_state", "weight_decay", "auxk_alpha", "k_aux", "loss", "b_dec_init")
    width_given = config.expansion_factor or config.num_latents
    axes = {
        "site": config.site,
        "k": config.k,
        "expansion_factor": config.expansion_factor if width_given else (8,),
        "num_latents": config.num_latents,
        "lr": config.lr,
        "seed": config.seeds,
    }
    common = {name: getattr(config, name) for name in shared}
    variants = resolve(common, axes, config.variants, widths, n_steps)
    for site in sites:
        if all(variant.site != site for variant in variants):
            raise ConfigError(f"no variant is of site {site}; leave it out")
    return variants


def _finished(config: TrainConfig, identity: dict[str, Any], variants: list[Variant]) -> bool:
    """Whether the run is complete already; refuses a folder made with other settings."""
    settings.check_folder(config.out)
    identity_path, finished_path = config.out / "identity.json", config.out / "finished.json"
    if not identity_path.exists():
        if config.out.exists() and any(config.out.iterdir()):
            raise StoreError(f"{config.out} holds other files; choose a new folder")
        return False
    settings.check_same(durable.read_json(identity_path), identity, config.out)
    if not config.resume:
        (config.out / "checkpoint.pt").unlink(missing_ok=True)
        (config.out / "wandb.json").unlink(missing_ok=True)
        finished_path.unlink(missing_ok=True)
    if finished_path.exists():
        say(
            f"{config.out} is finished already: {counted(len(variants), 'variant')} (--no-resume trains anew)"
        )
        return True
    return False


def _build(
    config: TrainConfig, loader: Loader, schedule: Schedule, variants: list[Variant], stop: Event
) -> Trainer:
    device = choose_device(config.device)
    _check_device(variants, device)
    # Sums of bf16 products stay in float32, as on a CPU.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    store, mask = loader.store, config.mask or loader.store.mask
    n_tokens = schedule.n_steps * config.step_tokens
    dead_after = config.dead_after_tokens or min(MOST_DEAD_AFTER_TOKENS, n_tokens // 10)
    dtype = choose_product_dtype(config.precision, device)
    sample = loader.stretch(0, min(SAMPLE_TOKENS, loader.epoch_tokens))
    frames = {site: _frame(store, site, mask, device) for site in loader.sites}
    banks = []
    for (site, _), members in groups(variants).items():
        frame = frames[site]
        sample_TD = frame.enter(sample[site].to(device))
        banks.append(Bank(members, frame, dtype, dead_after, sample_TD))
    return Trainer(
        loader=loader,
        feed=Feed(loader, device),
        banks=banks,
        schedule=schedule,
        log_every=config.log_every,
        save_every=config.save_every,
        checkpoint_path=config.out / "checkpoint.pt",
        device=device,
        stop=stop,
        profile=config.profile,
    )


def _check_device(variants: list[Variant], device: torch.device) -> None:
    """Refuse what the kernels cannot do."""
    for variant in variants:
        if device.type == "cuda" and variant.optimizer_state == "8bit":
            raise ConfigError(f"{variant.name}: optimizer_state 8bit is for CPUs so far; use bf16 on a GPU")


def _check_profile(trainer: Trainer) -> None:
    left = trainer.schedule.n_steps - trainer.step
    if trainer.profile and left < SKIPPED_STEPS + PROFILED_STEPS:
        raise ConfigError(
            f"--profile needs {SKIPPED_STEPS + PROFILED_STEPS} steps, {left} are left; "
            "raise --max-tokens or lower --batch-size"
        )


def _schedule(config: TrainConfig, epoch_tokens: int) -> Schedule:
    """How many steps there are, and the learning rate over them."""
    step_tokens = config.step_tokens
    n_tokens = config.max_tokens or (config.epochs or 1) * epoch_tokens
    n_steps = n_tokens // step_tokens
    if n_steps == 0:
        raise ConfigError(
            f"{n_tokens:,} training tokens are less than one step of {step_tokens:,}; "
            "lower --batch-size or raise --max-tokens"
        )
    warmup = config.warmup_steps
    return Schedule(
        n_steps=n_steps,
        warmup_steps=min(MOST_WARMUP_STEPS, n_steps // 20) if warmup is None else warmup,
        decay=config.lr_decay,
        decay_steps=round(config.decay_fraction * n_steps),
    )


def _frame(store: ActivationStore, site: str, mask: MaskConfig, device: torch.device) -> Frame:
    """Centre and scale from the site's statistics: E‖x̃‖² = D."""
    statistics = store.site(site).statistics_under(mask)
    if not statistics.total_variance > 0:
        raise StoreError(f"the activations at {site} are all alike: nothing to train on")
    scale = (len(statistics.mean_D) / statistics.total_variance) ** 0.5
    return Frame(statistics.mean_D.float().to(device), scale)


def choose_product_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of the encoder's product: bf16 wherever `auto` finds hardware that is fast at it."""
    if name == "auto":
        fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def _start_sinks(config: TrainConfig, trainer: Trainer, variants: list[Variant]) -> None:
    step_tokens = config.step_tokens
    n_steps = trainer.schedule.n_steps
    sinks: list[Sink] = [
        JsonlSink(config.out / "metrics.jsonl", trainer.step),
        ConsoleSink(n_steps, n_steps * step_tokens),
    ]
    if config.log_to_wandb:
        shared = {key: value for key, value in config.identity().items() if key != "variants"}
        configs = {variant.name: shared | describe(variant) for variant in variants}
        group = config.run_name or config.out.name
        sinks.append(WandbSink(config.wandb_project or "saemill", group, configs, config.out))
    trainer.sinks = sinks


def _print_plan(
    config: TrainConfig, trainer: Trainer, variants: list[Variant], store: ActivationStore
) -> None:
    n_steps = trainer.schedule.n_steps
    n_tokens = n_steps * config.step_tokens
    epochs = n_tokens / trainer.loader.epoch_tokens
    bank = trainer.banks[0]
    say(
        f"{counted(len(variants), 'variant')} in {counted(len(trainer.banks), 'bank')} on {trainer.device}, "
        f"products in "
        f"{str(bank.dtype).removeprefix('torch.')}; {n_steps:,} steps, {n_tokens:,} tokens "
        f"({epochs:.2f} epochs of {trainer.loader.epoch_tokens:,}); dead after "
        f"{bank.dead_after_tokens:,} tokens; {store.tokens.manifest['n_held_out_rows']:,} rows held out"
    )
    if trainer.step:
        say(f"continuing after step {trainer.step:,}")


def _export(
    config: TrainConfig, store: ActivationStore, trainer: Trainer, identity: dict[str, Any]
) -> list[Path]:
    """Write the SAEs, then the mark that the run is finished; the checkpoint is not needed then."""
    folders, diverged = [], {}
    for bank in trainer.banks:
        for i, variant in enumerate(bank.variants):
            step = int(bank.diverged_step_V[i])
            if step >= 0:
                diverged[variant.name] = step
            provenance = {
                "variant": describe(variant),
                "site": variant.site,
                "model": store.settings["model"],
                "model_fingerprint": store.settings["model_fingerprint"],
                "acts_fingerprint": store.fingerprint,
                "tokens_trained": trainer.step * config.step_tokens,
                "input_scale": bank.frame.scale,
                "diverged_at_step": step if step >= 0 else None,
                "versions": {name: version(name) for name in ("saemill", "torch")},
            }
            bank.export(i, provenance).save(config.out / variant.name)
            folders.append(config.out / variant.name)
    finished = {
        "variants": [folder.name for folder in folders],
        "acts": str(config.acts.absolute()),
        "steps": trainer.step,
        "tokens": trainer.step * config.step_tokens,
        "seconds": trainer.seconds,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "diverged": diverged,
        "mask": identity["mask"] or store.settings["mask"],
    }
    durable.write_json(config.out / "finished.json", finished)
    (config.out / "checkpoint.pt").unlink(missing_ok=True)
    say(f"{config.out}: {counted(len(folders), 'SAE')}, trained in {duration(trainer.seconds)}")
    return folders

"""The settings of `saemill train`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from saemill.common import config as settings
from saemill.common.errors import ConfigError
from saemill.common.stores.mask import MaskConfig

ADAM_BETAS = (0.8, 0.95)
"""FVU was lower than with Adam's own (0.9, 0.999) wherever both were tried: `docs/performance-log.md`."""

MOST_SEQUENCES = 512
"""No more make a batch where batches are counted in sequences."""


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
    """Numbers of latents; they override `expansion_factor`."""
    lr: tuple[Literal["auto"] | float, ...] = ("auto",)
    """Peak learning rates; auto: by width, number of latents and steps (`variants.auto_lr`), for adam."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the initial weights."""
    variants: tuple[Mapping[str, Any], ...] = ()
    """Variants listed one by one, each with any of: site, k, num_latents, expansion_factor, lr,
    seed, optimizer, optimizer_state, adam_betas, weight_decay, auxk_alpha, k_aux, loss, b_dec_init, name."""
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
    adam_betas: tuple[float, float] = ADAM_BETAS
    """By how much Adam's two moments are kept at each step."""
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
    kernels: Literal["auto", "torch", "numba", "triton"] = "auto"
    """What makes a step: loops compiled by numba on a CPU, Triton's kernels on a GPU; elsewhere torch, the
    definition by autograd. They differ by rounding."""
    resume: bool = True
    """Go on from the run's checkpoint, if there is one; false starts anew."""
    halving: int = 0
    """Times that the worse half of the variants of each site and k is stopped (`train.halving`)."""
    halving_metric: Literal["fvu", "loss", "dead_fraction"] | None = None
    """By which; fvu by default."""
    data_ranks: int | None = None
    """Of several processes, how many share out each batch's tokens; 1 by default."""
    latent_ranks: int | None = None
    """How many share out each SAE's latents; by default chosen by the estimated time of a step."""
    profile: bool = False
    """Write a trace of some steps and a table of where their time goes."""
    log_to_wandb: bool = False
    """One wandb run per variant, in a group."""
    wandb_project: str | None = None
    """By default WANDB_PROJECT of the environment, else saemill."""
    wandb_entity: str | None = None
    """User or team; by default WANDB_ENTITY, else wandb's own default."""
    run_name: str | None = None
    """Name of the run in wandb (the variants' group); by default the output folder's."""
    wandb_log_frequency: int | None = None
    """Steps between points in wandb, a multiple of `log_every`, which is the default."""
    wandb_artifacts: bool = False
    """Upload each SAE as an artifact."""
    log_to_tensorboard: bool = False
    """Write events for TensorBoard, a folder per variant."""

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
            "data_ranks",
            "latent_ranks",
            "wandb_log_frequency",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be 1 or more, got {value}")
        settings.at_least(self, 1, "k", "expansion_factor", "num_latents", "k_aux")
        settings.at_least(self, 0, "seeds", "shuffle_seed", "weight_decay", "auxk_alpha")
        if not 0 <= self.decay_fraction <= 1:
            raise ConfigError(f"lr_decay_fraction must be in [0, 1], got {self.lr_decay_fraction}")
        no_wandb = not self.log_to_wandb
        without_effect = {
            "lr_decay_fraction": (self.lr_decay == "none", "with lr_decay none"),
            "k_aux": (self.auxk_alpha == 0 and not self.variants, "with auxk_alpha 0"),
            "wandb_project": (no_wandb, "without log_to_wandb"),
            "wandb_entity": (no_wandb, "without log_to_wandb"),
            "run_name": (no_wandb, "without log_to_wandb"),
            "wandb_log_frequency": (no_wandb, "without log_to_wandb"),
            "halving_metric": (self.halving == 0, "without halving"),
        }
        for name, (idle, why) in without_effect.items():
            if idle and getattr(self, name) is not None:
                raise ConfigError(f"{name} has no effect {why}; leave it out")
        if self.wandb_artifacts and no_wandb:
            raise ConfigError("wandb_artifacts has no effect without log_to_wandb; leave it out")
        if self.wandb_log_frequency is not None and self.wandb_log_frequency % self.log_every:
            raise ConfigError(
                f"wandb_log_frequency must be a multiple of log_every ({self.log_every} steps), "
                f"got {self.wandb_log_frequency}"
            )
        if self.max_tokens is not None and self.epochs is not None:
            raise ConfigError("give max_tokens or epochs, not both")
        if self.halving < 0:
            raise ConfigError(f"halving must be 0 or more, got {self.halving}")
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
            "kernels",
            "resume",
            "save_every",
            "log_every",
            "data_ranks",
            "latent_ranks",
            "profile",
            "log_to_wandb",
            "wandb_project",
            "wandb_entity",
            "run_name",
            "wandb_log_frequency",
            "wandb_artifacts",
            "log_to_tensorboard",
        )
        overridden = ("expansion_factor",) if self.num_latents else ()
        return {k: v for k, v in settings.plain(self).items() if k not in (*skip, *overridden)}


def check_batch(batch_size: int, ctx_len: int) -> None:
    """Refuse a batch that was surely meant in sequences, as sparsify counts them: it is no more than a row of
    tokens, and no more than sequences come in.

    Args:
        batch_size: tokens per batch.
        ctx_len: tokens per row; 1 where rows are passages.

    Raises:
        ConfigError: it was.
    """
    most = min(ctx_len, MOST_SEQUENCES)
    if batch_size <= most and ctx_len > 1:
        raise ConfigError(
            f"batch_size counts tokens, and {batch_size} are no more than one row of {ctx_len}; for "
            f"{batch_size} rows, as sparsify counts, say {batch_size * ctx_len}; if tokens are meant, take "
            f"more than {most}"
        )

"""The settings of `saemill train`."""

from dataclasses import dataclass
from typing import Any, Literal

from saemill.common.config import LARGEST
from saemill.common.setting import DEVICE, check, identity, like, setting
from saemill.common.sizes import size_of
from saemill.common.stores.kept_locally import KeptLocally
from saemill.common.stores.mask import TrainingMask
from saemill.train import checks
from saemill.train.architectures import WITH_AUXK
from saemill.train.losses import IN_MODEL, Loss
from saemill.train.saes import BY_DEFAULT, SaeSettings

ADAM_BETAS = (0.8, 0.95)
"""FVU was lower than with Adam's own (0.9, 0.999) wherever both were tried: `docs/performance-log.md`."""

LrSchedule = Literal["constant", "linear", "cosine", "cosine_restarts"]
LrDecay = Literal["none", "linear", "cosine"]
OptimizerName = Literal["adam", "sgd", "signum", "muon"]
FOLLOW_TOKENS = 1 << 20
"""Tokens that a follower mixes by default: 16 shards of the default size."""
ADAMW_DECAY = 0.01
"""Weight decay of adamw by default, torch's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig(SaeSettings):
    """Settings of the stage: the SAEs, how they are trained, and what is kept and shown meanwhile.

    They are flags beside each other, so one class has all; `saes` has those that say what is trained.
    """

    batch_size: int = setting(4096, "Tokens per batch", least=1)
    grad_acc_steps: int = setting(1, "Batches per optimizer step", least=1)
    """No more memory is needed than for the activations: latents are computed in chunks in any case."""
    max_tokens: int | None = setting(None, "Tokens to train on", by_default="one epoch", least=1)
    """More than the store has means several epochs."""
    epochs: int | None = setting(None, "Passes over the store, in place of max-tokens", least=1)
    """1 if neither is given."""
    follow: bool = setting(
        False,
        "Train while `saemill cache` is still filling the store, from its first shard to its last",
        later=True,
    )
    """See `stream.following`."""
    follow_tokens: int | None = setting(
        None,
        "With follow, tokens of consecutive shards that are mixed, in whole shards",
        by_default="1,048,576",
        least=1,
        later=True,
    )
    """A shard is not needed any more when the tokens after it that are mixed with it are trained on."""
    optimizer: Literal["adam", "adamw", "sgd", "signum", "muon"] = setting(
        "adam", "Optimizer", metavar="NAME"
    )
    """adamw is adam with weight decay."""
    optimizer_state: Literal["fp32", "bf16", "8bit"] = setting(
        "fp32", "How Adam's moments are kept", metavar="TYPE"
    )
    """8, 4 or 2 bytes per weight."""
    adam_betas: tuple[float, float] = setting(ADAM_BETAS, "β₁ and β₂ of Adam")
    weight_decay: float | None = setting(
        None,
        "Decoupled weight decay of the encoder",
        by_default="0, with adamw 0.01",
        least=0,
        most=LARGEST,
    )
    """The decoder's rows have unit length and do not decay."""
    clip_grad_norm: float | None = setting(
        None,
        "Norm of the gradient of all parameters to which a larger one is brought",
        by_default="off",
        within="(0, inf)",
    )
    weight_average: float | None = setting(
        None,
        "Share of a moving average of the weights that a step keeps, as 0.999; the SAE has the average",
        by_default="off",
        within="(0, 1)",
    )
    warmup_steps: int | None = setting(
        None, "Optimizer steps of linear warm-up", by_default="a 20th of the run, at most 1000", least=0
    )
    lr_schedule: LrSchedule = setting(
        "constant", "How the rate goes between warm-up and final decay", metavar="KIND"
    )
    lr_end: float | None = setting(
        None,
        "Share of the peak rate at which linear and cosine schedules end",
        by_default="0.1, and 0 with lr-decay none",
        within="[0, 1]",
    )
    lr_cycles: int | None = setting(None, "Times that cosine_restarts goes down", by_default="2", least=1)
    lr_decay: LrDecay = setting("linear", "How the rate falls to 0 at the end", metavar="KIND")
    lr_decay_fraction: float | None = setting(
        None, "Share of the run over which it falls", by_default="0.2", within="[0, 1]"
    )
    auxk_alpha: float = setting(
        1 / 32,
        "Weight of the auxiliary loss, which revives dead latents; 0 turns it off",
        by_default="1/32",
        least=0,
        most=LARGEST,
        only=WITH_AUXK,
    )
    k_aux: int | None = setting(
        None,
        "Dead latents per token in the auxiliary loss",
        by_default="D/2",
        least=1,
        most=LARGEST,
        only=WITH_AUXK,
    )
    dead_after_tokens: int | None = setting(
        None,
        "Tokens without firing after which a latent is dead",
        by_default="a 10th of the run, at most 10M",
        least=1,
    )
    loss: Loss = setting("fvu", "What is minimised", metavar="KIND")
    """fvu: squared error over the site's cached variance; mse: per dimension, in the activations'
    own units. Under Adam the two differ by no more than rounding. ce, kl and mse+kl: `objective.model`."""
    apply_b_dec_to_input: bool = setting(
        True, "Subtract the decoder's bias from what the encoder reads; off, the encoder's has to do for both"
    )
    """SAELens' setting of the name. Transcoders subtract nothing."""
    decoder: tuple[Literal["trained", "frozen"], ...] = setting(
        ("trained",),
        "Whether the decoder's rows are trained, or frozen as they start, a control that assess knows",
        metavar="KIND,…",
        axis="",
        later=True,
    )
    """Frozen random decoders are a control of Korznikov et al. 2026, arXiv 2602.14111."""
    b_dec_init: Literal["mean", "geometric_median"] = setting(
        "mean", "Start of the decoder's bias", metavar="KIND"
    )
    save_every: int = setting(1000, "Steps between checkpoints", decides=False, least=1)
    log_every: int = setting(10, "Steps between log lines", decides=False, least=1)
    eval_every: int | None = setting(
        None,
        "Steps between measurements on held-out rows, a multiple of log-every; 0 for none",
        by_default="a 10th of the run, at least 500",
        decides=False,
        least=0,
    )
    """SAEs are measured as they will be used: with thresholds where they will have them. By default
    none in runs of fewer steps than that, and none of a store without held-out rows."""
    eval_tokens: int | None = setting(
        None, "Most held-out tokens to measure on", by_default="8192", decides=False, least=1
    )
    eval_losses_every: int | None = setting(
        None,
        "Steps between measurements of the model's losses with each SAE spliced in, a multiple of eval-every",
        by_default="none",
        decides=False,
        least=1,
    )
    """Measured at the end as well."""
    eval_losses_tokens: int | None = setting(
        None, "Most tokens for these losses, in whole rows", by_default="4096", decides=False, least=1
    )
    model: str | None = setting(
        None,
        "The model, if not where it was cached from; for eval-losses-every and losses of the model",
        decides=False,
    )
    n_checkpoints: int = setting(
        0, "SAEs to keep of each variant on the way, evenly spaced", decides=False, least=0
    )
    """In RUN/steps/<step>, each a run that can be assessed."""
    buffer_tokens: int = setting(262_144, "Tokens of the shuffling buffer, in whole blocks of 256", least=1)
    """Two buffers are in memory per site."""
    local_cache: str | None = like(KeptLocally, "local_cache")
    shuffle_seed: int = setting(0, "Seed of the stream's order", least=0, most=LARGEST)
    mask: TrainingMask = setting(
        TrainingMask(), "Positions and tokens left out", by_default="those of the store, and far longer ones"
    )
    device: str = setting("auto", DEVICE, decides=False)
    precision: Literal["auto", "fp32", "bf16"] = setting(
        "auto",
        "Type of the encoder's product",
        by_default="auto: bf16 where the hardware is fast at it",
        metavar="TYPE",
    )
    """bf16 is fast on a GPU and on CPUs with bf16 instructions."""
    kernels: Literal["auto", "torch", "numba", "triton"] = setting(
        "auto", "What computes a step", by_default="auto: the fastest installed", decides=False
    )
    """Loops compiled by numba on a CPU, Triton's kernels on a GPU; elsewhere torch, the definition by
    autograd. They differ by rounding."""
    resume: bool = setting(True, "Go on from the run's checkpoint; off starts anew", decides=False)
    halving: int = setting(0, "Times that the worse half of each site and k is stopped early", least=0)
    """See `sweep.halving`."""
    halving_metric: Literal["fvu", "loss", "dead_fraction"] | None = setting(
        None, "Figure that tells the worse half", by_default="fvu"
    )
    data_ranks: int | None = setting(
        None,
        "Of several processes, how many share each batch's tokens",
        by_default="1",
        decides=False,
        least=1,
    )
    latent_ranks: int | None = setting(
        None,
        "Of several processes, how many share each SAE's latents",
        by_default="by the estimated time of a step",
        decides=False,
        least=1,
    )
    profile: bool = setting(
        False, "Show where the time of a step goes; write a trace of some steps", decides=False
    )
    log_to_wandb: bool = setting(False, "One wandb run per variant, in a group", decides=False)
    wandb_project: str | None = setting(
        None, "The project in wandb", by_default="WANDB_PROJECT, or saemill", decides=False
    )
    wandb_entity: str | None = setting(
        None, "User or team in wandb", by_default="WANDB_ENTITY, or wandb's default", decides=False
    )
    run_name: str | None = setting(
        None, "The variants' group in wandb", by_default="the folder's name", decides=False
    )
    wandb_log_frequency: int | None = setting(
        None,
        "Steps between points in wandb, a multiple of log-every",
        by_default="log-every",
        decides=False,
        least=1,
    )
    wandb_artifacts: bool = setting(False, "Upload each SAE as an artifact", decides=False)
    log_to_tensorboard: bool = setting(False, "Events for TensorBoard, in RUN/tensorboard", decides=False)

    def __post_init__(self) -> None:
        check(self)
        checks.together(self)
        if self.local_cache is not None:
            size_of(self.local_cache, "local_cache")

    @property
    def runs_model(self) -> bool:
        """Whether the loss of some variant is the model's."""
        return any(loss in IN_MODEL for loss in (self.loss, *(entry.get("loss") for entry in self.variants)))

    @property
    def group_tokens(self) -> int:
        """`follow_tokens` with its default."""
        return self.follow_tokens or FOLLOW_TOKENS

    @property
    def decay_fraction(self) -> float:
        """`lr_decay_fraction` with its default."""
        return 0.2 if self.lr_decay_fraction is None else self.lr_decay_fraction

    @property
    def course_end(self) -> float:
        """`lr_end` with its default; 1 where the rate is constant."""
        if self.lr_schedule == "constant":
            return 1.0
        return (0.0 if self.lr_decay == "none" else 0.1) if self.lr_end is None else self.lr_end

    @property
    def step_tokens(self) -> int:
        """Tokens per optimizer step."""
        return self.batch_size * self.grad_acc_steps

    def identity(self) -> dict[str, Any]:
        """Collect the settings that decide the result."""
        decisive = identity(self)
        if self.init_from is None:
            decisive |= {name: [value] for name, value in BY_DEFAULT.items() if not decisive[name]}
        if self.follow:
            decisive["follow_tokens"] = self.group_tokens
        if self.num_latents:
            del decisive["expansion_factor"]
        return decisive

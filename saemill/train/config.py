"""The settings of `saemill train`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from saemill.common.config import LARGEST
from saemill.common.setting import DEVICE, about, check, identity, like, setting
from saemill.common.sizes import size_of
from saemill.common.stores.kept_locally import KeptLocally
from saemill.common.stores.mask import TrainingMask
from saemill.train import checks
from saemill.train.architectures import BY_K, BY_L1, WITH_AUXK, Architecture
from saemill.train.losses import IN_MODEL, Loss

ADAM_BETAS = (0.8, 0.95)
"""FVU was lower than with Adam's own (0.9, 0.999) wherever both were tried: `docs/performance-log.md`."""

BY_DEFAULT: dict[str, Any] = {"architecture": "topk", "k": 32, "l1_coefficient": 0.05}
"""Values of what is left open, where SAEs start from random directions."""

LrSchedule = Literal["constant", "linear", "cosine", "cosine_restarts"]
LrDecay = Literal["none", "linear", "cosine"]
OptimizerName = Literal["adam", "sgd", "signum", "muon"]
FOLLOW_TOKENS = 1 << 20
"""Tokens that a follower mixes by default: 16 shards of the default size."""
ADAMW_DECAY = 0.01
"""Weight decay of adamw by default, torch's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Settings of the stage. Lists form a grid: every combination is a variant."""

    acts: Path = field(metadata=about("A folder made by `saemill cache`", decides=False))
    out: Path = field(metadata=about("Folder of the run", decides=False))
    with_acts: Path | None = setting(
        None,
        "A store of another model's activations at the same tokens, whose sites are called with.SITE",
        by_default="none",
        decides=False,
    )
    """For crosscoders of two models: `site` names what they join."""
    site: tuple[str, ...] = setting(
        (),
        "Site to train on, or a glob, or several joined by + for a crosscoder; repeat or separate by commas",
        metavar="SITE,…",
        axis="",
    )
    """Required unless each of `variants` names its own. `layers.2+layers.4` joins sites of one store,
    `layers.4+with.layers.4` those of two models."""
    target_site: tuple[str, ...] = setting(
        (),
        "Site that is predicted from SITE, which makes the SAEs transcoders; one for each SITE, in order; a "
        "glob for a glob",
        metavar="SITE,…",
    )
    """Of the same store, such as the output of an MLP whose input is SITE."""
    cross_layer: bool = setting(
        False,
        "Join SITEs and targets, in the order of the layers, into one cross-layer transcoder",
        decides=False,
    )
    """Latents of each SITE predict its target and all later ones. The names that they are joined to decide:
    `layers.0.mlp:in+layers.1.mlp:in` and `layers.0.mlp+layers.1.mlp`, which may be given without it."""
    skip_connection: bool = setting(
        False, "Give transcoders a linear map from SITE to the target, beside their latents"
    )
    init_from: str | None = setting(
        None,
        "What SAEs start from: a run, an SAE of any format that is read, or hf://user/repo/folder",
        by_default="random directions",
        metavar="RUN|SAE",
        decides=False,
    )
    """Its content decides, not its place: `sweep.sources.identity`."""
    architecture: tuple[Architecture, ...] = setting(
        (), "Architectures of the SAEs", by_default="topk, or as init-from has it", metavar="NAME,…", axis=""
    )
    """See docs/architectures.md."""
    k: tuple[int | float, ...] = setting(
        (),
        "Active latents per token",
        by_default="32, or as init-from has it",
        metavar="K,…",
        axis="k",
        least=1,
        most=LARGEST,
        only=BY_K,
    )
    """On the average of a batch with batchtopk, where it may be a fraction."""
    k_anneal_steps: int = setting(
        0, "Steps over which k falls from D to its value", least=0, only=("topk", "batchtopk")
    )
    multi_topk: bool = setting(
        False, "Fit the 4 k largest codes as well, with an eighth of the weight", only=("topk",)
    )
    """As sparsify's setting of the name."""
    nested_k: tuple[int, ...] = setting(
        (), "Smaller numbers of codes that are to fit as well", metavar="K,…", least=1, only=("topk",)
    )
    """One SAE for several k: the mean of the squared errors is minimised (HierarchicalTopK)."""
    prefixes: tuple[int | float, ...] = setting(
        (),
        "Prefixes of the latents that are to fit alone, as numbers of latents or shares of F",
        by_default="1/32, 3/32, 7/32, 15/32 of F, and all",
        metavar="N,…",
        least=0,
        only=("matryoshka",),
    )
    """Numbers below 1 are shares; all latents are always the last prefix."""
    matryoshka_rule: Literal["batchtopk", "topk"] = setting(
        "batchtopk", "How its latents are chosen", metavar="RULE", only=("matryoshka",)
    )
    target_l0: tuple[float, ...] = setting(
        (),
        "Active latents per token that the penalty leads to",
        by_default="32, or as init-from has it",
        metavar="L0,…",
        axis="target",
        least=1,
        only=("jumprelu",),
    )
    l0_coefficient: tuple[float, ...] = setting(
        (),
        "Weight of the number of active latents, in place of a target",
        metavar="X,…",
        axis="l0c",
        least=0,
        only=("jumprelu",),
    )
    """Of the loss FVU + x · L0."""
    sparsity_penalty: Literal["step", "tanh"] = setting(
        "step",
        "What is penalised: whether a latent is active, or tanh of 4 times its code",
        metavar="KIND",
        only=("jumprelu",),
    )
    bandwidth: float | None = setting(
        None,
        "Width around a threshold in which it learns, in units in which E‖x‖² = 1",
        by_default="half of the threshold",
        least=1e-6,
        only=("jumprelu",),
    )
    """ε of the straight-through gradient, one for all latents."""
    preact_coefficient: float = setting(
        0.0,
        "Weight of how far dead latents are below their threshold, which they learn in place of auxk_alpha's",
        least=0,
        only=("jumprelu",),
    )
    """Anthropic's pre-activation loss, 3e-6 there."""
    most_density: float | None = setting(
        None,
        "Share of tokens above which a latent is penalised for firing",
        within="(0, 1]",
        by_default="no bound",
        only=("jumprelu",),
    )
    l1_coefficient: tuple[float, ...] = setting(
        (),
        "Weight of the sum of the codes",
        by_default="0.05, or as init-from has it",
        metavar="X,…",
        axis="l1c",
        least=0,
        only=BY_L1,
    )
    """Of the loss FVU + x · Σ f, with f in units in which E‖x‖² = 1."""
    lp_norm: float = setting(1.0, "Power of the codes in the penalty", least=0.1, most=2, only=("relu",))
    decoder_rows: Literal["unit", "free"] = setting(
        "unit",
        "Whether decoder rows are of unit length, or free with their norms in the penalty",
        metavar="KIND",
        only=("relu",),
    )
    resample_at: tuple[int, ...] = setting(
        (),
        "Steps at which dead latents begin again from tokens that are badly reconstructed",
        by_default="none",
        metavar="STEP,…",
        least=1,
        only=("relu",),
    )
    """As in Bricken et al. 2023: `learner.resampling`."""
    penalty_warmup_steps: int | None = setting(
        None,
        "Steps over which the penalty rises to its weight",
        by_default="a 10th of the run",
        least=0,
        only=("jumprelu", *BY_L1),
    )
    expansion_factor: tuple[int, ...] = setting(
        (),
        "Latents as multiples of D",
        by_default="8, or as init-from has it",
        axis="",
        least=1,
        most=LARGEST,
    )
    num_latents: tuple[int, ...] = setting(
        (), "Latents, in place of the factor", axis="f", least=1, most=LARGEST
    )
    lr: tuple[Literal["auto"] | float, ...] = setting(
        ("auto",), "Peak learning rates; auto goes by width, latents and steps", metavar="LR,…", axis="lr"
    )
    """auto is for all but sgd: `variants.auto_lr`."""
    seeds: tuple[int, ...] = setting((0,), "Seeds of the initial weights", axis="s", least=0, most=LARGEST)
    variants: tuple[Mapping[str, Any], ...] = setting((), "Variants listed one by one")
    """Each with any of the settings of `variant.Variant`, or expansion_factor."""
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
    def architectures(self) -> tuple[Architecture, ...]:
        """`architecture` with its default; empty where it is that of what SAEs start from."""
        return self.architecture or (() if self.init_from else ("topk",))

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

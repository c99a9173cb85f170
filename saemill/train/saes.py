"""The settings of `saemill train` that say which SAEs are trained: on which sites, of which architectures."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from saemill.common.config import LARGEST
from saemill.common.setting import about, setting
from saemill.train.architectures import BY_K, BY_L1, PENALISED, Architecture

BY_DEFAULT: dict[str, Any] = {"architecture": "topk", "k": 32, "l1_coefficient": 0.05}
"""Values of what is left open, where SAEs start from random directions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaeSettings:
    """Settings of the SAEs of a run. Lists form a grid: every combination is a variant."""

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
        within="(0, inf)",
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
        only=PENALISED,
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

    @property
    def architectures(self) -> tuple[Architecture, ...]:
        """`architecture` with its default; empty where it is that of what SAEs start from."""
        return self.architecture or (() if self.init_from else ("topk",))

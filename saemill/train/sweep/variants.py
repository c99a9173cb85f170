"""Variants: the SAEs that one run trains, as a grid of lists or an explicit list."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from saemill.common.config import build, coerce
from saemill.common.errors import ConfigError
from saemill.common.stores.runs import check_variant_name
from saemill.train.config import ADAM_BETAS, TrainConfig

ADAM_ALONE = ("optimizer_state", "adam_betas")
"""Settings without effect on another optimizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One SAE to be trained, all settings resolved."""

    name: str
    """Unique in the run; the name of its folder, so none of the run's own files."""
    site: str
    k: int
    num_latents: int
    lr: float
    """Peak learning rate."""
    seed: int = 0
    """Seed of the initial decoder."""
    optimizer: Literal["adam", "sgd"] = "adam"
    optimizer_state: Literal["fp32", "bf16", "8bit"] = "fp32"
    """How Adam's moments are kept: 8, 4 or 2 bytes per weight."""
    adam_betas: tuple[float, float] = ADAM_BETAS
    """By how much they are kept at each step."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the encoder's weights; the decoder's rows have unit length."""
    auxk_alpha: float = 1 / 32
    """Weight of the auxiliary loss; 0 turns it off."""
    k_aux: int
    """Dead latents that reconstruct the residual of each token."""
    loss: Literal["fvu", "mse"] = "fvu"
    b_dec_init: Literal["mean", "geometric_median"] = "mean"

    def __post_init__(self) -> None:
        check_variant_name(self.name)
        if not 1 <= self.k <= self.num_latents:
            raise ConfigError(f"k must be in 1..{self.num_latents} (the number of latents), got {self.k}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"lr must be positive, got {self.lr}")
        if self.optimizer != "adam" and self.optimizer_state != "fp32":
            raise ConfigError(f"optimizer_state {self.optimizer_state} has an effect with adam only")
        if self.optimizer != "adam" and self.adam_betas != ADAM_BETAS:
            raise ConfigError("adam_betas have an effect with adam only; leave them out")
        if len(self.adam_betas) != 2 or not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ConfigError(f"adam_betas must be two numbers from 0 to below 1, got {self.adam_betas}")
        for name in ("weight_decay", "auxk_alpha"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.k_aux < 1:
            raise ConfigError(f"k_aux must be 1 or more, got {self.k_aux}")


def auto_lr(num_latents: int, d: int, n_steps: int) -> float:
    """Adam's peak rate: 0.08/√D · √(2^12 / F) · (100 / steps)^0.3, at most 0.16/√D.

    Rows have unit length, so a weight is about 1/√D; with √F as in Gao et al. 2024 (figure 3). The last
    factor was fitted on the residual streams of two models at 32 to 460 steps; at Gao's 60,000 steps
    for GPT-2 the whole meets their 2e-4 at F = 2^14. Beyond the bound no rate was found to be better.
    """
    share = 0.08 * math.sqrt(2**12 / num_latents) * math.pow(100 / n_steps, 0.3)
    return min(0.16, share) / math.sqrt(d)


def of_config(config: TrainConfig, widths: Mapping[str, int], n_steps: int) -> list[Variant]:
    """All variants of a run.

    Args:
        config: of the run.
        widths: D of each site.
        n_steps: of the run.

    Raises:
        ConfigError: contradicting, unknown or missing settings; a site without a variant.
    """
    shared = (
        "optimizer",
        "optimizer_state",
        "adam_betas",
        "weight_decay",
        "auxk_alpha",
        "k_aux",
        "loss",
        "b_dec_init",
    )
    axes = {
        "site": config.site,
        "k": config.k,
        "expansion_factor": () if config.num_latents else config.expansion_factor or (8,),
        "num_latents": config.num_latents,
        "lr": config.lr,
        "seed": config.seeds,
    }
    common = {name: getattr(config, name) for name in shared}
    variants = resolve(common, axes, config.variants, widths, n_steps)
    for site in widths:
        if all(variant.site != site for variant in variants):
            raise ConfigError(f"no variant is of site {site}; leave it out")
    return variants


def resolve(
    common: Mapping[str, Any],
    axes: Mapping[str, tuple[Any, ...]],
    explicit: tuple[Mapping[str, Any], ...],
    widths: Mapping[str, int],
    n_steps: int,
) -> list[Variant]:
    """All variants of a run.

    Args:
        common: settings shared by all variants.
        axes: lists of `site`, `k`, `expansion_factor`, `num_latents`, `lr`, `seed`; empty ones are
            left out. Every combination is a variant.
        explicit: variants listed one by one; what one leaves out comes from `common` and from
            axes with a single value. With it, no combinations are formed.
        widths: D of each site.
        n_steps: of the run.

    Raises:
        ConfigError: contradicting, unknown or missing settings; two variants alike.
    """
    axes = {name: values for name, values in axes.items() if values}
    if explicit:
        for name, values in axes.items():
            if len(values) > 1 and name != "site":
                raise ConfigError(f"variants are listed one by one; give one {name} for them, got {values}")
        single = {name: values[0] for name, values in axes.items() if len(values) == 1}
        entries = [_fill_in(dict(entry), single, axes) for entry in explicit]
    else:
        entries = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    variants = [
        _variant({**_inherited(common, entry), **entry}, widths, f"variants[{i}]", n_steps)
        for i, entry in enumerate(entries)
    ]
    names = [variant.name for variant in variants]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two variants are called {name!r}; leave one out or name them apart")
    return variants


def _inherited(common: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """What a variant takes from the run: not Adam's settings where it names another optimizer itself."""
    other = entry.get("optimizer", "adam") != "adam"
    return {name: value for name, value in common.items() if not (other and name in ADAM_ALONE)}


def _fill_in(entry: dict[str, Any], single: dict[str, Any], axes: Mapping[str, Any]) -> dict[str, Any]:
    width_given = {"expansion_factor", "num_latents"} & set(entry)
    for name in axes:
        if name in entry or (width_given and name in ("expansion_factor", "num_latents")):
            continue
        if name not in single:
            raise ConfigError(f"variant {entry} gives no {name}, and the run has several")
        entry[name] = single[name]
    return entry


def _variant(entry: dict[str, Any], widths: Mapping[str, int], where: str, n_steps: int) -> Variant:
    site = entry["site"]
    if site not in widths:
        raise ConfigError(f"variant of site {site!r}: name the site with --site too")
    d = widths[site]
    if entry.get("expansion_factor") is not None:
        if entry.get("num_latents") is not None:
            raise ConfigError(f"a variant has expansion_factor or num_latents, not both: {entry}")
        factor = coerce(entry["expansion_factor"], int, f"{where}.expansion_factor")
        if factor < 1:
            raise ConfigError(f"expansion_factor must be 1 or more, got {factor}")
        entry["num_latents"] = d * factor
    entry.pop("expansion_factor", None)
    if entry.get("k_aux") is None:
        entry["k_aux"] = max(1, d // 2)
    n = coerce(entry["num_latents"], int, f"{where}.num_latents")
    k, seed = (coerce(entry.get(key, 0), int, f"{where}.{key}") for key in ("k", "seed"))
    lr = coerce(entry.get("lr", "auto"), Literal["auto"] | float, f"{where}.lr")
    name = f"{site}-k{k}-f{n}-s{seed}"
    if lr == "auto":
        if entry.get("optimizer", "adam") != "adam":
            raise ConfigError("lr auto is known for adam only; give --lr for sgd")
        entry["lr"] = auto_lr(n, d, n_steps)
    else:
        name += f"-lr{lr:g}"
    return build(Variant, {"name": name, **entry}, where)


def describe(variant: Variant) -> dict[str, Any]:
    """A variant's settings as plain values."""
    return dataclasses.asdict(variant)

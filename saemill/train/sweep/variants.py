"""Variants: the SAEs that one run trains, as a grid of lists or an explicit list."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, get_args, get_type_hints

from saemill.common.config import build, coerce
from saemill.common.errors import ConfigError
from saemill.common.setting import axes as axes_of
from saemill.common.setting import default_of, written
from saemill.common.stores.site_names import folder_of, is_joined, parts_of
from saemill.train.architectures import no_effect
from saemill.train.checks import of_architectures
from saemill.train.config import ADAMW_DECAY, TrainConfig
from saemill.train.saes import BY_DEFAULT
from saemill.train.sweep.grid import applies, entries_of
from saemill.train.sweep.sources import Source, Sources, fill_in
from saemill.train.sweep.variant import TARGET_L0, WITHOUT_SIGNUM, Variant

OF_AUXK = ("auxk_alpha", "k_aux")
"""Settings without effect where the pre-activations of dead latents are pulled."""
ADAM_ALONE = ("optimizer_state", "adam_betas")
"""Settings without effect on another optimizer."""
MUON_OVER_ADAM = 2.0
"""Muon's best rates over Adam's, measured: docs/performance-log.md."""
ONE_OF_GRID = {"seeds": "seed"}
"""What one value of a list is called, where it has another name than the list."""
NOT_SHARED = ("name", "target_site", "init_from", "init_content")
"""Settings that a variant has by itself."""
NO_SOURCES: Sources = MappingProxyType({})
IN_EVERY_NAME = ("site", "architecture", "k", "expansion_factor", "num_latents", "seed")
"""Axes of the grid that the name of every variant shows; the widths as the number of latents."""
PREFIX_SHARES = (1 / 32, 3 / 32, 7 / 32, 15 / 32)
"""Matryoshka's prefixes, as shares of the latents, beside all of them (dictionary_learning's groups)."""


def auto_lr(num_latents: int, d: int, n_steps: int) -> float:
    """Compute Adam's peak rate: 0.08/√D · √(2^12 / F) · (100 / steps)^0.3, at most 0.16/√D.

    Rows have unit length, so a weight is about 1/√D; with √F as in Gao et al. 2024 (figure 3). The last
    factor was fitted on the residual streams of two models at 32 to 460 steps; at Gao's 60,000 steps
    for GPT-2 the whole meets their 2e-4 at F = 2^14. Beyond the bound no rate was found to be better.
    """
    share = 0.08 * math.sqrt(2**12 / num_latents) * math.pow(100 / n_steps, 0.3)
    return min(0.16, share) / math.sqrt(d)


def _auto_lr(optimizer: str, num_latents: int, d: int, n_steps: int) -> float:
    """Compute an optimizer's peak rate."""
    if optimizer == "sgd":
        raise ConfigError("lr auto is not known for sgd; give --lr")
    if optimizer == "signum":
        return 5e-3 * math.sqrt(2**14 / num_latents)
    of_adam = auto_lr(num_latents, d, n_steps)
    return MUON_OVER_ADAM * of_adam if optimizer == "muon" else of_adam


def of_config(
    config: TrainConfig, widths: Mapping[str, int], n_steps: int, sources: Sources = NO_SOURCES
) -> list[Variant]:
    """List all variants of a run.

    Args:
        config: of the run.
        widths: D of each site.
        n_steps: of the run.
        sources: what they start from, where not from random directions.

    Raises:
        ConfigError: contradicting, unknown or missing settings; a site without a variant.
    """
    axes = {ONE_OF_GRID.get(name, name): getattr(config, name) for name in axes_of(TrainConfig)}
    if config.num_latents:
        axes["expansion_factor"] = ()
    elif not config.init_from:
        axes["expansion_factor"] = config.expansion_factor or (8,)
    own = [field.name for field in dataclasses.fields(Variant) if field.name not in NOT_SHARED]
    common = {name: getattr(config, name) for name in own if name not in axes}
    targets = dict(zip(config.site, config.target_site, strict=False))
    of_run = sources.get(config.init_from or "", ())
    if of_run:
        of_architectures(config, config.architectures or tuple(s.config.architecture for s in of_run))
    variants = resolve(common, axes, config.variants, widths, n_steps, targets, sources, of_run)
    with_dead = [variant for variant in variants if applies("auxk_alpha", variant.architecture)]
    if with_dead and all(variant.preact_coefficient for variant in with_dead):
        _without_auxk(name for name in OF_AUXK if getattr(config, name) != default_of(TrainConfig, name))
    if config.kernels == "triton" and any(variant.n_layers > 1 for variant in variants):
        raise ConfigError(
            "kernels triton do not step a cross-layer transcoder, which torch does on a GPU; leave kernels "
            "out"
        )
    for site in widths:
        if all(site not in variant.sites for variant in variants):
            raise ConfigError(f"no variant is of site {site}; leave it out")
    return variants


def resolve(
    common: Mapping[str, Any],
    axes: Mapping[str, tuple[Any, ...]],
    explicit: tuple[Mapping[str, Any], ...],
    widths: Mapping[str, int],
    n_steps: int,
    targets: Mapping[str, str] = MappingProxyType({}),
    sources: Sources = NO_SOURCES,
    of_run: tuple[Source, ...] = (),
) -> list[Variant]:
    """List all variants of a run.

    Args:
        common: settings shared by all variants.
        axes: lists of `site`, `k`, `expansion_factor`, `num_latents`, `lr`, `seed` and other settings
            of a variant; empty ones are left out. Every combination is a variant.
        explicit: variants listed one by one; what one leaves out comes from `common` and from
            axes with a single value. With it, no combinations are formed.
        widths: D of each site.
        n_steps: of the run.
        targets: the site that is predicted, of those sites that are transcoders'.
        sources: what listed variants name to start from.
        of_run: what the run starts from: each combination is a variant of each of these.

    Raises:
        ConfigError: contradicting, unknown or missing settings; two variants alike.
    """
    variants = []
    for i, (entry, source) in enumerate(entries_of(axes, explicit, sources, of_run)):
        of_auxk = [name for name in OF_AUXK if entry.get(name) is not None]
        predicted = None if source is None else (*source.sites, None, None)[1]
        entry.setdefault("target_site", targets.get(entry["site"], predicted))
        if source is not None:
            d, e = (_width(widths, entry[name] or entry["site"]) for name in ("site", "target_site"))
            fill_in(entry, source, common, d, e)
        variant = _variant({**_inherited(common, entry), **entry}, widths, f"variants[{i}]", n_steps)
        if variant.preact_coefficient:
            _without_auxk(of_auxk)
        variants.append(variant)
    names = [variant.name for variant in variants]
    for name in names:
        if names.count(name) > 1:
            how = "start from one SAE alone, RUN/NAME" if of_run else "name them apart"
            raise ConfigError(f"two variants are called {name!r}; leave one out or {how}")
    return variants


def _without_auxk(said: Iterable[str]) -> None:
    """Refuse settings of AuxK where dead latents learn otherwise."""
    for name in said:
        raise ConfigError(
            f"{name} has no effect with preact_coefficient, which takes its place; leave one of them out"
        )


def _width(widths: Mapping[str, int], site: str) -> int:
    """Return the width of a site.

    Raises:
        ConfigError: it is none of the run's.
    """
    if site not in widths:
        raise ConfigError(f"variant of site {site!r}: name the site with --site too")
    return widths[site]


def _inherited(common: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """Collect what a variant takes from the run: not what an optimizer that it names does without."""
    optimizer, architecture = entry.get("optimizer", "adam"), entry.get("architecture", "topk")
    without = () if optimizer in ("adam", "adamw") else ADAM_ALONE
    if optimizer == "signum":
        without = (*without, *WITHOUT_SIGNUM)
    without = (*without, "skip_connection" if entry.get("target_site") is None else "apply_b_dec_to_input")
    return {
        name: value for name, value in common.items() if name not in without and applies(name, architecture)
    }


def _variant(entry: dict[str, Any], widths: Mapping[str, int], where: str, n_steps: int) -> Variant:
    site, target = entry["site"], entry.get("target_site")
    d = _width(widths, site)
    if entry.get("expansion_factor") is not None:
        if entry.get("num_latents") is not None:
            raise ConfigError(f"a variant has expansion_factor or num_latents, not both: {entry}")
        factor = coerce(entry["expansion_factor"], int, f"{where}.expansion_factor")
        if factor < 1:
            raise ConfigError(f"expansion_factor must be 1 or more, got {factor}")
        entry["num_latents"] = d * factor
    entry.pop("expansion_factor", None)
    n, seed = (coerce(entry.get(key, 0), int, f"{where}.{key}") for key in ("num_latents", "seed"))
    _complete(entry, d, n, n_steps, where)
    place = folder_of(_place(site, target, bool(entry.get("skip_connection"))))
    name = f"{place}{_kind(entry, where)}-f{n}-s{seed}" + "".join(_apart(entry, where))
    _name_adam(entry)
    if entry.get("lr", "auto") == "auto":
        entry["lr"] = _auto_lr(entry.get("optimizer", "adam"), n, d, n_steps)
    return build(Variant, {"name": name, **entry}, where)


def _place(site: str, target: str | None, has_skip: bool) -> str:
    """Phrase where an SAE is, as names of variants show it; of a cross-layer transcoder by its first site and
    its last, as a folder's name has not room for all."""
    if target is None:
        return site
    skip = "-skip" if has_skip else ""
    if is_joined(target):
        return f"{parts_of(site)[0]}-to-{parts_of(target)[-1]}-cross-layer{skip}"
    return f"{site}-to-{target}{skip}"


def _complete(entry: dict[str, Any], d: int, n_latents: int, n_steps: int, where: str) -> None:
    """Fill in the defaults of an entry's architecture, in place.

    Raises:
        ConfigError: it has settings that have no effect on its architecture.
    """
    architecture = entry.get("architecture", "topk")
    for name in entry:
        if not applies(name, architecture):
            raise ConfigError(no_effect(name, architecture))
    if applies("k", architecture):
        entry.setdefault("k", BY_DEFAULT["k"])
    if applies("k_aux", architecture) and entry.get("k_aux") is None:
        entry["k_aux"] = max(1, d // 2)
    if applies("prefixes", architecture):
        prefixes = entry.get("prefixes") or PREFIX_SHARES
        entry["prefixes"] = _prefixes(
            coerce(prefixes, tuple[int | float, ...], f"{where}.prefixes"), n_latents
        )
    if applies("target_l0", architecture):
        if entry.get("target_l0") is not None and entry.get("l0_coefficient") is not None:
            raise ConfigError("give target_l0 or l0_coefficient, not both")
        if entry.get("l0_coefficient") is None:
            entry["target_l0"] = entry.get("target_l0") or TARGET_L0
            if entry.get("sparsity_penalty") == "tanh":
                raise ConfigError("sparsity_penalty tanh leads to no target_l0; give l0_coefficient")
        if entry.get("sparsity_penalty") == "tanh" and entry.get("most_density") is not None:
            raise ConfigError("most_density has no effect with sparsity_penalty tanh; leave one of them out")
    if applies("l1_coefficient", architecture) and entry.get("l1_coefficient") is None:
        entry["l1_coefficient"] = BY_DEFAULT["l1_coefficient"]
    if applies("penalty_warmup_steps", architecture) and entry.get("penalty_warmup_steps") is None:
        entry["penalty_warmup_steps"] = n_steps // 10
    _check_rises(entry, n_steps, where)
    resample_at = coerce(entry.get("resample_at", ()), tuple[int, ...], f"{where}.resample_at")
    if late := [step for step in resample_at if step >= n_steps]:
        raise ConfigError(
            f"resample_at {late[0]:,} is not before the run's end, after {n_steps:,} steps; lower it"
        )


def _check_rises(entry: Mapping[str, Any], n_steps: int, where: str) -> None:
    """Refuse a k and a penalty that would not be at their value by the end of the run."""
    for name in ("k_anneal_steps", "penalty_warmup_steps"):
        steps = coerce(entry.get(name) or 0, int, f"{where}.{name}")
        if steps and steps >= n_steps:
            raise ConfigError(
                f"{name} must be fewer than the run's {n_steps:,} steps, got {steps:,}; lower it or train "
                "longer"
            )


def _name_adam(entry: dict[str, Any]) -> None:
    """Fill in the weight decay of an entry, in place, and call adamw what it is: adam with some."""
    is_adamw = entry.get("optimizer") == "adamw"
    if entry.get("weight_decay") is None:
        entry["weight_decay"] = ADAMW_DECAY if is_adamw else 0.0
    if is_adamw:
        if entry["weight_decay"] == 0:
            raise ConfigError("adamw with weight_decay 0 is adam; say adam, or leave weight_decay out")
        entry["optimizer"] = "adam"


def _prefixes(given: tuple[int | float, ...], n_latents: int) -> tuple[int, ...]:
    """Turn shares into numbers of latents, with all latents as the last."""
    prefixes = tuple(max(1, round(p * n_latents)) if p < 1 else round(p) for p in given)
    if prefixes[-1] != n_latents:
        prefixes = (*prefixes, n_latents)
    if any(p != round(p) for p in given if p >= 1) or list(prefixes) != sorted(set(prefixes)):
        raise ConfigError(
            "prefixes must be whole numbers of latents or shares below 1, ascending up to all of "
            f"{n_latents}, got {','.join(map(written, given))}"
        )
    return prefixes


def _kind(entry: Mapping[str, Any], where: str) -> str:
    """Phrase the architecture and its k, as names of variants show them."""
    architecture = entry.get("architecture", "topk")
    text = "" if architecture == "topk" else f"-{architecture}"
    if "k" in entry:
        text += f"-k{written(coerce(entry['k'], int | float, f'{where}.k'))}"
    return text


def _apart(entry: Mapping[str, Any], where: str) -> Iterator[str]:
    """Yield what tells a variant apart by name: its values on axes that not every name shows, where they are
    not as by default."""
    hints = get_type_hints(TrainConfig)
    for name, sign in axes_of(TrainConfig).items():
        if ONE_OF_GRID.get(name, name) not in IN_EVERY_NAME and entry.get(name) is not None:
            kind, default = (
                get_args(hints[name])[0],
                (*default_of(TrainConfig, name), BY_DEFAULT.get(name))[0],
            )
            value = coerce(entry[name], kind, f"{where}.{name}")
            if value != default:
                yield f"-{sign}{written(value)}"


def describe(variant: Variant) -> dict[str, Any]:
    """Return a variant's settings as plain values."""
    return dataclasses.asdict(variant)

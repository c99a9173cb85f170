"""Settings of `saemill train` that do not go together."""

from typing import TYPE_CHECKING

from saemill.common.addresses import address_of
from saemill.common.errors import ConfigError
from saemill.common.setting import default_of, of
from saemill.common.stores.site_names import BESIDE, JOINT, is_joined, parts_of
from saemill.train.architectures import no_effect

if TYPE_CHECKING:
    from saemill.train.config import TrainConfig

MULTIPLES = (
    ("wandb_log_frequency", "log_every"),
    ("eval_every", "log_every"),
    ("eval_losses_every", "log_every"),
    ("eval_losses_every", "eval_every"),
)
"""Steps between events that come with others, and the steps between those."""


def together(config: "TrainConfig") -> None:
    """Refuse settings that contradict each other or have no effect."""
    no_wandb = not config.log_to_wandb
    without_effect = {
        "lr_end": (config.lr_schedule == "constant", "with lr_schedule constant"),
        "lr_cycles": (config.lr_schedule != "cosine_restarts", "without lr_schedule cosine_restarts"),
        "lr_decay_fraction": (config.lr_decay == "none", "with lr_decay none"),
        "k_aux": (config.auxk_alpha == 0 and not config.variants, "with auxk_alpha 0"),
        "wandb_project": (no_wandb, "without log_to_wandb"),
        "wandb_entity": (no_wandb, "without log_to_wandb"),
        "run_name": (no_wandb, "without log_to_wandb"),
        "wandb_log_frequency": (no_wandb, "without log_to_wandb"),
        "halving_metric": (config.halving == 0, "without halving"),
        "eval_tokens": (config.eval_every == 0, "with eval_every 0"),
        "eval_losses_every": (config.eval_every == 0, "with eval_every 0"),
        "eval_losses_tokens": (config.eval_losses_every is None, "without eval_losses_every"),
        "model": (
            config.eval_losses_every is None and not config.runs_model,
            "without eval_losses_every or a loss of the model",
        ),
    }
    for name, (idle, why) in without_effect.items():
        if idle and getattr(config, name) is not None:
            raise ConfigError(f"{name} has no effect {why}; leave it out")
    if config.lr_end == 0 and config.lr_decay != "none":
        raise ConfigError(f"lr_decay {config.lr_decay} has no effect with lr_end 0; say lr_decay none")
    if config.init_from is None:
        of_architectures(config, config.architectures)
    else:
        _starts(config)
    _targets(config)
    if config.cross_layer and not (config.site and config.target_site):
        raise ConfigError(
            "cross_layer joins the sites that site and target_site name; give both, or name joined ones in "
            "variants and leave it out"
        )
    _joined(config)
    _follow(config)
    if config.wandb_artifacts and no_wandb:
        raise ConfigError("wandb_artifacts has no effect without log_to_wandb; leave it out")
    for name, base in MULTIPLES:
        value, of_steps = getattr(config, name), getattr(config, base)
        if value and of_steps and value % of_steps:
            raise ConfigError(f"{name} must be a multiple of {base} ({of_steps} steps), got {value}")
    if config.max_tokens is not None and config.epochs is not None:
        raise ConfigError("give max_tokens or epochs, not both")


def of_architectures(config: "TrainConfig", names: tuple[str, ...]) -> None:
    """Refuse settings that have an effect on none of the run's architectures.

    Args:
        config: of the run.
        names: the architectures, beside those that listed variants name.
    """
    named = [entry["architecture"] for entry in config.variants if "architecture" in entry]
    for name, marks in of(type(config)).items():
        is_default = getattr(config, name) == default_of(type(config), name)
        if marks.only and not is_default and not set(marks.only) & {*names, *named}:
            raise ConfigError(no_effect(name, names[0]))


def _starts(config: "TrainConfig") -> None:
    """Refuse settings of a random start, where SAEs start from others."""
    for name in ("seeds", "b_dec_init"):
        if getattr(config, name) != default_of(type(config), name):
            raise ConfigError(f"{name} has no effect with init_from, which has the weights; leave it out")


def _targets(config: "TrainConfig") -> None:
    """Refuse targets that do not go with the sites."""
    if config.target_site and len(config.target_site) != len(config.site):
        raise ConfigError(
            f"target_site names one site for each of site, in order; got {len(config.target_site)} for "
            f"{len(config.site)}"
        )
    if config.target_site and len(set(config.site)) < len(config.site):
        raise ConfigError("with target_site each of site is named once; train other targets in other runs")
    own = [bool(config.target_site or "target_site" in entry) for entry in config.variants or ({},)]
    if config.skip_connection and not any(own):
        raise ConfigError("skip_connection has no effect without target_site; leave it out, or name one")
    if not config.apply_b_dec_to_input and all(own):
        raise ConfigError("apply_b_dec_to_input has no effect with target_site; leave it out")


def _follow(config: "TrainConfig") -> None:
    """Refuse what a store that is still being filled cannot serve."""
    if not config.follow:
        if config.follow_tokens is not None:
            raise ConfigError("follow_tokens has no effect without follow; leave it out")
        return
    later = "or train without follow when the store is finished"
    if address := address_of(config.acts):
        raise ConfigError(f"follow reads a store on a disk, and {address} is on none; leave it out, {later}")
    if config.local_cache is not None:
        raise ConfigError(f"local_cache has no effect with follow, which reads a disk; leave it out, {later}")
    if (config.epochs or 1) > 1:
        raise ConfigError(
            f"epochs {config.epochs}: follow goes through the store once; leave it out, {later}"
        )
    if config.with_acts is not None:
        raise ConfigError(f"with_acts: follow reads one store; leave it out, {later}")
    if config.runs_model:
        raise ConfigError(
            f"follow has no stream of whole rows, which losses of the model need: take fvu, {later}"
        )
    if globs := [site for site in (*config.site, *config.target_site) if "*" in site]:
        raise ConfigError(
            f"site {globs[0]!r}: with follow each site must be named in full, as the store may not have all "
            "of them yet"
        )


def _joined(config: "TrainConfig") -> None:
    """Refuse joined sites that name none, and settings that they have no meaning for."""
    sites = [*config.site, *(str(entry["site"]) for entry in config.variants if entry.get("site"))]
    joined = {site: parts_of(site) for site in sites}
    of_beside = [site for site, parts in joined.items() if any(part.startswith(BESIDE) for part in parts)]
    alone = [site for site in of_beside if len(joined[site]) == 1]
    if alone and config.with_acts is not None:
        raise ConfigError(
            f"site {alone[0]} is of with_acts alone; train it from that store, or join it: "
            f"{alone[0].removeprefix(BESIDE)}{JOINT}{alone[0]}"
        )
    if of_beside and not alone and config.with_acts is None:
        raise ConfigError(
            f"site {of_beside[0]} joins one of another store; name that with --with-acts, or join those of "
            "one store, as layers.2+layers.4"
        )
    if config.with_acts is not None and not of_beside:
        site = config.site[0] if config.site else "layers.4"
        raise ConfigError(
            "with_acts has no effect: no site of the run is of it; join one, as "
            f"--site {site}{JOINT}{BESIDE}{site}"
        )
    if config.eval_losses_every is not None and (config.cross_layer or any(map(is_joined, sites))):
        raise ConfigError(
            "eval_losses_every: the losses of crosscoders and cross-layer transcoders, which are spliced in "
            "at several sites, are measured by `saemill assess` alone; leave it out"
        )

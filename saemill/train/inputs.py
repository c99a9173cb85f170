"""What a run reads: the sites that it trains on, the stream over them, and the model where a loss is its."""

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from saemill.common.errors import ConfigError, StoreError
from saemill.common.stores.activations import ActivationStore, keep_locally
from saemill.common.stores.followed import FollowedStore
from saemill.common.stores.followers import Consumed
from saemill.common.stores.site_names import abridged, is_joined
from saemill.common.stores.tokens import TokenStore
from saemill.common.world import Group
from saemill.train.config import TrainConfig
from saemill.train.sites import with_sites
from saemill.train.stream import units
from saemill.train.stream.epochs import open_epochs
from saemill.train.stream.following import open_following
from saemill.train.stream.loader import Loader
from saemill.train.stream.scaling import MOST_SCALE
from saemill.train.stream.whole_rows import WholeRows
from saemill.train.sweep.sources import Sources, sites_of
from saemill.train.sweep.variant import Variant

if TYPE_CHECKING:
    from saemill.train.objective.model import ModelLoss


def with_site(
    config: TrainConfig, sites: list[str], sources: Sources, consumed: Consumed | None = None
) -> TrainConfig:
    """Fill in what globs match; where no site is named, those of what SAEs start from, or the only one.

    Args:
        config: of the run.
        sites: those that the store has, or will have.
        sources: what SAEs start from.
        consumed: what the store says of shards that were removed; None where none was.

    Raises:
        ConfigError: a glob matches nothing, or there are several sites and none is named.
        StoreError: there is none any more.
    """
    if config.site or any("site" in entry for entry in config.variants):
        return with_sites(config, sites)
    if of_sources := sites_of(sources):
        return replace(config, site=of_sources)
    if config.follow:
        raise ConfigError("follow: name the site with --site, as the store may not have all of them yet")
    if not sites and consumed:
        raise StoreError(consumed.refusal(consumed.sites[0], config.acts))
    if len(sites) != 1:
        has = f"it has {', '.join(sites)}" if sites else "none of it is finished"
        raise ConfigError(f"name a site of {config.acts} with --site; {has}")
    return replace(config, site=tuple(sites))


def open_store(config: TrainConfig) -> ActivationStore:
    """Open the store, or with `follow` what is there of it.

    Raises:
        StoreError: it is none, or damaged.
        ConfigError: it cannot be followed.
    """
    if not config.follow:
        store = ActivationStore(config.acts, config.with_acts)
        keep_locally([store], config.local_cache)
        return store
    followed = FollowedStore(config.acts, config.group_tokens)
    if not isinstance(followed.text, TokenStore):
        raise ConfigError(f"follow: {config.acts} holds embeddings, which are there as a whole; leave it out")
    return followed


def open_stream(
    config: TrainConfig, store: ActivationStore, sources: Sources, run_hash: str
) -> Loader | WholeRows:
    """Open the stream: of tokens, or where a loss is the model's of whole rows.

    Args:
        config: of the run.
        store: as `open_store` opens it.
        sources: what SAEs start from.
        run_hash: the hash that names the run.
    """
    if config.runs_model and not isinstance(store.text, TokenStore):
        raise ConfigError("loss: embeddings have no language model; take fvu or mse")
    names = ("site", "target_site")
    variant_sites = [str(entry[name]) for entry in config.variants for name in names if entry.get(name)]
    predicted = [] if config.target_site else [s.sites[1:] for each in sources.values() for s in each]
    sites = [*config.site, *config.target_site, *variant_sites, *itertools.chain(*predicted)]
    sites = list(dict.fromkeys(sites))
    if config.runs_model and (joined := [site for site in sites if is_joined(site)]):
        raise ConfigError(
            f"losses of the model read rows of single sites, and {abridged(joined[0])} joins several; use "
            "loss fvu, or train it in a run of its own"
        )
    mask = config.mask.positions(store.mask)
    about: dict[str, Any] = {
        "norm_over_median": config.mask.norm_over_median,
        "batch_tokens": config.step_tokens,
        "buffer_tokens": config.buffer_tokens,
        "seed": config.shuffle_seed,
    }
    if isinstance(store, FollowedStore):
        known = units.read(config.out, run_hash) if config.resume else None
        return open_following(store, sites, mask, units=known, **about)
    return (WholeRows if config.runs_model else open_epochs)(store, sites, mask, **about)


def load_model_loss(
    config: TrainConfig, store: ActivationStore, everyone: Group, device: torch.device
) -> "ModelLoss | None":
    """Load the model on every process, if a loss is its."""
    if not config.runs_model:
        return None
    from saemill.train.objective.model import ModelLoss  # imports transformers

    loaded: list[ModelLoss] = []
    everyone.together(lambda: loaded.append(ModelLoss(store, config.model, device)))
    return loaded[0]


def check_mse(loader: Loader | WholeRows, variants: list[Variant]) -> None:
    """Refuse a loss in units of which float32 does not hold the squares."""
    mse = {variant.sites[-1] for variant in variants if variant.loss in ("mse", "mse+kl")}  # none is joined
    for site in mse:
        variance = loader.rows.statistics(site).total_variance
        if not MOST_SCALE**-0.75 < variance < MOST_SCALE**0.75:
            raise ConfigError(
                f"mse is in the units of the activations at {site}, whose variance is {variance:.0e}: "
                "its gradient is beyond float32; use loss fvu"
            )

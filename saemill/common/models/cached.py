"""The model whose activations are in a store: loaded as it was cached, and checked to be the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saemill.common.errors import ConfigError
from saemill.common.log import say
from saemill.common.models.model import (
    LanguageModel,
    attention_of,
    check_fit,
    fingerprint_given,
    fingerprint_model,
    fingerprint_weights,
    name_of,
)
from saemill.common.models.sites import load_model_config
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.site_names import module_of
from saemill.common.stores.site_records import IN_MEMORY, StoreSettings
from saemill.common.stores.tokens import TokenStore
from saemill.common.weights import AS_GIVEN, Weights, bits_of

SAME_ACTIVATIONS = 0.05
"""Relative difference up to which two runs of one model may round apart."""


def load_model(
    other_name: str | None,
    store: ActivationStore,
    other: TokenStore | None,
    device: torch.device,
    given: Any = None,
    spread: Weights = AS_GIVEN,
    flag: str = "--model",
) -> LanguageModel:
    """Load the model in the dtype, and in all else, that it was cached with.

    Args:
        other_name: another name of it; None for the one that was cached.
        store: its activations.
        other: tokens that it must be able to read.
        device: where it runs.
        given: the model itself, where it is in memory.
        spread: over which devices, where one is too small.
        flag: what names another one.

    Raises:
        ConfigError: it cannot be loaded, or cannot read the other tokens.
    """
    if given is not None:
        model = LanguageModel(
            name_of(given), revision=None, dtype=given.dtype, device=given.device, with_head=True, given=given
        )
        if other is not None:
            model.check_tokens(other)
        return model
    name, revision = _name_and_revision(other_name, store)
    if name.endswith(IN_MEMORY):
        raise ConfigError(
            f"{store.path} was cached from a model in memory ({name.removesuffix(IN_MEMORY)}); name that "
            f"model with {flag}"
            + (", or from Python give it as assess_saes(run, model=…)" if flag == "--model" else "")
        )
    if other_name is None and Path(name).is_absolute() and not Path(name).is_dir():
        raise ConfigError(
            f"{store.path} was cached from {name}, which is no longer there; say where with {flag}"
        )
    if other is not None:
        trusts = bool(store.settings.trust_remote_code)
        check_fit(load_model_config(name, revision, trusts), name, other, trusts)
    how = how_cached(store.settings, spread)
    return LanguageModel(name, revision=revision, device=device, with_head=True, **how)


def how_cached(settings: StoreSettings, spread: Weights = AS_GIVEN) -> dict[str, Any]:
    """Return how a store's model was loaded, as arguments of `LanguageModel`, spread over devices or not."""
    return {
        "dtype": getattr(torch, str(settings.model_dtype)),
        "weights": replace(spread, n_bits=bits_of(settings.load_in_8bit, settings.load_in_4bit)),
        "trust_remote_code": bool(settings.trust_remote_code),
        "attn_implementation": settings.attn_implementation,
    }


def _name_and_revision(other_name: str | None, store: ActivationStore) -> tuple[str, str | None]:
    """Return the name and revision of the model: those that were cached, unless another name is given."""
    name = other_name or str(store.settings.model)
    return name, store.settings.revision if name == store.settings.model else None


def check_given(model: LanguageModel, store: ActivationStore) -> str:
    """Refuse another model in memory than the one that was cached, as `check_model` does.

    Returns: what was compared.

    Raises:
        ConfigError: its activations differ.
    """
    if fingerprint_given(model.model) == store.settings.model_fingerprint:
        return "the very model that was cached"
    _check_activations(model, store)
    return _compared(model.name, store)


def check_model(
    other_name: str | None, model: LanguageModel, store: ActivationStore, flag: str = "--model"
) -> str:
    """Refuse another model than the one that was cached; arguments as of `load_model`.

    Returns: what was compared. A hub id then and a folder now, and the like, have only activations in common.

    Raises:
        ConfigError: its weights or its activations differ.
    """
    name, revision = _name_and_revision(other_name, store)
    trusts = bool(store.settings.trust_remote_code)
    if fingerprint_model(name, revision, trusts) == store.settings.model_fingerprint:
        return "the very files that were cached"
    cached, here = store.settings.weights_fingerprint, fingerprint_weights(name)
    is_known = cached is not None and here is not None
    changed_since = name == store.settings.model and Path(name).is_dir()
    if cached != here if is_known else changed_since:
        when = "its files have changed since" if changed_since else "its weights differ"
        raise ConfigError(_another_model(name, when, flag))
    _check_activations(model, store, flag)
    if is_known:
        return "the weights that were cached, in other files"
    return _compared(name, store)


def _compared(name: str, store: ActivationStore) -> str:
    """Say what could be compared where weights could not, and warn the user."""
    compared = (
        f"only the activations at {', '.join(store.sites_with(0))} could be compared with the model that was "
        f"cached; what {name} computes after them, the head included, could not"
        if store.sites_with(0)
        else f"{name} could not be compared with the model that was cached, whose first activations are gone"
    )
    say(f"{compared}: the losses are right only if it is the same model")
    return compared


def _check_activations(model: LanguageModel, store: ActivationStore, flag: str = "--model") -> None:
    """Refuse a model that does not compute what was cached, at every site, on the first row."""
    model.check_tokens(store.tokens)
    sites = store.sites_with(0)
    if missing := [site for site in store.sites if module_of(site) not in model.modules]:
        raise ConfigError(_another_model(model.name, f"it has no {missing[0]}", flag))
    ids_RS = torch.from_numpy(store.tokens.rows(0, 1).astype(np.int64))
    captured = model.capture(ids_RS, sites, attention_of(ids_RS, store.tokens.tokenizer))
    for site in sites:
        x_TD = captured[site][0].double().cpu()
        cached_TD = store.read(site, 0, store.ctx_len).double()
        if not _agree(x_TD, cached_TD):
            raise ConfigError(_another_model(model.name, f"its activations at {site} differ", flag))


def _agree(x_TD: torch.Tensor, cached_TD: torch.Tensor) -> bool:
    """Tell whether most tokens' activations are the same but for rounding. An attention sink, larger than all
    others together, counts as one token."""
    if x_TD.shape != cached_TD.shape:
        return False
    close_T = (x_TD - cached_TD).norm(dim=1) <= SAME_ACTIVATIONS * cached_TD.norm(dim=1)
    return bool(close_T.float().mean() > 0.5)


def _another_model(name: str, why: str, flag: str) -> str:
    return (
        f"{name} is another model than the one that was cached: {why}; name the right one with {flag}, or "
        "cache this one"
    )

"""What is assessed: the SAEs of a finished run, the activations that they were trained on, the model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saemill.assess import features
from saemill.assess.config import AssessConfig
from saemill.assess.evalset import check_tokens, is_cached
from saemill.assess.frozen import frozen_twins
from saemill.assess.together import together
from saemill.common.addresses import is_there
from saemill.common.config import nearest
from saemill.common.errors import ConfigError, StoreError
from saemill.common.models.cached import check_given, check_model, load_model
from saemill.common.models.model import LanguageModel
from saemill.common.sae import formats, of_run
from saemill.common.sae.sae import Sae
from saemill.common.stores import runs
from saemill.common.stores.activations import ActivationStore, keep_locally
from saemill.common.stores.followed import FollowedStore
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.passages import PassageStore
from saemill.common.stores.site_names import parts_of
from saemill.common.stores.site_records import CONSUMED
from saemill.common.stores.tokens import TokenStore


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished run, opened."""

    store: ActivationStore
    saes: dict[str, Sae]
    left_out: dict[str, tuple[Sae, str]]
    """Variants that diverged or were stopped early, and the reason: listed, not measured."""
    mask: MaskConfig
    is_imported: bool
    """Whether the SAEs were trained elsewhere, on text that is not known."""
    sets: dict[str, Sae]
    """Transcoders of one layer each that are measured together, as `together` makes them."""

    @property
    def sites(self) -> list[str]:
        """List the sites that SAEs reconstruct or predict, and those that transcoders read; of crosscoders
        those that they join as well, one by one."""
        every = (str(site) for sae in self.measured.values() for site in (sae.target_site, sae.site))
        return list(dict.fromkeys(name for site in every for name in (site, *parts_of(site))))

    @property
    def measured(self) -> dict[str, Sae]:
        """Return the SAEs and the sets."""
        return self.saes | self.sets

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """Map each variant's name to what it was trained by, as far as its SAE tells."""
        every = {**self.saes, **{name: sae for name, (sae, _) in self.left_out.items()}}
        return {name: sae.config.provenance.get("variant") or {} for name, sae in every.items()}


def open_run(config: AssessConfig, device: torch.device) -> Trained:
    """Open the run, with its SAEs on a device.

    Raises:
        StoreError: it is unfinished, its activations are not to be found, or no variant is worth measuring.
        ConfigError: variants or latents are named that it does not have.
    """
    if not runs.is_finished(config.run) and formats.is_sae(config.run):
        raise ConfigError(
            f"{config.run} is an SAE, and no run; make one of it, on cached activations, with "
            f"`saemill import {config.run} --acts STORE -o RUN`"
        )
    if not runs.is_finished(config.run):
        raise StoreError(
            f"{config.run} is no finished run ({runs.FINISHED} is missing); finish it with `saemill train`"
        )
    finished = runs.finished(config.run)
    path = config.acts or Path(finished.acts)
    if not is_there(path):
        raise StoreError(f"the run's activations are no longer at {path}; say where with --acts")
    store = _open_store(path, _beside(config, finished))
    keep_locally([store], config.local_cache)
    saes = {name: of_run.load(config.run, name, finished, device) for name in finished.variants}
    for name, sae in saes.items():
        if sae.config.provenance["acts_fingerprint"] != store.fingerprint:
            raise StoreError(f"{name} was not trained on {path}; name the right store with --acts")
    left_out = {name: (saes.pop(name), reason) for name, reason in _left_out(finished).items()}
    if not saes:
        raise StoreError(f"every variant of {config.run} diverged; train again at lower learning rates")
    if config.variant is not None and config.variant not in saes:
        raise ConfigError(f"no variant {config.variant!r}; {nearest(config.variant, saes)}")
    if config.variant in frozen_twins(saes).values():
        raise ConfigError(
            f"variant {config.variant!r} is the control of another, alike but for its frozen decoder; "
            f"name one of {', '.join(frozen_twins(saes))}, or see its latents by `saemill latent`"
        )
    may_be_shown = saes.values() if config.variant is None else [saes[config.variant]]
    features.check_latents(config.latents, [sae.config.num_latents for sae in may_be_shown])
    sets = together(saes) if config.together else {}
    return Trained(store, saes, left_out, finished.mask, bool(finished.imported), sets)


def _open_store(path: Path, beside: Path | None) -> ActivationStore:
    """Open the activations; of a store whose shards were removed when they had been trained on, what is left
    of it."""
    store = ActivationStore(path, beside)
    was_followed = store.consumed is not None or (store.path / CONSUMED).exists()
    return FollowedStore(path) if beside is None and was_followed else store


def _beside(config: AssessConfig, finished: runs.Finished) -> Path | None:
    """Find the store of the second model, of a run on two."""
    if finished.with_acts is None:
        if config.with_acts is not None:
            raise ConfigError("with_acts has no effect on a run on one model; leave it out")
        return None
    path = config.with_acts or Path(finished.with_acts)
    if not is_there(path):
        raise StoreError(f"the run's second activations are no longer at {path}; say where with --with-acts")
    return path


def _left_out(finished: runs.Finished) -> dict[str, str]:
    """List the variants that are not worth measuring, each with the reason."""
    reasons = {name: f"diverged at step {step:,}" for name, step in finished.diverged.items()}
    for name, stopped in finished.stopped.items():
        value = "diverged" if stopped.value is None else f"{stopped.metric} {stopped.value:.4g}"
        reasons[name] = f"stopped by halving at step {stopped.step:,}: {value}"
        if stopped.best is not None:
            reasons[name] += f", the best {stopped.best:.4g}"
    return reasons


def open_tokens(config: AssessConfig, trained: Trained) -> TokenStore | None:
    """Open the tokens that are named instead of the held-out rows, if any are.

    Raises:
        ConfigError: they do not fit the run, or no row is held out.
    """
    if isinstance(trained.store.text, PassageStore):
        for name in ("model", "tokens"):
            if getattr(config, name) is not None:
                raise ConfigError(
                    f"{name} has no effect on embeddings, which have no language model; leave it out"
                )
    other = TokenStore(config.tokens) if config.tokens else None
    if trained.store.beside is not None and other is not None and not is_cached(trained.store, other):
        raise ConfigError(
            "tokens: a crosscoder of two models is measured on tokens that both have cached; leave it out"
        )
    check_tokens(trained.store, other, config.with_model)
    if other is not None:
        trained.mask.check(other.tokenizer.vocab_size, other.ctx_len, other.manifest.roles)
    return other


def open_models(
    config: AssessConfig, trained: Trained, other: TokenStore | None, device: torch.device, given: Any = None
) -> tuple[list[LanguageModel], str | None]:
    """Load the model, if one is run, and say what shows that it is the one that was cached; of a run on two
    models both, one behind the other. `given` is the first itself where it is in memory.

    Raises:
        ConfigError: one is another one, or cannot be loaded.
    """
    store, beside = trained.store, trained.store.beside
    if config.with_acts_model is not None and beside is None:
        raise ConfigError("with_acts_model has no effect on a run on one model; leave it out")
    if not config.with_model or not isinstance(store.text, TokenStore):
        return [], None
    model = load_model(config.model, store, other, device, given, config.spread)
    check = check_model(config.model, model, store) if given is None else check_given(model, store)
    if beside is None:
        return [model], check
    name, flag = config.with_acts_model, "--with-acts-model"
    second = load_model(name, beside, None, model.device, spread=config.spread, flag=flag)
    return [model, second], f"{check}; of the second model {check_model(name, second, beside, flag)}"

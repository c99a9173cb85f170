"""At which steps SAEs are measured on held-out text, and on how much of it."""

from dataclasses import dataclass

from saemill.common.errors import ConfigError
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.tokens import TokenStore
from saemill.train.config import TrainConfig

TOKENS, LOSSES_TOKENS = 8192, 4096
"""Tokens to measure on where nobody says how many."""
TIMES_PER_RUN = 10
LEAST_STEPS = 500
"""Fewest steps between measurements where nobody says how many: so they take less than 1% of the time."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps at which all SAEs are measured."""

    every: int
    """Steps between measurements; each run, and each variant that is stopped, ends with one."""
    n_tokens: int
    """Most held-out tokens."""
    losses_every: int | None = None
    """Steps between measurements that run the model as well, a multiple of `every`; None for none."""
    losses_tokens: int = 0
    """Most tokens that it runs on, in whole rows."""

    def is_due(self, step: int, is_last: bool) -> bool:
        """Tell whether SAEs are measured after a step."""
        return is_last or step % self.every == 0

    def describe(self) -> str:
        """Describe it for the plan of the run, behind the number of held-out rows."""
        losses = f", with the model every {self.losses_every:,}" if self.losses_every else ""
        return f", to measure on every {self.every:,} steps{losses}"

    def has_losses(self, step: int, is_last: bool) -> bool:
        """Tell whether the model is run as well."""
        return self.losses_every is not None and (is_last or step % self.losses_every == 0)


def plan_of(config: TrainConfig, store: ActivationStore, mask: MaskConfig, n_steps: int) -> Plan | None:
    """Choose the steps.

    Args:
        config: of the run.
        store: what it is trained on.
        mask: positions left out.
        n_steps: of the run.

    Returns: None where nothing is measured: as asked, or by default in a short run or without held-out rows.

    Raises:
        ConfigError: what is asked for cannot be measured.
    """
    every, n_tokens = _every(config, n_steps), tokens_of(config, n_steps)
    has_tokens = bool(every) and _has_held_out(store, mask)
    if n_tokens and has_tokens:
        if config.eval_losses_every is not None and not isinstance(store.text, TokenStore):
            raise ConfigError("eval_losses_every: embeddings have no language model; leave it out")
        losses_tokens = config.eval_losses_tokens or LOSSES_TOKENS
        return Plan(every, n_tokens, config.eval_losses_every, losses_tokens)
    for name in ("eval_every", "eval_losses_every", "eval_tokens"):
        if getattr(config, name) and not has_tokens:
            raise ConfigError(
                f"{name} has no effect: {store.path} has no held-out {store.text.unit}s; leave it out, or "
                "make the store's text anew with --held-out-fraction above 0"
            )
        if getattr(config, name):
            raise ConfigError(
                f"{name} has no effect: the first measurement would be at step {every:,}, and the run has "
                f"{n_steps:,}; lower --eval-every"
            )
    return None


def tokens_of(config: TrainConfig, n_steps: int) -> int:
    """Choose on how many held-out tokens SAEs are measured, at most; 0 where that is not asked for, or the
    run ends before the first time."""
    return (config.eval_tokens or TOKENS) if 0 < _every(config, n_steps) <= n_steps else 0


def _every(config: TrainConfig, n_steps: int) -> int:
    """Choose the steps between measurements; 0 for none."""
    return _by_default(config, n_steps) if config.eval_every is None else config.eval_every


def _has_held_out(store: ActivationStore, mask: MaskConfig) -> bool:
    """Tell whether a token is held out and not masked."""
    return bool(store.text.held_out_R.any()) and any(
        store.keep_addresses(shard, mask, held_out=True).any() for shard in range(store.n_shards)
    )


def _by_default(config: TrainConfig, n_steps: int) -> int:
    """Choose steps at which a line is logged anyway."""
    steps = config.eval_losses_every or max(LEAST_STEPS, n_steps // TIMES_PER_RUN)
    return -(-steps // config.log_every) * config.log_every

"""The check, before anything is cached, that a token store has enough rows to train and to assess on."""

import math
from dataclasses import replace
from typing import Any

from saemill.cache.config import CacheConfig
from saemill.common.errors import ConfigError
from saemill.common.log import say
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.tokens import TokenStore
from saemill.train.batch import MOST_SEQUENCES
from saemill.train.config import TrainConfig

FEWEST_STEPS = 8
"""Steps of a run whose batch is chosen to fit a short text."""
READ_ROWS = 4096


def check_rows(tokens: TokenStore, configs: dict[str, Any], batch_is_set: bool) -> dict[str, Any]:
    """Fit the settings to the rows: no assessment where nothing is held out, and a smaller batch where a
    default one is more than there is. Both are reported.

    Args:
        tokens: the rows.
        configs: of the stages.
        batch_is_set: whether the user named the size of a batch.

    Raises:
        ConfigError: there is nothing to train on, or less than one step of it.
    """
    n_rows = _n_rows(tokens, configs.get("cache"))
    n_held_out = int(tokens.held_out_R[:n_rows].sum())
    if "train" in configs:
        if n_held_out == n_rows:
            raise ConfigError(
                f"all {n_rows:,} rows of {tokens.path} are held out, none is left to train on; lower "
                "--held-out-fraction (0 trains on all of them), or take more documents"
            )
        training = _fitted(configs["train"], tokens, configs.get("cache"), n_rows, batch_is_set)
        configs = configs | {"train": training}
    if "assess" in configs and configs["assess"].tokens is None and n_held_out == 0:
        say(
            f"no row of {tokens.path} is held out: the SAEs will not be assessed. Take more documents, raise "
            "--held-out-fraction, or assess on other text with --set assess.tokens=STORE"
        )
        configs = {stage: config for stage, config in configs.items() if stage != "assess"}
    return configs


def _n_rows(tokens: TokenStore, cache: CacheConfig | None) -> int:
    """Count the rows that will be cached."""
    limit = cache.max_tokens if cache else None
    return tokens.n_rows if limit is None else min(tokens.n_rows, limit // tokens.ctx_len)


def _fitted(
    config: TrainConfig, tokens: TokenStore, cache: CacheConfig | None, n_rows: int, batch_is_set: bool
) -> TrainConfig:
    """Fit the settings of a training that has one step at least."""
    mask = config.mask.positions((cache.mask if cache else None) or MaskConfig())
    mask.check(tokens.tokenizer.vocab_size, tokens.ctx_len, tokens.manifest.roles)
    if config.max_tokens is not None and config.max_tokens >= config.step_tokens:
        return config
    n_epoch = _n_unmasked(tokens, mask, n_rows, config.step_tokens)
    n_tokens = config.max_tokens or (config.epochs or 1) * n_epoch
    if n_tokens >= config.step_tokens:
        return config
    sequences = min(MOST_SEQUENCES, tokens.ctx_len)
    largest = n_tokens // config.grad_acc_steps
    batch = largest // FEWEST_STEPS
    if not batch_is_set and batch > sequences:
        batch = 2 ** int(math.log2(batch))
        if batch > sequences:
            say(
                f"{n_tokens:,} training tokens are less than one step of {config.step_tokens:,}: trained in "
                f"batches of {batch:,}"
            )
            return replace(config, batch_size=batch)
    more = math.ceil(config.step_tokens / n_epoch)
    advice = (
        f"raise train.max_tokens to {config.step_tokens}" if config.max_tokens else f"say --epochs {more}"
    )
    lower = f", or lower --batch-size, to {sequences + 1} .. {largest}" if largest > sequences else ""
    raise ConfigError(
        f"{n_tokens:,} training tokens are less than one step of {config.step_tokens:,}; {advice}{lower}"
    )


def _n_unmasked(tokens: TokenStore, mask: MaskConfig, n_rows: int, enough: int) -> int:
    """Count the training tokens that the mask leaves, until there are enough."""
    n_unmasked = 0
    for start in range(0, n_rows, READ_ROWS):
        end = min(start + READ_ROWS, n_rows)
        n_unmasked += int(tokens.keep(start, end, mask)[~tokens.held_out_R[start:end]].sum())
        if n_unmasked >= enough:
            break
    if n_unmasked == 0:
        raise ConfigError(f"the mask leaves no token of the training rows of {tokens.path}; take out less")
    return n_unmasked

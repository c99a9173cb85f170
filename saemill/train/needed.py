"""Which shards a run that follows a store needs: told from the tokens, before there is a store.

A run keeps the first ones to its end, as many as hold the held-out tokens that it measures on; beside these
it needs those of a group and of the next one together.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from saemill.common.stores.followed import grouped
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.tokens import TokenStore
from saemill.train.config import TrainConfig
from saemill.train.following import held_out_shards
from saemill.train.stream.following import shards_at_once
from saemill.train.sweep.schedule import schedule_of
from saemill.train.watch.plan import tokens_of


class Needed(NamedTuple):
    """Numbers of shards."""

    kept: int
    """Those of the first ones, which are kept to the end."""
    together: int
    """Most that are on the disk at once: those, and consecutive ones that are needed at a time."""


def needed_of(
    config: TrainConfig, trained: Sequence[int], held_out: Sequence[int], shard_tokens: int
) -> Needed:
    """Work out what a run will need.

    Args:
        config: of the run, with `follow`.
        trained: numbers of tokens that it trains on, by shard.
        held_out: numbers of held-out tokens that it may measure on, by shard.
        shard_tokens: all tokens of a shard.

    Raises:
        ConfigError: fewer steps than one, or than the course needs; more than a follower reads.
    """
    groups = grouped(len(trained), shard_tokens, config.group_tokens)
    starts = np.cumsum([0, *(sum(trained[shards.start : shards.stop]) for shards in groups)])
    n_steps = schedule_of(config, int(starts[-1]), "tokens").n_steps
    kept = held_out_shards(held_out, tokens_of(config, n_steps) if any(held_out) else 0)
    at_once = shards_at_once(groups, starts, config.step_tokens)
    return Needed(kept, min(kept + at_once, len(trained)))


def counted_by_shard(
    tokens: TokenStore, n_rows: int, shard_tokens: int, mask: MaskConfig
) -> tuple[list[int], list[int]]:
    """Count the tokens that a mask leaves in each shard: those that are trained on, and those held out.

    Args:
        tokens: that will be cached.
        n_rows: how many rows of them.
        shard_tokens: tokens per shard, in whole rows.
        mask: of the run.
    """
    trained, held_out, rows = [], [], shard_tokens // tokens.ctx_len
    for first in range(0, n_rows, rows):
        stop = min(first + rows, n_rows)
        keep_RS, held_out_R = tokens.keep(first, stop, mask), tokens.held_out_R[first:stop]
        trained.append(int(keep_RS[~held_out_R].sum()))
        held_out.append(int(keep_RS[held_out_R].sum()))
    return trained, held_out

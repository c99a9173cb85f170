"""The outlook of stages whose input is not there yet, from what the stages before them will leave."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from saemill.assess import outlook as assess
from saemill.assess.config import PROBE_EXAMPLES, AssessConfig
from saemill.cache.config import CacheConfig
from saemill.cache.outlook import model_bytes
from saemill.cache.plan import look_ahead
from saemill.common.config import nearest
from saemill.common.errors import ConfigError
from saemill.common.log import counted
from saemill.common.models.architecture import Architecture
from saemill.common.models.model import head_of
from saemill.common.models.sites import load_model_config
from saemill.common.outlook import Outlook, shown
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.site_names import BESIDE, parts_of
from saemill.common.stores.site_records import IN_MEMORY
from saemill.common.stores.tokens import TokenStore
from saemill.train import outlook as train
from saemill.train.backends.choose import choose_product_dtype, kernels_of
from saemill.train.config import TrainConfig
from saemill.train.inputs import with_site
from saemill.train.needed import counted_by_shard, needed_of
from saemill.train.outlook import dead_after_tokens
from saemill.train.sweep.placement import allowed_latent_ranks, choose
from saemill.train.sweep.schedule import schedule_of
from saemill.train.sweep.sources import sources_of
from saemill.train.sweep.variant import Variant
from saemill.train.sweep.variants import of_config

READ_ROWS = 4096
SWITCHED_OFF = ("profile", "log_to_wandb", "log_to_tensorboard", "wandb_artifacts")
LEFT_OPEN = (
    *("follow_tokens", "warmup_steps", "lr_end", "lr_cycles", "penalty_warmup_steps", "halving_metric"),
    *("eval_tokens", "eval_losses_every", "eval_losses_tokens"),
    *("wandb_project", "wandb_entity", "run_name", "wandb_log_frequency"),
)
"""Settings of a run that have no meaning in a few steps."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows that there are, or are going to be."""

    n_rows: int
    ctx_len: int
    n_held_out: int
    """Rows that are held out."""
    kept_share: float
    """Share of the positions that the mask leaves."""

    @classmethod
    def of(cls, tokens: TokenStore, max_tokens: int | None, mask: MaskConfig) -> "Rows":
        """Count those of a token store, the first up to `max_tokens`."""
        n_rows = min(tokens.n_rows, (max_tokens or tokens.n_tokens) // tokens.ctx_len)
        n_kept = sum(
            int(tokens.keep(row, min(row + READ_ROWS, n_rows), mask).sum())
            for row in range(0, n_rows, READ_ROWS)
        )
        held_out = int(tokens.held_out_R[:n_rows].sum())
        return cls(n_rows, tokens.ctx_len, held_out, n_kept / (n_rows * tokens.ctx_len))

    def scaled(self, n_rows: int) -> "Rows":
        """Take these for so many rows, or so many for these: what is held out by its share."""
        return replace(self, n_rows=n_rows, n_held_out=round(self.n_held_out * n_rows / self.n_rows))

    @property
    def n_tokens(self) -> int:
        """Positions in all rows."""
        return self.n_rows * self.ctx_len

    @property
    def epoch_tokens(self) -> int:
        """Tokens that are trained on in an epoch."""
        return round((self.n_rows - self.n_held_out) * self.ctx_len * self.kept_share)


@dataclass(frozen=True, slots=True)
class Cached:
    """The activations that there are going to be."""

    widths: Mapping[str, int]
    row_bytes: Mapping[str, int]
    """Bytes of a token's stored activation at each site."""
    model_bytes: int
    """Of the model in memory, its language-model head among them."""
    n_ids: int
    """Size of its vocabulary; 0 where it has no language-model head, and so no losses."""
    shard_tokens: int
    """Tokens per shard."""


@dataclass(frozen=True, slots=True)
class Trained:
    """The SAEs that there are going to be."""

    config: TrainConfig
    """With its sites."""
    variants: list[Variant]


def caching(
    config: CacheConfig, rows: Rows, device: torch.device, tokens: TokenStore | None
) -> tuple[Outlook, Cached]:
    """Look ahead to caching rows that are not there yet; `tokens` is a sample of them, if there is one.

    Raises:
        ConfigError: sites that the model has not, or too little disk.
    """
    store = look_ahead(config, rows.n_rows, rows.ctx_len, device, tokens)
    model_config = load_model_config(config.model, config.revision, config.trust_remote_code)
    of_model = _of_model(model_config, store.n_weights, store.model_bytes)
    return store.outlook, Cached(store.widths, store.row_bytes, *of_model, store.shard_tokens)


def _of_model(config: Any, n_weights: int, n_bytes: int) -> tuple[int, int]:
    """Work out the bytes of a model with its language-model head, and the size of its vocabulary; 0 without a
    head.

    Args:
        config: its transformers config.
        n_weights: of it without the head.
        n_bytes: of those in memory.
    """
    if head_of(config) is None:
        return n_bytes, 0
    head = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return n_bytes * (n_weights + head) // n_weights, config.vocab_size


def training(
    config: TrainConfig, rows: Rows, cached: Cached, device: torch.device, memory_bytes: int | None
) -> tuple[Outlook, Trained]:
    """Look ahead to training on activations that are not there yet.

    Args:
        config: of the stage.
        rows: that are cached.
        cached: what is cached of them.
        device: that it trains on.
        memory_bytes: of a GPU; None where it is not known.

    Raises:
        ConfigError: as training would.
    """
    sources = sources_of(config)
    config = with_site(config, list(cached.widths), sources)
    widths = {name: _sum(name, cached.widths) for name in _named(config)}
    schedule = schedule_of(config, rows.epoch_tokens, "tokens")
    variants = of_config(config, widths, schedule.n_steps, sources)
    kernels = kernels_of(config.kernels, device)
    ranks = allowed_latent_ranks(config.latent_ranks, variants, kernels, widths)
    placement = choose(variants, widths, 1, config.data_ranks, ranks, memory_bytes=memory_bytes)
    row_bytes = {name: _sum(name, cached.row_bytes) for name in widths}
    stream = train.Stream(widths, row_bytes, rows.n_tokens, rows.epoch_tokens)
    by = train.Computed(device, kernels, choose_product_dtype(config.precision, device))
    held_out = f"; about {rows.n_held_out:,} rows held out"
    outlook = train.outlook_of(config, variants, placement, stream, schedule.n_steps, by, held_out)
    train.check_room(config, outlook, len(variants), stream.n_tokens)
    return outlook, Trained(config, variants)


def followed(
    config: TrainConfig, rows: Rows, cached: Cached, tokens: TokenStore | None, mask: MaskConfig
) -> str:
    """Tell how much of what is cached a run needs on the disk at once that follows it.

    Args:
        config: of the run.
        rows: that are cached.
        cached: what is cached of them.
        tokens: those that are cached; None where they are not there yet, and what is held out or masked is
            taken to be spread evenly.
        mask: of the store.

    Raises:
        ConfigError: as training would.
    """
    shard_tokens = cached.shard_tokens
    if tokens is not None:
        by_shard = counted_by_shard(tokens, rows.n_rows, shard_tokens, config.mask.positions(mask))
    else:
        n_shards = -(-rows.n_tokens // shard_tokens)
        n_held_out = round(rows.n_held_out * rows.ctx_len * rows.kept_share)
        by_shard = [rows.epoch_tokens // n_shards] * n_shards, [n_held_out // n_shards] * n_shards
    trained, held_out = by_shard
    needed = needed_of(config, trained, held_out, shard_tokens)
    size = shown(needed.together * shard_tokens * sum(cached.row_bytes.values()))
    kept = f", the first {counted(needed.kept, 'shard')} of it to the end" if needed.kept else ""
    return f"  training needs {'about ' if tokens is None else ''}{size} of them at once{kept}"


def _named(config: TrainConfig) -> list[str]:
    """List the sites that a config names."""
    own = [str(entry[key]) for entry in config.variants for key in ("site", "target_site") if entry.get(key)]
    return list(dict.fromkeys((*config.site, *config.target_site, *own)))


def _sum(name: str, of_each: Mapping[str, int]) -> int:
    """Sum up a number of each of the sites that one joins."""
    for part in parts_of(name):
        if part not in of_each:
            raise ConfigError(f"train.site {part!r} is not cached; {nearest(part, of_each)}")
    return sum(of_each[part] for part in parts_of(name))


def assessing(
    config: AssessConfig, rows: Rows, cached: Cached, trained: Trained, device: torch.device
) -> Outlook:
    """Look ahead to assessing SAEs that are not there yet."""
    widths = {name: _sum(name, cached.widths) for name in _named(trained.config)}
    saes = [
        assess.Dictionary(v.sites[-1], widths[v.sites[-1]], v.num_latents, round(v.l0))
        for v in trained.variants
    ]
    held_out = rows.n_held_out * rows.ctx_len
    amounts = assess.Amounts(
        min(config.max_tokens, round(held_out * rows.kept_share)),
        min(config.model_tokens, held_out) if config.with_model and cached.n_ids else 0,
        min(config.context_tokens, rows.n_tokens),
        min(config.probe_examples or PROBE_EXAMPLES, held_out) if config.probes or config.absorption else 0,
    )
    model = assess.Model(cached.model_bytes, cached.n_ids, config.batch_size * rows.ctx_len)
    runs_on = model if config.with_model else None
    return assess.outlook_of(config, saes, amounts, device, runs_on)


def of_store(store: ActivationStore, config: TrainConfig) -> tuple[Rows, Cached]:
    """Tell what is known of activations that are there, those of a second model beside them included."""
    text = store.text
    if isinstance(text, TokenStore):
        rows = Rows.of(text, None, config.mask.positions(store.mask))
    else:
        rows = Rows(store.n_tokens, 1, int(text.held_out_R.sum()), kept_share=1.0)
    cached = _cached(store, config.model)
    return rows, cached if store.beside is None else with_beside(cached, store.beside)


def with_beside(cached: Cached, other: ActivationStore) -> Cached:
    """Add the sites of a store that lies beside, by the names that they have there, and its model."""
    beside = _cached(other, None)
    widths, row_bytes = (
        {f"{BESIDE}{name}": number for name, number in numbers.items()}
        for numbers in (beside.widths, beside.row_bytes)
    )
    return replace(
        cached,
        widths={**cached.widths, **widths},
        row_bytes={**cached.row_bytes, **row_bytes},
        model_bytes=cached.model_bytes + beside.model_bytes,
        n_ids=cached.n_ids if beside.n_ids else 0,  # losses are those of both models
    )


def _cached(store: ActivationStore, model_name: str | None) -> Cached:
    """Tell what is known of the activations of one model; `model_name` is its, where it moved."""
    settings, model = store.settings, (0, 0)
    if isinstance(store.text, TokenStore) and not str(settings.model).endswith(IN_MEMORY):
        trusts = bool(settings.trust_remote_code)
        model_config = load_model_config(model_name or str(settings.model), settings.revision, trusts)
        n_weights = Architecture(model_config, trusts).n_weights
        model = _of_model(model_config, n_weights, model_bytes(n_weights, settings.model_dump()))
    arrays = [store.array(name) for name in store.sites]
    widths = {array.name: array.width for array in arrays}
    row_bytes = {array.name: array.columns * array.stored.itemsize for array in arrays}
    return Cached(widths, row_bytes, *model, store.shard_tokens)


def few_steps(config: TrainConfig, acts: Path, n_tokens: int) -> TrainConfig:
    """Change the settings of a run so that a few steps of it can be made: those of its middle, from which no
    SAE is stopped, kept or measured.

    Args:
        config: of the run.
        acts: what is trained on.
        n_tokens: of the whole run.
    """
    changed: dict[str, Any] = dict.fromkeys(SWITCHED_OFF, False) | dict.fromkeys(LEFT_OPEN)
    changed |= {
        "lr_schedule": "constant",
        "resample_at": (),
        "k_anneal_steps": 0,
        "resume": True,
        "follow": False,
    }
    changed |= {"epochs": None, "halving": 0, "n_checkpoints": 0, "eval_every": 0, "follow": False}
    dead_after = dead_after_tokens(config, n_tokens // config.step_tokens)
    return replace(config, acts=acts, dead_after_tokens=dead_after, **changed)


def most_to_assess(outlook: Outlook, sample: TokenStore, kept_share: float) -> int:
    """Find how many tokens can be assessed on a sample, whose other amounts are in the proportion of the
    whole."""
    held_out = int(sample.held_out_R.sum()) * sample.ctx_len
    there = (held_out * kept_share, held_out, sample.n_tokens)
    share = min(n / whole for n, whole in zip(there, outlook.amounts.values(), strict=True))
    return round(outlook.amount * min(1.0, share))

"""The plan that follows from the settings: rows, sites, bytes on the disk. Settings that cannot be carried
out are refused before the model is loaded."""

import shutil
from dataclasses import dataclass
from typing import Any

import torch

from saemill.cache.config import CacheConfig
from saemill.cache.folder import check_same_store, existing_settings
from saemill.common import config as settings
from saemill.common import durable, setting
from saemill.common.errors import ConfigError
from saemill.common.log import counted
from saemill.common.models.architecture import Architecture
from saemill.common.models.model import (
    check_fit,
    choose_model_dtype,
    fingerprint_given,
    fingerprint_model,
)
from saemill.common.models.sites import load_model_config
from saemill.common.models.tokenizer import check_tokenizer
from saemill.common.stores.forms.form import form_of
from saemill.common.stores.forms.packing import rows_per_shard
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.site_records import FORMAT, Site, StoreSettings, site_path
from saemill.common.stores.tokens import TokenStore
from saemill.common.world import World

SHARD_TOKENS = 65536
"""Tokens per shard file of a new store, by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The planned content of the store, and where it is computed."""

    config: CacheConfig
    tokens: TokenStore
    sites: list[Site]
    """Sites in the model's order."""
    identity: dict[str, Any]
    """Settings that decide the store's content, site by site."""
    device: torch.device
    """Device that the model runs on."""
    summary: str
    """Rows, shards and bytes, as the user reads them."""
    given: Any = None
    """Model itself, where it is in memory."""


def make_plan(config: CacheConfig, world: World, given: Any = None) -> Plan:
    """Work out what is to be cached; settings left open are those of the store that is added to. `given` is
    the model itself where it is in memory.

    Raises:
        ConfigError: settings that do not fit the model or the tokens, a store made with others, or
            too little disk.
        StoreError: damaged tokens, or a folder with other files.
    """
    tokens = TokenStore(config.tokens)
    existing = existing_settings(config.out, tokens)
    n_rows = _n_rows(config, tokens, existing)
    if given is None:
        device = world.device(config.device)
        model_config = load_model_config(config.model, config.revision, config.trust_remote_code)
    else:
        device, model_config = given.device, given.config
    check_fit(model_config, config.model, tokens, config.trust_remote_code)
    check_tokenizer(tokens.tokenizer, config.model, config.revision, config.allow_other_tokenizer)
    sites = sites_of(config, model_config)
    identity = _identity(config, tokens, existing, n_rows, device, given)
    _check_mask(tokens, settings.build(MaskConfig, identity["mask"], "mask"), n_rows)
    summary = _summary(config, identity, tokens.ctx_len, sites)
    check_same_store(config.out, existing, identity)
    return Plan(
        config=config,
        tokens=tokens,
        sites=sites,
        identity=identity,
        device=device,
        summary=summary,
        given=given,
    )


def sites_of(config: CacheConfig, model_config: Any) -> list[Site]:
    """List the sites that settings name in a model, in its order.

    Args:
        config: of the stage.
        model_config: the model's transformers config.

    Raises:
        ConfigError: a layer or a module that does not exist.
    """
    architecture = Architecture(model_config, config.trust_remote_code)
    layers = config.layers
    if config.layer_stride and not (config.layers or config.sites):
        layers = tuple(range(0, len(architecture.blocks), config.layer_stride))
    return architecture.resolve(layers, config.sites)


def content_of(config: CacheConfig, tokens: TokenStore) -> dict[str, Any]:
    """Collect the settings that decide the content of a new store made with this config, but for its
    sites."""
    n_rows = _n_rows(config, tokens, None)
    return _identity(config, tokens, None, n_rows, World.here().device(config.device), None)


def _n_rows(config: CacheConfig, tokens: TokenStore, existing: StoreSettings | None) -> int:
    if config.max_tokens is None:
        return existing.n_rows if existing else tokens.n_rows
    if not tokens.ctx_len <= config.max_tokens <= tokens.n_tokens:
        raise ConfigError(
            f"max_tokens must be between one row ({tokens.ctx_len:,}) and the store's "
            f"{tokens.n_tokens:,} tokens, got {config.max_tokens:,}"
        )
    return config.max_tokens // tokens.ctx_len


def _identity(
    config: CacheConfig,
    tokens: TokenStore,
    existing: StoreSettings | None,
    n_rows: int,
    device: torch.device,
    given: Any,
) -> dict[str, Any]:
    """Collect the settings that decide the store's content, site by site. Those that the user left open are
    the existing store's."""
    shard_tokens = config.shard_tokens or (existing.shard_tokens if existing else SHARD_TOKENS)
    compression = config.compression or (existing.compression if existing else None)
    compression = None if compression == "raw" else compression
    n_in_shard = rows_per_shard(shard_tokens, n_rows, tokens.ctx_len, compression)
    model_dtype = str(choose_model_dtype(config.model_dtype, device)).removeprefix("torch.")
    if config.model_dtype == "auto" and existing:
        model_dtype = str(existing.model_dtype)
    if given is None:
        fingerprint = fingerprint_model(config.model, config.revision, config.trust_remote_code)
    else:
        fingerprint, model_dtype = fingerprint_given(given), str(given.dtype).removeprefix("torch.")
    in_8bit, in_4bit = (
        getattr(existing, name) if existing and getattr(config, name) is None else getattr(config, name)
        for name in ("load_in_8bit", "load_in_4bit")
    )
    mask = config.mask or (existing.mask if existing else MaskConfig())
    attention = config.attn_implementation or (existing.attn_implementation if existing else None)
    return {
        "format": FORMAT,
        "kind": "tokens",
        "tokens_fingerprint": tokens.fingerprint,
        "n_rows": n_rows,
        "shard_tokens": n_in_shard * tokens.ctx_len,
        "dtype": config.dtype or (existing.dtype if existing else "bf16"),
        **({"compression": compression} if compression or (existing and existing.compression) else {}),
        "model_dtype": model_dtype,
        "load_in_8bit": in_8bit or None,
        **({"load_in_4bit": True} if in_4bit else {}),
        **({"attn_implementation": attention} if attention else {}),
        "model_fingerprint": fingerprint,
        "mask": setting.identity(mask),
    }


def _check_mask(tokens: TokenStore, mask: MaskConfig, n_rows: int) -> None:
    """Refuse a mask that leaves nothing to train on, before the model is run."""
    for row in range(0, n_rows, 1024):
        end = min(row + 1024, n_rows)
        if tokens.keep(row, end, mask)[~tokens.held_out_R[row:end]].any():
            return
    raise ConfigError(
        "the mask and the held-out rows leave no position of these tokens to train on; lower "
        "mask.first_positions, or mask fewer ids"
    )


def _summary(config: CacheConfig, identity: dict[str, Any], ctx_len: int, sites: list[Site]) -> str:
    """Describe what will be written. What cannot fit on the disk is refused."""
    n_rows, shard_tokens = identity["n_rows"], identity["shard_tokens"]
    n_shards = -(-n_rows * ctx_len // shard_tokens)
    forms = {site.name: form_of(identity["dtype"], site.width) for site in sites}
    needed = {name: n_shards * shard_tokens * f.columns * f.stored.itemsize for name, f in forms.items()}
    folder = config.out.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    n_written_bytes = sum(durable.folder_bytes(site_path(config.out, site.name) / "c") for site in sites)
    missing = sum(needed.values()) - n_written_bytes
    if missing > free:
        before = " before compression" if identity.get("compression") else ""
        raise ConfigError(
            f"{missing / 2**20:,.1f} MiB are needed in {folder}{before}, {free / 2**20:,.1f} MiB are free; "
            "choose fewer sites or --max-tokens, or another disk"
        )
    compression = identity.get("compression")
    padded = ", the last one padded" if n_rows * ctx_len % shard_tokens and not compression else ""
    packed = f" compressed by {compression} (sizes before that)" if compression else ""
    lines = [
        f"{counted(n_rows, 'row')} of {ctx_len}, {n_rows * ctx_len:,} tokens, stored as {identity['dtype']}"
        f"{packed}, per site in {counted(n_shards, 'shard')} of {shard_tokens:,} tokens{padded}:",
        *(f"  {s.name:32} D {s.width:6,}  {needed[s.name] / 2**20:12,.1f} MiB" for s in sites),
        f"  {sum(needed.values()) / 2**20:,.1f} MiB in all, {free / 2**20:,.1f} MiB free",
    ]
    return "\n".join(lines)

"""The plan that follows from the settings: rows, sites, bytes on the disk. Settings that cannot be carried
out are refused before the model is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from saemill.cache.config import CacheConfig
from saemill.cache.folder import check_same_store, existing_settings
from saemill.cache.outlook import COPY, RECORDS, bytes_of_copy, mirrored_bytes, model_bytes, outlook_of
from saemill.cache.placing import check_bucket
from saemill.common import config as settings
from saemill.common import setting
from saemill.common.addresses import address_of
from saemill.common.errors import ConfigError
from saemill.common.models.architecture import Architecture
from saemill.common.models.model import (
    check_fit,
    choose_model_dtype,
    fingerprint_given,
    fingerprint_model,
)
from saemill.common.models.sites import load_model_config
from saemill.common.models.tokenizer import check_tokenizer
from saemill.common.outlook import Outlook, free_bytes, nearest_folder, shown
from saemill.common.sizes import written
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
    outlook: Outlook
    """What is written, and what that needs."""
    given: Any = None
    """Model itself, where it is in memory."""


def make_plan(config: CacheConfig, world: World, folder: Path, given: Any = None) -> Plan:
    """Work out what is to be cached; settings left open are those of the store that is added to.

    Args:
        config: of the stage.
        world: the processes.
        folder: the store's, or the mirror of its address.
        given: the model itself where it is in memory.

    Raises:
        ConfigError: settings that do not fit the model or the tokens, a store made with others, or
            too little disk.
        StoreError: damaged tokens, or a folder with other files.
    """
    tokens = TokenStore(config.tokens)
    existing = existing_settings(folder, tokens)
    n_rows = _n_rows(config, tokens, existing)
    if given is None:
        device = world.device(config.device)
        model_config = load_model_config(config.model, config.revision, config.trust_remote_code)
    else:
        device, model_config = given.device, given.config
    check_fit(model_config, config.model, tokens, config.trust_remote_code)
    check_tokenizer(tokens.tokenizer, config.model, config.revision, config.allow_other_tokenizer)
    architecture = Architecture(model_config, config.trust_remote_code)
    sites = sites_of(config, architecture)
    identity = _identity(config, tokens, existing, n_rows, device, given)
    _check_mask(tokens, settings.build(MaskConfig, identity["mask"], "mask"), n_rows)
    row_bytes = bytes_of_rows(sites, identity)
    numbers = identity["n_rows"], tokens.ctx_len, identity, architecture.n_weights, device
    outlook = outlook_of(config, sites, row_bytes, *numbers, bytes_of_copy(tokens, identity["n_rows"]))
    check_disk(config, outlook, row_bytes, tokens.ctx_len, identity)
    check_same_store(folder, existing, identity)
    return Plan(
        config=config,
        tokens=tokens,
        sites=sites,
        identity=identity,
        device=device,
        outlook=outlook,
        given=given,
    )


def sites_of(config: CacheConfig, architecture: Architecture) -> list[Site]:
    """List the sites that settings name in a model, in its order.

    Args:
        config: of the stage.
        architecture: of the model.

    Raises:
        ConfigError: a layer or a module that does not exist.
    """
    layers = config.layers
    if config.layer_stride and not (config.layers or config.sites):
        layers = tuple(range(0, len(architecture.blocks), config.layer_stride))
    return architecture.resolve(layers, config.sites)


def content_of(
    config: CacheConfig, tokens: TokenStore, folder: Path | None = None, given: Any = None
) -> dict[str, Any]:
    """Collect the settings that decide the content of the store made with this config, but for its sites.

    Args:
        config: of the stage.
        tokens: that are cached.
        folder: of the store, whose settings are those that were left open if it is there; None for a new one.
        given: the model itself where it is in memory.
    """
    existing = None if folder is None else existing_settings(folder, tokens)
    n_rows = _n_rows(config, tokens, existing)
    device = World.here().device(config.device) if given is None else given.device
    return _identity(config, tokens, existing, n_rows, device, given)


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


def bytes_of_rows(sites: list[Site], identity: Mapping[str, Any]) -> dict[str, int]:
    """Compute the bytes of one token's stored activation at each site."""
    forms = {site.name: form_of(identity["dtype"], site.width) for site in sites}
    return {name: form.columns * form.stored.itemsize for name, form in forms.items()}


def check_disk(
    config: CacheConfig,
    outlook: Outlook,
    row_bytes: Mapping[str, int],
    ctx_len: int,
    identity: Mapping[str, Any],
) -> None:
    """Refuse what cannot fit on the disk, with its records and the copy of the tokens, and say what would;
    what is written already counts.

    Args:
        config: of the stage.
        outlook: of it.
        row_bytes: bytes of a token's stored activation at each site.
        ctx_len: tokens per row.
        identity: of the store, with its `shard_tokens` and compression.

    Raises:
        ConfigError: with the bytes that are needed and those that are free.
    """
    if address := address_of(config.out):
        check_bucket(
            address, max(row_bytes.values()) * identity["shard_tokens"], mirrored_bytes(outlook.disk)
        )
        return
    shard_bytes = {name: n_bytes * identity["shard_tokens"] for name, n_bytes in row_bytes.items()}
    # Shards that are there count as raw ones do: if they are compressed, so will the others be.
    there = {
        name: sum(1 for _ in site_path(config.out, name).glob("c/*/0")) * n_bytes
        for name, n_bytes in shard_bytes.items()
    }
    missing = {name: max(0, outlook.disk[name] - there[name]) for name in row_bytes}
    n_whole, n_there = (sum(n_bytes[name] for name in row_bytes) for n_bytes in (outlook.disk, there))
    n_shards = max(outlook.disk[name] // shard_bytes[name] for name in row_bytes)
    n_missing = _checked_room(config, n_whole, n_shards) - n_there
    has_copy = (config.out / "tokens" / "manifest.json").exists()
    records = round(outlook.disk[RECORDS] * sum(missing.values()) / n_whole)
    beside, free = records + (0 if has_copy else outlook.disk[COPY]), free_bytes(config.out)
    if n_missing <= 0 or n_missing + beside <= free:
        return
    left = max(0, free - beside)
    fits = [_sites_that_fit(missing, left)]
    if not n_there:  # else the store's number of rows is settled
        fits.insert(0, _tokens_that_fit(row_bytes, identity["shard_tokens"], ctx_len, left))
    needed = shown(n_missing + beside) + (" before compression" if identity.get("compression") else "")
    raise ConfigError(
        f"{needed} are needed in {nearest_folder(config.out)}, {shown(free)} are free; choose fewer sites or "
        f"--max-tokens, or another disk: {' or '.join(filter(None, fits)) or 'nothing of it'} would fit"
    )


def _tokens_that_fit(row_bytes: Mapping[str, int], shard_tokens: int, ctx_len: int, free: int) -> str:
    """Name as many tokens as fit: in whole shards, else in whole rows; empty where none do."""
    n_bytes = sum(row_bytes.values())
    n_tokens = free // (n_bytes * shard_tokens) * shard_tokens or free // (n_bytes * ctx_len) * ctx_len
    return f"--max-tokens {n_tokens}" if n_tokens else ""


def _sites_that_fit(missing: Mapping[str, int], free: int) -> str:
    """Name the sites that fit, the first ones first; empty where none does."""
    fitting = []
    for name, n_bytes in missing.items():
        if n_bytes <= free:
            fitting.append(name)
            free -= n_bytes
    return f"{', '.join(fitting)} alone" if fitting else ""


class Ahead(NamedTuple):
    """A store that there is going to be."""

    outlook: Outlook
    widths: dict[str, int]
    """D of each site."""
    row_bytes: dict[str, int]
    """Bytes of a token's stored activation at each site."""
    n_weights: int
    """Of the model, without a language-model head."""
    model_bytes: int
    """Bytes of those in memory."""
    shard_tokens: int


def look_ahead(
    config: CacheConfig, n_rows: int, ctx_len: int, device: torch.device, tokens: TokenStore | None
) -> Ahead:
    """Look ahead to a new store of tokens that are not there yet.

    Args:
        config: of the stage.
        n_rows: rows that there are going to be.
        ctx_len: tokens per row.
        device: that the model runs on.
        tokens: the tokens, or a sample of them; None without.

    Raises:
        ConfigError: sites that the model has not, or too little disk.
    """
    n_rows = min(n_rows, (config.max_tokens or n_rows * ctx_len) // ctx_len)
    compression = None if config.compression in (None, "raw") else config.compression
    shard_tokens = config.shard_tokens or SHARD_TOKENS
    identity: dict[str, Any] = {
        "dtype": config.dtype or "bf16",
        "compression": compression,
        "shard_tokens": rows_per_shard(shard_tokens, n_rows, ctx_len, compression) * ctx_len,
        "model_dtype": str(choose_model_dtype(config.model_dtype, device)).removeprefix("torch."),
        "load_in_8bit": config.load_in_8bit,
        "load_in_4bit": config.load_in_4bit,
    }
    model_config = load_model_config(config.model, config.revision, config.trust_remote_code)
    architecture = Architecture(model_config, config.trust_remote_code)
    sites, n_weights = sites_of(config, architecture), architecture.n_weights
    row_bytes = bytes_of_rows(sites, identity)
    copied = 0 if tokens is None else bytes_of_copy(tokens, n_rows)
    outlook = outlook_of(config, sites, row_bytes, n_rows, ctx_len, identity, n_weights, device, copied)
    check_disk(config, outlook, row_bytes, ctx_len, identity)
    widths = {site.name: site.width for site in sites}
    n_bytes, shard_tokens = model_bytes(n_weights, identity), int(identity["shard_tokens"])
    return Ahead(outlook, widths, row_bytes, n_weights, n_bytes, shard_tokens)


def _checked_room(config: CacheConfig, n_bytes: int, n_shards: int) -> int:
    """Return the most bytes that are on the disk at once, of those that are written.

    Raises:
        ConfigError: `max_disk` has no room for them.
    """
    limit = config.max_disk_bytes
    if limit is None or limit >= n_bytes:
        return n_bytes
    if not config.delete_consumed:
        raise ConfigError(
            f"max_disk {config.max_disk}: all shards together take {written(n_bytes)}; give more, choose "
            "fewer sites or --max-tokens, or add --delete-consumed: then shards that `saemill train "
            "--follow` has read are removed"
        )
    least = 2 * (n_bytes // n_shards)
    if limit < least:
        raise ConfigError(
            f"max_disk {config.max_disk}: two shards, of which one is read while the other is written, take "
            f"{written(least)}; give as much or more, or smaller shards by --shard-tokens"
        )
    return limit

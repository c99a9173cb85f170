"""`saemill cache`: one forward pass over the rows serves every requested site."""

import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from saemill.cache import names, token_copy
from saemill.cache.claims import CLAIMS, Worker, holds_only_claims
from saemill.cache.fill import Filling
from saemill.cache.writer import SiteWriter, check_same_store, has_shards, write_group
from saemill.common import config as settings
from saemill.common import durable, elsewhere
from saemill.common.errors import ConfigError, DataError, StoreError
from saemill.common.log import counted, say
from saemill.common.models.architecture import Architecture
from saemill.common.models.model import (
    LanguageModel,
    check_8bit,
    check_fit,
    choose_model_dtype,
    fingerprint_model,
    fingerprint_weights,
)
from saemill.common.models.sites import load_model_config
from saemill.common.models.tokenizer import check_tokenizer
from saemill.common.signals import stop_on_signal
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.site_records import (
    DTYPES,
    EMBEDDINGS,
    FORMAT,
    SITES,
    Site,
    StoreSettings,
    known_settings,
    record_path,
    sites_in,
)
from saemill.common.stores.statistics import warnings
from saemill.common.stores.tokens import TokenStore
from saemill.common.world import World, speak_for

SHARD_TOKENS = 65536
"""Tokens per shard file of a new store, unless told otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Settings of the stage."""

    tokens: Path
    """A token store."""
    model: str
    """Hub id or local folder."""
    out: Path
    """Folder of the activation store, new or to be added to."""
    layers: tuple[int, ...] = ()
    """Blocks whose outgoing residual stream is cached; -1 is the last."""
    sites: tuple[str, ...] = ()
    """Globs over module paths, and `residual.<layer>`."""
    layer_stride: int | None = None
    """Every so many blocks, from block 0: in place of `layers` and `sites`."""
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """How activations are stored; by default as the store that is added to, else bf16."""
    model_dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """What the model computes in; auto: as for the store that is added to, else bf16 on a GPU and fp32
    on a CPU."""
    max_tokens: int | None = None
    """Cache only the first rows, at most this many tokens; by default as many as are in the store that is
    added to, else all."""
    batch_size: int = 16
    """Rows per forward pass."""
    shard_tokens: int | None = None
    """Tokens per shard file, rounded down to whole rows (one at least); by default as the store that is
    added to, else 65,536."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …"""
    revision: str | None = None
    """The hub model's revision."""
    mask: MaskConfig | None = None
    """Positions that statistics, training and assessment leave out; nothing is left out on disk. By
    default as the store that is added to, else those of `MaskConfig`."""
    allow_other_tokenizer: bool = False
    """Take tokens of another tokenizer than the one that comes with the model."""
    load_in_8bit: bool | None = None
    """Load the model's weights as 8-bit integers, with bitsandbytes on a CUDA device; by default as for
    the store that is added to, else not."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "shard_tokens", "layer_stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be 1 or more, got {value}")
        chosen = [name for name in ("layers", "sites", "layer_stride") if getattr(self, name)]
        if not chosen:
            raise ConfigError(
                "name what to cache: add --layers -1 for the residual stream after the last block; others: "
                "--layers 2,4, --sites 'layers.*.mlp' or --layer-stride 2"
            )
        if self.layer_stride not in (None, 1) and len(chosen) > 1:
            raise ConfigError(f"layer_stride chooses all layers itself; leave out {chosen[0]}")
        for site in self.sites:
            if here := elsewhere.of_hook(site):
                raise ConfigError(here)


def run(config: CacheConfig) -> ActivationStore:
    """Cache the activations of the chosen sites into `config.out`.

    A store that exists is added to: sites that are missing are cached, shards and tokens that are
    missing or damaged are written again, and nothing else is touched. Settings left open are the store's.
    Any number of processes may do so at once: each shard is written by one of them, and each returns
    when the sites it was asked for are complete.

    Raises:
        ConfigError: settings that do not fit the model or the tokens, a store made with others, or
            too little disk.
        DataError: NaN or infinite activations.
        StoreError: damaged tokens, or a folder with other files.
        Interrupted: a signal came; the same call goes on.
    """
    world = World.here()
    speak_for(world)
    with stop_on_signal() as stop:
        tokens = TokenStore(config.tokens)
        there = _settings_there(config, tokens)
        n_rows = _n_rows(config, tokens, there)
        device = world.device(config.device)
        model_config = load_model_config(config.model, config.revision)
        check_fit(model_config, config.model, tokens)
        check_tokenizer(tokens.tokenizer, config.model, config.revision, config.allow_other_tokenizer)
        sites = sites_of(config, model_config)
        identity = _identity(config, tokens, there, n_rows, device)
        check_8bit(bool(identity["load_in_8bit"]), device)
        _check_mask(tokens, settings.build(MaskConfig, identity["mask"], "mask"), n_rows)
        plan = _plan(config, identity, tokens.ctx_len, sites)
        check_same_store(config.out, there, identity)
        with Worker(config.out / CLAIMS, stop) as worker:
            store, writers = _open(config, tokens, identity, sites, plan, worker)
            try:
                what = _complete(config, store, writers, device, worker, world)
            except DataError:
                _clear_if_empty(config.out, worker)
                raise
    say(f"{config.out}: {', '.join(site.name for site in sites)} complete; {what}")
    for array in (store.site(site.name) for site in sites):
        for warning in warnings(array.name, array.statistics, array.dtype, "token"):
            say(warning)
    return store


def _clear_if_empty(out: Path, worker: Worker) -> None:
    """Remove a store that holds no shard, and that nobody else works on, so that other settings may be
    tried in its place. Other files that lie there are left alone."""
    with worker.hold("store"):
        if worker.is_alone() and not has_shards(out):
            # The tokens go last: by them the rest is known as a store that was begun.
            sites = [name for name in sites_in(out) if record_path(out, name).exists()]
            for name in (*sites, SITES, "zarr.json", "tokens"):
                path = out / name
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)


def _complete(
    config: CacheConfig,
    store: ActivationStore,
    writers: list[SiteWriter],
    device: torch.device,
    worker: Worker,
    world: World,
) -> str:
    """Write what the sites lack, beside other workers, until they have their manifests; what was done."""
    model: LanguageModel | None = None
    n_missing = n_written = 0
    while True:
        damaged = [writer.damaged() for writer in writers]
        with worker.hold("store"):
            for writer, shards in zip(writers, damaged, strict=True):
                writer.mend(shards)
        lacking = {writer.site.name: writer.lacking() for writer in writers}
        if any(lacking.values()):
            _say_what_is_there(store, lacking)
            n_missing += sum(map(len, lacking.values()))
            model = model or _load(config, store, list(lacking), device)
            filling = Filling(store, writers, model, worker, world, config.batch_size)
            filling.run()
            n_written += filling.n_written
        with worker.hold("store"):
            if all([writer.finish() for writer in writers]):
                return _what_was_done(n_missing, n_written)


def _load(
    config: CacheConfig, store: ActivationStore, sites: list[str], device: torch.device
) -> LanguageModel:
    """The model, after a look at whether its modules hold what their names say: those of the sites asked for
    and of the finished ones, which they are compared with."""
    model = LanguageModel(
        config.model,
        revision=config.revision,
        dtype=getattr(torch, str(store.settings.model_dtype)),
        device=device,
        in_8bit=bool(store.settings.load_in_8bit),
    )
    ids_RS = torch.from_numpy(store.tokens.rows(0, 1).astype("int64"))
    finished = [name for name in store.sites if name not in sites]
    for told in names.warnings(model, sites + finished, ids_RS):
        say(f"warning: {told}")
    return model


def _what_was_done(n_missing: int, n_written: int) -> str:
    if not n_missing:
        return "nothing to do, every shard was checked"
    others = f", {n_missing - n_written:,} of them by other workers" if n_written < n_missing else ""
    return f"{counted(max(n_missing, n_written), 'shard')} written{others}"


def _settings_there(config: CacheConfig, tokens: TokenStore) -> StoreSettings | None:
    """The settings of the store at the output, wherever in it they are whole; None where a new one may be
    made.

    Raises:
        ConfigError: the output cannot be a folder.
        StoreError: it holds other files.
    """
    settings.check_folder(config.out)
    others = _others(config, tokens)
    # Looked for last: another worker may be making the store right now.
    there = known_settings(config.out)
    if there is None and others:
        raise StoreError(f"{config.out} holds other files ({others[0].name}); choose a new folder")
    if there and there.kind == EMBEDDINGS:
        raise ConfigError(f"{config.out} holds embeddings; choose another folder for a model's activations")
    return there


def _others(config: CacheConfig, tokens: TokenStore) -> list[Path]:
    """What lies at the output and is no part of a store of these tokens that was begun."""
    paths = list(config.out.glob("*"))  # first: other workers may be adding parts, each of them whole
    begun = token_copy.is_copy(config.out / "tokens", tokens)
    ours = {"tokens", "zarr.json", SITES, *sites_in(config.out)} if begun else set()
    return [
        path for path in paths if not (path.name in ours or (path.name == CLAIMS and holds_only_claims(path)))
    ]


def _n_rows(config: CacheConfig, tokens: TokenStore, there: StoreSettings | None) -> int:
    if config.max_tokens is None:
        return there.n_rows if there else tokens.n_rows
    if not tokens.ctx_len <= config.max_tokens <= tokens.n_tokens:
        raise ConfigError(
            f"max_tokens must be between one row ({tokens.ctx_len:,}) and the store's "
            f"{tokens.n_tokens:,} tokens, got {config.max_tokens:,}"
        )
    return config.max_tokens // tokens.ctx_len


def sites_of(config: CacheConfig, model_config: Any) -> list[Site]:
    """The sites that settings name in a model, in its order.

    Args:
        config: of the stage.
        model_config: the model's transformers config.

    Raises:
        ConfigError: a layer or a module that does not exist.
    """
    architecture = Architecture(model_config)
    layers = config.layers
    if config.layer_stride and not (config.layers or config.sites):
        layers = tuple(range(0, len(architecture.blocks), config.layer_stride))
    return architecture.resolve(layers, config.sites)


def content_of(config: CacheConfig, tokens: TokenStore) -> dict[str, Any]:
    """What decides the content of a new store made with these settings, but for its sites."""
    n_rows = _n_rows(config, tokens, None)
    return _identity(config, tokens, None, n_rows, World.here().device(config.device))


def _identity(
    config: CacheConfig, tokens: TokenStore, there: StoreSettings | None, n_rows: int, device: torch.device
) -> dict[str, Any]:
    """What decides the store's content, site by site; what the user left open is as it is there."""
    shard_tokens = config.shard_tokens or (there.shard_tokens if there else SHARD_TOKENS)
    rows_per_shard = max(1, min(n_rows, shard_tokens // tokens.ctx_len))
    model_dtype = str(choose_model_dtype(config.model_dtype, device)).removeprefix("torch.")
    if config.model_dtype == "auto" and there:
        model_dtype = str(there.model_dtype)
    in_8bit = there.load_in_8bit if there and config.load_in_8bit is None else config.load_in_8bit
    mask = config.mask or (there.mask if there else MaskConfig())
    return {
        "format": FORMAT,
        "kind": "tokens",
        "tokens_fingerprint": tokens.fingerprint,
        "n_rows": n_rows,
        "shard_tokens": rows_per_shard * tokens.ctx_len,
        "dtype": config.dtype or (there.dtype if there else "bf16"),
        "model_dtype": model_dtype,
        "load_in_8bit": in_8bit or None,
        "model_fingerprint": fingerprint_model(config.model, config.revision),
        "mask": settings.plain(mask),
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


def _plan(config: CacheConfig, identity: dict[str, Any], ctx_len: int, sites: list[Site]) -> str:
    """What will be written, as text; what cannot fit on the disk is refused."""
    n_rows, shard_tokens = identity["n_rows"], identity["shard_tokens"]
    n_shards = -(-n_rows * ctx_len // shard_tokens)
    itemsize = DTYPES[identity["dtype"]].itemsize
    needed = {site.name: n_shards * shard_tokens * site.width * itemsize for site in sites}
    folder = config.out.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    there = sum(durable.folder_bytes(config.out / site.name / "c") for site in sites)
    missing = sum(needed.values()) - there
    if missing > free:
        raise ConfigError(
            f"{missing / 2**20:,.1f} MiB are needed in {folder}, {free / 2**20:,.1f} MiB are free; "
            "choose fewer sites or --max-tokens, or another disk"
        )
    padded = ", the last one padded" if n_rows * ctx_len % shard_tokens else ""
    lines = [
        f"{counted(n_rows, 'row')} of {ctx_len}, {n_rows * ctx_len:,} tokens, stored as {identity['dtype']}, "
        f"per site in {counted(n_shards, 'shard')} of {shard_tokens:,} tokens{padded}:",
        *(f"  {s.name:32} D {s.width:6,}  {needed[s.name] / 2**20:12,.1f} MiB" for s in sites),
        f"  {sum(needed.values()) / 2**20:,.1f} MiB in all, {free / 2**20:,.1f} MiB free",
    ]
    return "\n".join(lines)


def _open(
    config: CacheConfig,
    tokens: TokenStore,
    identity: dict[str, Any],
    sites: list[Site],
    plan: str,
    worker: Worker,
) -> tuple[ActivationStore, list[SiteWriter]]:
    """The store with its tokens and the sites' arrays, made where they are missing."""
    copy, n_rows = config.out / "tokens", identity["n_rows"]
    was_there = (copy / "manifest.json").exists()
    # Workers hash the copy side by side; then a copy that was not there is new, and its sizes will do.
    whole = token_copy.is_whole(copy, tokens, n_rows, hashes=True)
    with worker.hold("store") as claim:
        there = _settings_there(config, tokens)
        check_same_store(config.out, there, identity)
        say(plan)
        if not whole and not token_copy.is_whole(copy, tokens, n_rows, hashes=was_there):
            token_copy.make(copy, tokens, n_rows, worker.partial(), claim)
        write_group(config.out, there or _new_settings(config, identity), worker)
        store = ActivationStore(config.out)
        return store, [SiteWriter(store, site, DTYPES[identity["dtype"]], worker) for site in sites]


def _new_settings(config: CacheConfig, identity: dict[str, Any]) -> StoreSettings:
    return StoreSettings.made(
        identity,
        model=config.model,
        revision=config.revision,
        weights_fingerprint=fingerprint_weights(config.model),
        versions={name: version(name) for name in ("saemill", "torch", "transformers", "zarr")},
    )


def _say_what_is_there(store: ActivationStore, pending: dict[str, list[int]]) -> None:
    """Where an earlier run got to, site by site."""
    for name, shards in pending.items():
        n_there = store.n_shards - len(shards)
        if shards and n_there:
            say(
                f"{name}: {n_there:,} of {counted(store.n_shards, 'shard')} are there, "
                f"continuing with shard {shards[0]}"
            )

"""`saemill cache`: one forward pass over the rows serves every requested site."""

import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import zarr
from torch import Tensor

from saemill.cache.writer import DTYPES, ZARR_LITTER, SiteWriter
from saemill.common import config as settings
from saemill.common import durable
from saemill.common.activations import FORMAT, ActivationStore, read_settings
from saemill.common.errors import ConfigError, StoreError
from saemill.common.log import counted, progress, say
from saemill.common.mask import MaskConfig
from saemill.common.model import (
    LanguageModel,
    attention_of,
    check_fit,
    choose_device,
    choose_model_dtype,
    fingerprint_model,
)
from saemill.common.sites import Architecture, Site, load_model_config
from saemill.common.tokenizer import check_tokenizer
from saemill.common.tokens import TokenStore, copy_rows

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

    def __post_init__(self) -> None:
        for name in ("batch_size", "shard_tokens", "layer_stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be 1 or more, got {value}")
        chosen = [name for name in ("layers", "sites", "layer_stride") if getattr(self, name)]
        if not chosen:
            raise ConfigError("name what to cache: --layers 2,4, --sites 'layers.*.mlp' or --layer-stride 2")
        if self.layer_stride and len(chosen) > 1:
            raise ConfigError(f"layer_stride chooses all layers itself; leave out {chosen[0]}")


def run(config: CacheConfig) -> ActivationStore:
    """Cache the activations of the chosen sites into `config.out`.

    A store that exists is added to: sites that are missing are cached, shards and tokens that are
    missing or damaged are written again, and nothing else is touched. Settings left open are the store's.

    Raises:
        ConfigError: settings that do not fit the model or the tokens, a store made with others, or
            too little disk.
        DataError: NaN or infinite activations.
        StoreError: damaged tokens, a folder with other files, or another process that writes to it.
    """
    tokens = TokenStore(config.tokens)
    there = _settings_there(config, tokens)
    n_rows = _n_rows(config, tokens, there)
    device = choose_device(config.device)
    model_config = load_model_config(config.model, config.revision)
    check_fit(model_config, config.model, tokens.tokenizer, tokens.ctx_len)
    check_tokenizer(tokens.tokenizer, config.model, config.revision, config.allow_other_tokenizer)
    sites = _sites(config, Architecture(model_config))
    identity = _identity(config, tokens, there, n_rows, device)
    plan = _plan(config, identity, tokens.ctx_len, sites)
    with durable.exclusive(config.out):
        settings.check_same(_settings_there(config, tokens) or identity, identity, config.out)
        say(plan)
        store = _open_or_create(config, tokens, identity)
        writers = [SiteWriter(store, site, DTYPES[identity["dtype"]]) for site in sites]
        pending = {writer.site.name: writer.pending() for writer in writers}
        if any(pending.values()):
            _say_what_is_there(store, pending)
            _fill(config, store, writers, pending, device)
        for writer in writers:
            if not writer.manifest_path.exists():
                writer.finish()
    n_written = sum(map(len, pending.values()))
    what = f"{counted(n_written, 'shard')} written" if n_written else "nothing to do, every shard was checked"
    say(f"{config.out}: {', '.join(site.name for site in sites)} complete; {what}")
    return store


def _settings_there(config: CacheConfig, tokens: TokenStore) -> dict[str, Any]:
    """The settings of the store at the output; none where a new one may be made.

    Raises:
        ConfigError: the output cannot be a folder.
        StoreError: it holds other files.
    """
    settings.check_folder(config.out)
    if (config.out / "zarr.json").exists():
        return read_settings(config.out)
    litter = set(config.out.glob(ZARR_LITTER)) | {config.out / "tokens.partial"}
    if config.out.exists() and set(config.out.iterdir()) - litter - _copies(tokens, config.out):
        raise StoreError(f"{config.out} holds other files; choose a new folder")
    return {}


def _n_rows(config: CacheConfig, tokens: TokenStore, there: dict[str, Any]) -> int:
    if config.max_tokens is None:
        return int(there.get("n_rows", tokens.n_rows))
    if not tokens.ctx_len <= config.max_tokens <= tokens.n_tokens:
        raise ConfigError(
            f"max_tokens must be between one row ({tokens.ctx_len:,}) and the store's "
            f"{tokens.n_tokens:,} tokens, got {config.max_tokens:,}"
        )
    return config.max_tokens // tokens.ctx_len


def _sites(config: CacheConfig, architecture: Architecture) -> list[Site]:
    layers = config.layers
    if config.layer_stride:
        layers = tuple(range(0, len(architecture.blocks), config.layer_stride))
    return architecture.resolve(layers, config.sites)


def _identity(
    config: CacheConfig, tokens: TokenStore, there: dict[str, Any], n_rows: int, device: torch.device
) -> dict[str, Any]:
    """What decides the store's content, site by site; what the user left open is as it is there."""
    shard_tokens = config.shard_tokens or there.get("shard_tokens", SHARD_TOKENS)
    rows_per_shard = max(1, min(n_rows, shard_tokens // tokens.ctx_len))
    model_dtype = str(choose_model_dtype(config.model_dtype, device)).removeprefix("torch.")
    if config.model_dtype == "auto":
        model_dtype = there.get("model_dtype", model_dtype)
    mask = config.mask and settings.plain(config.mask)
    return {
        "format": FORMAT,
        "tokens_fingerprint": tokens.fingerprint,
        "n_rows": n_rows,
        "shard_tokens": rows_per_shard * tokens.ctx_len,
        "dtype": config.dtype or there.get("dtype", "bf16"),
        "model_dtype": model_dtype,
        "model_fingerprint": fingerprint_model(config.model, config.revision),
        "mask": mask or there.get("mask") or settings.plain(MaskConfig()),
    }


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


def _open_or_create(config: CacheConfig, tokens: TokenStore, identity: dict[str, Any]) -> ActivationStore:
    if (config.out / "zarr.json").exists():
        _have_tokens(tokens, identity["n_rows"], config.out / "tokens")
        return ActivationStore(config.out)
    for file in config.out.glob(ZARR_LITTER):
        file.unlink()
    _have_tokens(tokens, identity["n_rows"], config.out / "tokens")
    made_by = {
        "model": config.model,
        "revision": config.revision,
        "versions": {name: version(name) for name in ("saemill", "torch", "transformers", "zarr")},
    }
    zarr.create_group(str(config.out), attributes={"saemill": identity | made_by})
    return ActivationStore(config.out)


def _copies(tokens: TokenStore, folder: Path) -> set[Path]:
    """The copy of these tokens that an earlier run left in `folder`, and no token store of the user's."""
    manifest = folder / "tokens" / "manifest.json"
    if not manifest.exists():
        return set()
    parent = durable.read_json(manifest).get("parent_fingerprint")
    return {folder / "tokens"} if parent == tokens.fingerprint else set()


def _have_tokens(tokens: TokenStore, n_rows: int, path: Path) -> None:
    """Copy the rows to `path`, unless they are there and whole."""
    try:
        copy = TokenStore(path)
        if copy.n_rows == n_rows and not copy.problems(hashes=True):
            return
    except StoreError:
        pass
    shutil.rmtree(path, ignore_errors=True)
    copy_rows(tokens, n_rows, path)


def _say_what_is_there(store: ActivationStore, pending: dict[str, list[int]]) -> None:
    """Where an earlier run got to, site by site."""
    for name, shards in pending.items():
        n_there = store.n_shards - len(shards)
        if shards and n_there:
            say(
                f"{name}: {n_there:,} of {counted(store.n_shards, 'shard')} are there, "
                f"continuing with shard {shards[0]}"
            )


def _fill(
    config: CacheConfig,
    store: ActivationStore,
    writers: list[SiteWriter],
    pending: dict[str, list[int]],
    device: torch.device,
) -> None:
    """Run the model over every shard that some site lacks; writing overlaps the next forward."""
    model_dtype = getattr(torch, store.settings["model_dtype"])
    model = LanguageModel(config.model, revision=config.revision, dtype=model_dtype, device=device)
    shards = sorted(set().union(*pending.values()))
    total = sum(map(store.shard_length, range(store.n_shards)))
    done = total - sum(map(store.shard_length, shards))
    with progress("cache", total, "tokens", done) as advance, _background() as submit:
        for shard in shards:
            needing = [writer for writer in writers if shard in pending[writer.site.name]]
            captured = _capture_shard(config, store, model, shard, needing, advance)
            submit(_write_all, shard, needing, captured)


def _capture_shard(
    config: CacheConfig,
    store: ActivationStore,
    model: LanguageModel,
    shard: int,
    writers: list[SiteWriter],
    advance: Any,
) -> dict[str, Tensor]:
    """Activations of one shard in address order, per site [tokens, D] on the CPU.

    Batches start at the shard's first row, so that a shard's bytes do not depend on which shards
    were computed before it.
    """
    n_tokens = store.shard_length(shard)
    first_row = shard * store.shard_tokens // store.ctx_len
    last_row = first_row + n_tokens // store.ctx_len
    names = [writer.site.name for writer in writers]
    out = {w.site.name: torch.empty(n_tokens, w.site.width, dtype=w.dtype) for w in writers}
    for row in range(first_row, last_row, config.batch_size):
        stop = min(row + config.batch_size, last_row)
        ids_RS = torch.from_numpy(store.tokens.rows(row, stop).astype("int64"))
        captured = model.capture(ids_RS, names, attention_of(ids_RS, store.tokens.tokenizer))
        start = (row - first_row) * store.ctx_len
        for name, x_RSD in captured.items():
            out[name][start : start + ids_RS.numel()] = x_RSD.flatten(0, 1)
        advance(ids_RS.numel())
    return out


def _write_all(shard: int, writers: list[SiteWriter], captured: dict[str, Tensor]) -> None:
    for writer in writers:
        writer.write(shard, captured[writer.site.name])


@contextmanager
def _background() -> Iterator[Any]:
    """A function that runs one call at a time in a thread and raises what the last one raised."""
    pending: list[Future[None]] = []
    with ThreadPoolExecutor(1) as pool:

        def submit(function: Any, *arguments: Any) -> None:
            while pending:
                pending.pop().result()
            pending.append(pool.submit(function, *arguments))

        yield submit
        while pending:
            pending.pop().result()

"""`saemill convert-store`: a store's activations, read and written again in another form.

What a form keeps is kept bit by bit: another compression or other shards change no activation, and codes of
int8 stay as they are, with their calibration. Another type rounds.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from saemill.cache.calibration import calibration_of, first_rows
from saemill.cache.claims.files import CLAIMS, holds_only_claims
from saemill.cache.claims.worker import Claim, Worker
from saemill.cache.folder import check_same_store, write_group
from saemill.cache.repair import damaged, mend
from saemill.cache.writer import ROWS_AT_ONCE, SiteWriter
from saemill.common import config as settings
from saemill.common import durable, records
from saemill.common.errors import ConfigError, StoreError
from saemill.common.log import counted, progress, say
from saemill.common.signals import stop_on_signal
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.forms.form import Form, empty
from saemill.common.stores.forms.packing import BLOCK_TOKENS, packing_of, rows_per_shard
from saemill.common.stores.passages import PassageStore
from saemill.common.stores.shards import as_numpy, as_tensor
from saemill.common.stores.site_array import SiteArray
from saemill.common.stores.site_names import folder_of
from saemill.common.stores.site_records import (
    REPAIR,
    SITES,
    Site,
    StoreSettings,
    known_settings,
    site_path,
    sites_in,
)
from saemill.common.stores.tokens import TokenStore
from saemill.common.world import World, speak_for
from saemill.convert_store.addressed import Addressed
from saemill.convert_store.config import ConvertConfig


@dataclass(frozen=True, slots=True)
class Plan:
    """The planned store."""

    source: ActivationStore
    out: Path
    settings: StoreSettings
    """Those of the source, in the form that is asked for."""
    sites: list[SiteArray]
    forms: dict[str, Form]
    """By site."""


def run(config: ConvertConfig) -> ActivationStore:
    """Write the finished sites of a store to `config.out`, in another form.

    A store that is there already, begun by the same call, is finished or mended.

    Raises:
        ConfigError: the form is the source's own, the output holds another store, or too little disk.
        StoreError: the source is damaged, or the output holds other files.
        DataError: activations that the type cannot hold.
        Interrupted: a signal came; the same call goes on.
    """
    speak_for(World.here())
    plan = make_plan(config)
    with (
        stop_on_signal() as stop,
        Worker(plan.out / CLAIMS, stop) as worker,
        worker.hold("store") as claim,
    ):
        write_group(plan.out, plan.settings, worker)
        _copy_text(plan, worker, claim)
        store = ActivationStore(plan.out)
        n_written = sum(_convert(plan, site, store, worker, claim) for site in plan.sites)
    what = f"{counted(n_written, 'shard')} written" if n_written else "nothing to do, every shard was checked"
    say(f"{plan.out}: {', '.join(site.name for site in plan.sites)} as {plan.settings.stored_as}; {what}")
    return store


def make_plan(config: ConvertConfig) -> Plan:
    """Work out the store that is to be made, and tell what is lost. What cannot be done is refused."""
    settings.check_folder(config.out)
    source = ActivationStore(config.source)
    sites = [source.array(name) for name in source.sites]
    if not sites:
        raise StoreError(f"no site of {source.path} is finished; finish one with `saemill cache`")
    if source.unfinished:
        say(f"left out, as they are unfinished: {', '.join(source.unfinished)}")
    wanted = _settings(config, source)
    _check_out(config, wanted)
    plan = Plan(source, config.out, wanted, sites, {site.name: _form(wanted, site) for site in sites})
    _check_disk(plan)
    if wanted.dtype != source.settings.dtype:
        say(_loss(source.settings.dtype, wanted.dtype))
    return plan


def _settings(config: ConvertConfig, source: ActivationStore) -> StoreSettings:
    """Make the settings of the new store."""
    before = source.settings
    compression = config.compression or before.compression
    compression = None if compression == "raw" else compression
    shard_tokens, n_rows, ctx_len = config.shard_tokens or before.shard_tokens, before.n_rows, source.ctx_len
    form: dict[str, Any] = {
        "dtype": config.dtype or before.dtype,
        "compression": compression,
        "shard_tokens": rows_per_shard(shard_tokens, n_rows, ctx_len, compression) * ctx_len,
    }
    if all(getattr(before, name) == value for name, value in form.items()):
        raise ConfigError(
            f"{source.path} is stored as {before.stored_as} in shards of {before.shard_tokens:,} already: "
            "nothing to convert; give another --dtype, --compression or --shard-tokens"
        )
    changes = {name: form[name] for name in ("dtype", "shard_tokens") if form[name] != getattr(before, name)}
    if before.fingerprint and changes:  # which SAEs of the published store know it by
        form["fingerprint"] = durable.hash_json([before.fingerprint, changes])
    if "dtype" in changes:
        form["converted_from"] = before.dtype
    values = before.model_dump(mode="json") | form
    return StoreSettings.made(values)


def _check_out(config: ConvertConfig, wanted: StoreSettings) -> None:
    """Refuse an output that holds anything but the beginning of this store."""
    out, existing = config.out, known_settings(config.out)
    if out.resolve() == config.source.resolve() or config.source.resolve() in out.resolve().parents:
        raise ConfigError(f"the output must lie outside {config.source}, which stays as it is, got {out}")
    if existing:
        check_same_store(out, existing, wanted.plain(set()))
    own = {"zarr.json", SITES, _text_of(wanted), *map(folder_of, sites_in(out))} if existing else set()
    for path in out.glob("*"):
        if not (path.name in own or (path.name == CLAIMS and holds_only_claims(path))):
            raise StoreError(f"{out} holds other files ({path.name}); choose a new folder")


def _text_of(wanted: StoreSettings) -> str:
    """Name the folder of a store's tokens or passages."""
    return "tokens" if wanted.kind == "tokens" else "passages"


def _check_disk(plan: Plan) -> None:
    """Refuse what will not fit on the disk."""
    n_rows = -(-plan.source.n_tokens // plan.settings.shard_tokens) * plan.settings.shard_tokens
    needed = sum(n_rows * _row_bytes(plan, site) for site in plan.sites)
    needed -= sum(durable.folder_bytes(site_path(plan.out, site.name) / "c") for site in plan.sites)
    folder = next(folder for folder in (plan.out.absolute(), *plan.out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"{needed / 2**20:,.1f} MiB are needed in {folder}, {free / 2**20:,.1f} MiB are free; choose "
            "another disk, --dtype int8 or --compression zstd"
        )


def _row_bytes(plan: Plan, site: SiteArray) -> float:
    """Compute the bytes that a row takes on the disk; compressed, those that one of the first block does."""
    form = plan.forms[site.name]
    if plan.settings.compression is None:
        return form.columns * form.stored.itemsize
    rows_TC = as_numpy(_stored_again(site, site.block(0, 0).copy(), form))
    packing = packing_of(plan.settings.compression, BLOCK_TOKENS, form.columns, rows_TC.dtype)
    return sum(map(len, packing.pack(rows_TC).blocks)) / len(rows_TC)


def _form(wanted: StoreSettings, site: SiteArray) -> Form:
    """Make the form of a site in the new store. Its calibration is the source's or, where that has none, by
    the source's rows."""
    calibration = site.manifest.calibration
    if wanted.dtype == "int8" and calibration is None:
        first_TD = site.read(0, len(first_rows(site.store)) * site.store.ctx_len)
        calibration = calibration_of(site.store, first_TD)
    return wanted.form(site.width, calibration)


def _stored_again(site: SiteArray, rows_TC: NDArray[Any], form: Form) -> Tensor:
    """Turn stored rows of the source into those of the new store: the same, where the type is."""
    stored_TC = as_tensor(rows_TC, site.stored)
    if form.stored == site.stored:
        return stored_TC
    again_TC = empty(form, len(stored_TC))
    for piece, into in zip(*(torch.split(x, ROWS_AT_ONCE) for x in (stored_TC, again_TC)), strict=True):
        form.encode(site.decode(piece), into)
    return again_TC


def _loss(before: str, now: str) -> str:
    """Say what another type does to the activations."""
    if before == "int8":
        return f"{now} holds what the codes of int8 tell: their error, of about 1e-4 of the variance, stays"
    if now == "fp32":
        return f"fp32 holds what {before} told: no value is rounded, and none is more exact"
    return f"activations are rounded from {before} to {now}; only the source keeps them as they are"


def _copy_text(plan: Plan, worker: Worker, claim: Claim) -> None:
    """Copy the tokens or passages, where they are not there yet or not whole."""
    text = plan.source.text
    place = plan.out / text.path.name
    if _is_whole(text, place):
        return
    if bad := text.problems(hashes=True):
        raise StoreError("\n".join([*bad, f"{text.path} is damaged: {REPAIR}"]))
    partial = worker.partial()
    shutil.copytree(text.path, partial)
    records.listed(partial)  # which flushes them
    claim.check()
    shutil.rmtree(place, ignore_errors=True)
    partial.replace(place)
    durable.sync_folder(plan.out)


def _is_whole(text: TokenStore | PassageStore, place: Path) -> bool:
    """Tell whether a folder holds a whole copy of some tokens or passages."""
    copy = records.if_whole(lambda: type(text)(place))
    return copy is not None and copy.fingerprint == text.fingerprint and not copy.problems(hashes=True)


def _convert(plan: Plan, site: SiteArray, store: ActivationStore, worker: Worker, claim: Claim) -> int:
    """Write the shards of a site that are missing or damaged. Return their number."""
    writer = SiteWriter(store, Site(site.name, site.width), worker)
    writer.note(site.role, getattr(plan.forms[site.name], "calibration", None))
    mend(writer, damaged(writer))
    lacking = writer.lacking()
    if lacking:
        _write(site, lacking, store, writer, claim)
    if not writer.finish():
        raise StoreError(f"shards of {store.path} went missing meanwhile; run the command again")
    return len(lacking)


def _write(
    site: SiteArray, lacking: list[int], store: ActivationStore, writer: SiteWriter, claim: Claim
) -> None:
    """Write the shards of a site that are lacking."""
    addressed = Addressed(site)
    n_done = store.n_tokens - sum(map(store.shard_length, lacking))
    with progress(f"convert {site.name}", store.n_tokens, f"{store.text.unit}s", n_done) as advance:
        for shard in lacking:
            writer.worker.check_stop()
            start = shard * store.shard_tokens
            rows_TC = addressed.rows(start, start + store.shard_length(shard))
            writer.write(shard, _stored_again(site, rows_TC, writer.form), claim)
            advance(len(rows_TC))

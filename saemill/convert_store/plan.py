"""The plan of a conversion: the settings of the new store, checked before a shard is read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saemill.cache.calibration import calibration_of, first_rows
from saemill.cache.claims.files import holds_only_claims
from saemill.cache.folder import check_same_store
from saemill.cache.outlook import RECORDS
from saemill.cache.placing import Place, place_of
from saemill.common import config as settings
from saemill.common import durable
from saemill.common.addresses import named, naming
from saemill.common.errors import ConfigError, StoreError
from saemill.common.log import counted, say
from saemill.common.outlook import Outlook
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.forms.form import Form
from saemill.common.stores.forms.int8 import Calibration
from saemill.common.stores.forms.packing import BLOCK_TOKENS, packing_of, rows_per_shard
from saemill.common.stores.mirror import OBJECTS
from saemill.common.stores.shards import as_numpy
from saemill.common.stores.site_array import SiteArray
from saemill.common.stores.site_names import folder_of
from saemill.common.stores.site_records import (
    CLAIMS,
    SITES,
    StoreSettings,
    known_settings,
    site_path,
    sites_in,
)
from saemill.convert_store.config import ConvertConfig
from saemill.convert_store.rows import stored_again


@dataclass(frozen=True, slots=True)
class Plan:
    """The planned store."""

    source: ActivationStore
    place: Place
    """Where it is to lie."""
    settings: StoreSettings
    """Those of the source, in the form that is asked for."""
    sites: list[SiteArray]
    calibrations: dict[str, Calibration | None]
    """By site; None where the new store is not int8."""

    def form(self, site: SiteArray) -> Form:
        """Make the form of a site in the new store."""
        return self.settings.form(site.width, self.calibrations[site.name])


def make_plan(config: ConvertConfig) -> Plan:
    """Work out the store that is to be made, and tell what is lost. What cannot be done is refused."""
    _check_outside(config)
    place = place_of(config.out)
    settings.check_folder(place.folder)
    source = ActivationStore(config.source)
    with naming(source.path, source.named):
        source.check_finished()
    sites = [source.array(name) for name in source.sites]
    if source.unfinished:
        say(f"left out, as they are unfinished: {', '.join(source.unfinished)}")
    wanted = _settings(config, source)
    with naming(place.folder, place.name):
        _check_out(place.folder, wanted)
    plan = Plan(source, place, wanted, sites, {site.name: _calibration(wanted, site) for site in sites})
    _check_room(plan, outlook_of(plan, config.out))
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
            f"{source.named} is stored as {before.stored_as} in shards of {before.shard_tokens:,} already: "
            "nothing to convert; give another --dtype, --compression or --shard-tokens"
        )
    changes = {name: form[name] for name in ("dtype", "shard_tokens") if form[name] != getattr(before, name)}
    if before.fingerprint and changes:  # which SAEs of the published store know it by
        form["fingerprint"] = durable.hash_json([before.fingerprint, changes])
    if "dtype" in changes:
        form["converted_from"] = before.dtype
    values = before.model_dump(mode="json") | form
    return StoreSettings.made(values)


def _check_outside(config: ConvertConfig) -> None:
    """Refuse an output within the source."""
    # An address is no path of this disk: as one it would be resolved from here, the same for both.
    source, out = config.source.resolve(), config.out.resolve()
    if out == source or source in out.parents:
        raise ConfigError(
            f"the output must lie outside {named(config.source)}, which stays as it is, got "
            f"{named(config.out)}"
        )


def _check_out(out: Path, wanted: StoreSettings) -> None:
    """Refuse an output that holds anything but the beginning of this store."""
    existing = known_settings(out)
    if existing:
        check_same_store(out, existing, wanted.plain(set()))
    own = {"zarr.json", SITES, _text_of(wanted), *map(folder_of, sites_in(out))} if existing else set()
    for path in out.glob("*"):
        if not (path.name in own | {OBJECTS} or (path.name == CLAIMS and holds_only_claims(path))):
            raise StoreError(f"{out} holds other files ({path.name}); choose a new folder")


def _text_of(wanted: StoreSettings) -> str:
    """Name the folder of a store's tokens or passages."""
    return "tokens" if wanted.kind == "tokens" else "passages"


def outlook_of(plan: Plan, out: Path) -> Outlook:
    """Work out what is going to be written to `out`; shards and text that are there already are left out."""
    source, folder, now = plan.source, plan.place.folder, plan.settings
    unit, before, n_shards = source.text.unit, source.settings, -(-source.n_tokens // now.shard_tokens)
    has_text = (folder / source.text.path.name / "manifest.json").exists()
    lacking = {
        site.name: n_shards - sum(1 for _ in site_path(folder, site.name).glob("c/*/0"))
        for site in plan.sites
    }
    disk = {
        site.name: round(lacking[site.name] * now.shard_tokens * _row_bytes(plan, site))
        for site in plan.sites
    }
    records = sum(
        n_lacking * durable.folder_bytes(site_path(source.path, name) / "commits") / n_shards
        for name, n_lacking in lacking.items()
    )
    copy = 0 if has_text else durable.folder_bytes(source.text.path)
    packed = f" compressed by {now.compression} (sizes as the first block's)" if now.compression else ""
    from_ = f"from {before.stored_as} in shards of {before.shard_tokens:,}"
    to = f"to {now.dtype}{packed} in shards of {now.shard_tokens:,}"
    return Outlook(
        stage="convert-store",
        what=(
            f"{counted(source.n_tokens, unit)} {from_} {to}:",
            *(
                f"  {site.name:32} D {site.width:6,}  {disk[site.name] / 2**20:12,.1f} MiB in "
                f"{counted(lacking[site.name], 'shard')}"
                for site in plan.sites
            ),
        ),
        folder=out,
        amounts={f"{unit}s": source.n_tokens},
        unit=unit,
        disk=disk | {RECORDS: round(records), f"copy of the {unit}s": copy},
    )


def _check_room(plan: Plan, outlook: Outlook) -> None:
    """Refuse what will not fit where it is to lie, records and the copy of the tokens or passages included;
    what is written on a disk already counts."""
    shard_bytes = plan.settings.shard_tokens * max(_row_bytes(plan, site) for site in plan.sites)
    plan.place.check_room(outlook.disk_bytes, shard_bytes, "--dtype int8 or --compression zstd")


def _row_bytes(plan: Plan, site: SiteArray) -> float:
    """Compute the bytes that a row takes on the disk; compressed, those that one of the first block does."""
    form = plan.form(site)
    if plan.settings.compression is None:
        return form.columns * form.stored.itemsize
    rows_TC = as_numpy(stored_again(site, site.block(0, 0).copy(), form))
    packing = packing_of(plan.settings.compression, BLOCK_TOKENS, form.columns, rows_TC.dtype)
    return sum(map(len, packing.pack(rows_TC).blocks)) / len(rows_TC)


def _calibration(wanted: StoreSettings, site: SiteArray) -> Calibration | None:
    """Calibrate a site where the new store is int8: as the source is, or by the source's rows."""
    if wanted.dtype != "int8":
        return None
    if site.manifest.calibration is not None:
        return site.manifest.calibration
    first_TD = site.read(0, len(first_rows(site.store)) * site.store.ctx_len)
    return calibration_of(site.store, first_TD)


def _loss(before: str, now: str) -> str:
    """Say what another type does to the activations."""
    if before == "int8":
        return f"{now} holds what the codes of int8 tell: their error, of about 1e-4 of the variance, stays"
    if now == "fp32":
        return f"fp32 holds what {before} told: no value is rounded, and none is more exact"
    return f"activations are rounded from {before} to {now}; only the source keeps them as they are"

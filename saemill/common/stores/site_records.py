"""The records of an activation store: its settings, what each site is, each shard, and a finished site.

    zarr.json                     attribute `saemill`: StoreSettings
    sites/<site>.json             SiteRecord: the site belongs to the store, whose settings it repeats
    <site>/commits/<shard>.json   Commit
    <site>/manifest.json          SiteManifest

The settings are kept twice, so that either copy is written anew from the other.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import AfterValidator, field_serializer, model_validator

from saemill.common import durable, hub, records, setting
from saemill.common.errors import MissingError, StoreError
from saemill.common.records import Count, Hash, Positive, Record, decode_array
from saemill.common.stores.forms.form import Form, StoredType, form_of
from saemill.common.stores.forms.int8 import Calibration
from saemill.common.stores.forms.packing import BLOCK_TOKENS, Compression
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.norms import N_BINS
from saemill.common.stores.site_names import folder_of, module_of, site_of_folder
from saemill.common.stores.site_roles import Role
from saemill.common.stores.statistics_records import (
    Distances,
    Doubles,
    Lengths,
    SiteStatistics,
    check_lengths,
)

FORMAT: Final = "saemill activations 2"
EMBEDDINGS = "embeddings"
"""Kind of a store that holds passages."""
TEXT_FOLDERS = ("tokens", "passages")
SITES = "sites"
FOLLOWERS, CONSUMED = "followers", "consumed.json"
"""Names of the folder and the record of `stores.followers`."""
CLAIMS = "claims"
"""Name of the folder in which those who write a store share out its shards; it is gone when none is left."""
RESERVED = (*TEXT_FOLDERS, SITES, FOLLOWERS, CONSUMED, CLAIMS, "zarr.json")
"""Names in a store's folder that no site has."""
IN_MEMORY = ", in memory"
"""Words behind the name of a model that was given as an object."""
REPAIR = "Run the command that made it (`saemill cache`, …) again: it rebuilds only what is damaged."
LATER = ("load_in_4bit", "attn_implementation", "trust_remote_code", "compression", "converted_from")
"""Settings that the first stores had not."""
GROUP = {"zarr_format": 3, "node_type": "group"}
"""Entries that make a store's `zarr.json` that of a Zarr group."""


@dataclass(frozen=True, slots=True)
class Site:
    """A place in the model."""

    name: str
    """Path of the module in the base model, or that and `:in`."""
    width: int
    """Length D of one activation vector there."""


def hash_blocks(rows_TC: NDArray[Any]) -> NDArray[np.uint64]:
    """Compute xxh3 of each block of 256 stored rows; the last block may be short. uint64 [n_blocks]."""
    starts = range(0, len(rows_TC), BLOCK_TOKENS)
    hashed = [xxhash.xxh3_64_intdigest(rows_TC[i : i + BLOCK_TOKENS].data) for i in starts]
    return np.array(hashed, np.uint64)


def site_name(name: str) -> str:
    """Refuse what cannot be a site's name: a path, or what another part of a store is called.

    Raises:
        ValueError: it cannot.
    """
    if records.single(name) in RESERVED:
        raise ValueError(f"{name!r} is another part of a store")
    if set("~:") & set(module_of(name)):
        raise ValueError(f"must be a module's path, or one with :in, got {name!r}")
    return name


SiteName = Annotated[str, AfterValidator(site_name)]


class StoreSettings(Record):
    """The settings that decide a store's content site by site, and the origin of that content."""

    format: Literal["saemill activations 2"] = FORMAT
    kind: Literal["tokens", "embeddings"] = "tokens"
    tokens_fingerprint: str | None = None
    """Fingerprint of the token store whose rows were cached."""
    passages_fingerprint: str | None = None
    """Fingerprint of the passages, where `kind` is embeddings."""
    source_hash: Hash | None = None
    """Hash of the source of embeddings and of the settings that decided them. The passages' manifest has both
    in full; by this hash they are known where that is damaged."""
    n_rows: Positive
    shard_tokens: Positive
    dtype: StoredType
    """Stored type of the activations."""
    compression: Compression | None = None
    """How blocks of stored rows are compressed; None where they are raw."""
    converted_from: StoredType | None = None
    """Stored type of the store that this one was converted from, where it was another: its rounding is in
    the activations too."""
    model_dtype: Literal["bfloat16", "float16", "float32"] | None
    """Type that the model computed in."""
    load_in_8bit: bool | None = None
    load_in_4bit: bool | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool | None = None
    """Whether code of the model's own was run."""
    model_fingerprint: str | None
    mask: MaskConfig
    """Positions that statistics, training and assessment leave out by default."""
    model: str | None
    """Hub id or local folder; of a model in memory its name, with `IN_MEMORY` behind."""
    revision: str | None
    weights_fingerprint: str | None = None
    """Fingerprint of the weights of a local folder, whatever files hold them."""
    versions: dict[str, str]
    fingerprint: str | None = None
    """Fingerprint of the store, if it was published with names in place of paths; SAEs trained on it know it
    by this."""

    @field_serializer("mask")
    def _mask(self, mask: MaskConfig) -> dict[str, Any]:
        """Leave out what came after stores that are on disk, so that their identities stay."""
        return setting.identity(mask)

    @model_validator(mode="after")
    def _check(self) -> Self:
        known = self.passages_fingerprint if self.kind == EMBEDDINGS else self.tokens_fingerprint
        if known is None:
            raise ValueError(f"the fingerprint of the {self.kind} is missing")
        if self.compression and self.shard_tokens % BLOCK_TOKENS:
            raise ValueError(
                f"compressed shards hold whole blocks of {BLOCK_TOKENS}, got {self.shard_tokens}"
            )
        return self

    @classmethod
    def made(cls, identity: Mapping[str, Any], **made_by: Any) -> "StoreSettings":
        """Make settings from plain values: those that decide the content, and those that say what made it."""
        return cls.model_validate_json(json.dumps({**identity, **made_by}))

    @property
    def stored_as(self) -> str:
        """What rows are stored as, in words: bf16, or bf16 compressed by lz4."""
        rounded = (
            f"{self.dtype} (converted from {self.converted_from})" if self.converted_from else self.dtype
        )
        return rounded + (f" compressed by {self.compression}" if self.compression else "")

    def form(self, width: int, calibration: Calibration | None = None) -> Form:
        """Make the form of the activations at a site of some width."""
        return form_of(self.dtype, width, calibration)

    @cached_property
    def identity(self) -> str:
        """Hash of the settings that decide the content; each record of a shard or site names the store's by
        it."""
        made_by = {"source_hash", "model", "revision", "weights_fingerprint", "versions", "fingerprint"}
        return durable.hash_json(self.plain(made_by | {"trust_remote_code"}))

    def plain(self, left_out: set[str]) -> dict[str, Any]:
        """Return the settings as JSON has them, but for some, and for those of `LATER` that say nothing."""
        silent = {name for name in LATER if getattr(self, name) is None}
        return self.model_dump(mode="json", exclude=left_out | silent)


class SiteRecord(Record):
    """A site that the store has, finished or not."""

    format: Literal["saemill site 2"] = "saemill site 2"
    site: SiteName
    width: Positive
    """Number D of values per token."""
    role: Role | None = None
    """None where arithmetic does not tell, and in records of before saemill looked."""
    calibration: Calibration | None = None
    """Of int8; None until it is calibrated."""
    settings: StoreSettings

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_calibration(self.calibration, self.width)
        if self.calibration is not None and self.settings.dtype != "int8":
            raise ValueError(f"{self.settings.dtype} has no calibration")
        return self

    @property
    def form(self) -> Form:
        """Form of the site's activations."""
        return self.settings.form(self.width, self.calibration)


class Commit(Record):
    """A shard of a site: its file's size and hash, and sums over its training positions."""

    format: Literal["saemill shard 2"] = "saemill shard 2"
    store: Hash
    """Identity of the store, `StoreSettings.identity`."""
    site: SiteName
    shard: Count
    width: Positive
    n_tokens: Positive
    bytes: Positive
    xxh3: Hash
    block_hashes: str
    """Hashes (xxh3) of the blocks of stored rows, not compressed: uint64 [n_blocks] in base64."""
    calibration: Hash | None = None
    """Hash of the site's calibration, by which int8 codes were made."""
    n_counted: Count
    """Number of training positions."""
    mean: Doubles
    """Mean of the training positions, float64 [width]."""
    deviations: Doubles
    """Squared deviations from the mean, summed: float64 [width]."""
    distances: Distances
    norms: str | None = None
    """Norm of each row in stored order, as the bits of its bfloat16: uint16 [n_tokens] in base64. None in
    records of before saemill kept them."""
    lengths: Lengths | None = None
    """Counts of training positions by those bits. None where `norms` is."""
    batch_rows: Positive | None = None
    """Rows per forward pass that computed it, at most all of it: its last bits may depend on them. None where
    no model did so here, or in other shards, and in records of before saemill kept it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_lengths(self.width, self.mean, self.deviations)
        _check_blocks(self.block_hashes, self.n_tokens)
        if not sum(self.distances.values()) <= self.n_counted <= self.n_tokens:
            raise ValueError("more positions are counted than there are")
        _check_norms(self.norms, self.lengths, self.n_tokens, self.n_counted)
        _check_batch(self.batch_rows, self.n_tokens)
        return self

    def entry(self) -> "Shard":
        """Make the entry of the shard in the site's manifest."""
        return Shard(**{name: getattr(self, name) for name in Shard.model_fields})


def _check_calibration(calibration: Calibration | None, width: int) -> None:
    if calibration is not None and calibration.width != width:
        raise ValueError(f"{calibration.width:,} dimensions are calibrated, expected {width:,}")


def _check_norms(norms: str | None, lengths: Lengths | None, n_tokens: int, n_counted: int) -> None:
    if norms is None or lengths is None:
        if (norms is None) != (lengths is None):
            raise ValueError("norms and lengths must both be there, or neither")
        return
    bits_T = decode_array(norms, "u2")
    if len(bits_T) != n_tokens or not (bits_T < N_BINS).all():
        raise ValueError(f"{len(bits_T):,} rows have a norm, expected {n_tokens:,} finite ones")
    if sum(lengths.values()) != n_counted:
        raise ValueError("other rows are counted by norm than otherwise")


def _check_batch(batch_rows: int | None, n_tokens: int) -> None:
    if batch_rows is not None and batch_rows > n_tokens:
        raise ValueError(f"{batch_rows:,} rows were computed at once, and there are {n_tokens:,} tokens")


def _check_blocks(block_hashes: str, n_tokens: int) -> None:
    n_hashes, expected = len(decode_array(block_hashes, "u8")), math.ceil(n_tokens / BLOCK_TOKENS)
    if n_hashes != expected:
        raise ValueError(f"{n_hashes:,} blocks have a hash, expected {expected:,}")


class Shard(Record):
    """A shard in a finished site's manifest."""

    n_tokens: Positive
    bytes: Positive
    xxh3: Hash
    block_hashes: str
    batch_rows: Positive | None = None
    """As in the shard's record."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_blocks(self.block_hashes, self.n_tokens)
        _check_batch(self.batch_rows, self.n_tokens)
        return self


class SiteManifest(Record):
    """A finished site: its statistics, and its shards."""

    format: Literal["saemill finished site 2"] = "saemill finished site 2"
    store: Hash
    """Identity of the store, `StoreSettings.identity`."""
    site: SiteName
    width: Positive
    role: Role | None = None
    calibration: Calibration | None = None
    statistics: SiteStatistics
    shards: tuple[Shard, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        statistics = self.statistics
        _check_calibration(self.calibration, self.width)
        check_lengths(self.width, statistics.mean, statistics.variance)
        if bool((decode_array(statistics.variance, "f8") < 0).any()):
            raise ValueError("a variance is below 0")
        n_tokens = sum(shard.n_tokens for shard in self.shards)
        if not sum(statistics.distances.values()) <= statistics.n_tokens <= n_tokens:
            raise ValueError("more positions are counted than there are")
        if statistics.lengths is not None and sum(statistics.lengths.values()) != statistics.n_tokens:
            raise ValueError("other rows are counted by norm than otherwise")
        return self


def group_of(settings: StoreSettings) -> dict[str, Any]:
    """Make the content of a store's `zarr.json`."""
    return {**GROUP, "attributes": {"saemill": records.content(settings)}}


def read_settings(path: Path) -> StoreSettings:
    """Read the settings of the activation store in a folder.

    Raises:
        MissingError: there is none.
        StoreError: they are damaged, or of another version.
    """
    hub.check_local(path)
    file = path / "zarr.json"
    try:
        meta = durable.read_json(file, REPAIR)
    except MissingError:
        if sites_in(path):
            raise MissingError(f"{file}: {durable.MISSING}. {REPAIR}") from None
        raise MissingError(f"{path} is no activation store; make one with `saemill cache`") from None
    attributes = meta.get("attributes") if isinstance(meta, dict) else None
    if not isinstance(attributes, dict) or any(meta.get(key) != value for key, value in GROUP.items()):
        raise StoreError(f"{file} is damaged: it describes no Zarr group. {REPAIR}")
    if "saemill" not in attributes and not sites_in(path):
        raise StoreError(f"{path} is no activation store; make one with `saemill cache`")
    return records.parse(attributes.get("saemill"), StoreSettings, str(file), REPAIR)


def sites_in(path: Path) -> list[str]:
    """List the sites that a store's folder has records or folders of, finished or not."""
    names = {file.stem for file in path.glob(f"{SITES}/*.json")}
    names |= {folder.parent.name for folder in path.glob("*/commits")}
    return sorted(site_of_folder(name) for name in names - {*RESERVED} if not name.startswith("."))


def record_path(path: Path, site: str) -> Path:
    """Name the file of a site's record in the store at `path`."""
    return path / SITES / f"{folder_of(site)}.json"


def site_path(path: Path, site: str) -> Path:
    """Name the folder of a site's array in the store at `path`."""
    return path / folder_of(site)


def read_site(path: Path, name: str) -> SiteRecord:
    """Read the record of a site of the store at `path`.

    Raises:
        MissingError: the store has no such site.
        StoreError: the record is damaged, or another site's.
    """
    file = record_path(path, name)
    record = records.read(file, SiteRecord, REPAIR)
    if record.site != name:
        raise StoreError(f"{file} is the record of the site {record.site!r}. {REPAIR}")
    return record


def known_settings(path: Path) -> StoreSettings | None:
    """Read the settings of a store, from a site's record where its `zarr.json` is lost; None if no copy is
    left.

    Raises:
        DiskError: a file cannot be read.
    """
    if settings := records.if_whole(lambda: read_settings(path)):
        return settings
    for name in sites_in(path):
        if site := records.if_whole(partial(read_site, path, name)):
            return site.settings
    return None

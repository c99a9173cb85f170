"""Making the store: its passages, then the shards of its one site, through the cache's own writer."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saemill.cache.calibration import calibration_of, first_rows
from saemill.cache.claims.files import holds_only_claims
from saemill.cache.claims.worker import Claim, Worker
from saemill.cache.folder import check_same_store, write_group
from saemill.cache.placing import Place
from saemill.cache.repair import damaged, mend
from saemill.cache.spare import Spare
from saemill.cache.writer import SiteWriter
from saemill.common import config as settings
from saemill.common import durable, records, setting
from saemill.common.errors import ConfigError, DataError, StoreError
from saemill.common.log import counted, progress, say
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.forms.form import form_of
from saemill.common.stores.forms.packing import BLOCK_TOKENS, rows_per_shard
from saemill.common.stores.mirror import OBJECTS
from saemill.common.stores.passages import NO_MASK, PassageManifest, PassageStore, PassageWriter
from saemill.common.stores.site_records import (
    CLAIMS,
    EMBEDDINGS,
    FORMAT,
    RESERVED,
    SITES,
    Site,
    StoreSettings,
    known_settings,
    sites_in,
)
from saemill.embeddings.rows import Conversion, Rows

SHARD_BYTES = 1 << 26
SHARD_ROWS = 1 << 16
"""Largest shard of a new store, in bytes and in rows; the smaller of the two applies by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The planned content of the store."""

    out: Path
    """Folder of the store, or of the mirror of its address."""
    site: str
    source: dict[str, Any]
    """`name` and `fingerprint` of the passages' source."""
    settings: dict[str, Any]
    """Settings of the user; with the source they decide the content."""
    held_out_fraction: float
    shard_rows: int | None
    compression: str | None
    """As the user gives it: None for the store's own."""
    conversion: Conversion
    made_by: dict[str, Any]
    """`model`, `revision`, `model_fingerprint`, as far as known."""

    def __post_init__(self) -> None:
        if self.site in RESERVED or not re.fullmatch(r"\w[\w.-]*", self.site):
            raise ConfigError(f"{self.site!r} cannot be the name of a site; give another with --site")

    @property
    def source_hash(self) -> str:
        """Hash of the source and of the user's settings."""
        return durable.hash_json([self.source["fingerprint"], self.settings])


def describe(passages: PassageStore) -> str:
    """Describe how many passages there are."""
    manifest = passages.manifest
    note = "" if manifest.n_held_out_rows else " (raise --held-out-fraction to assess)"
    return f"{counted(passages.n_rows, 'passage')}, {manifest.n_held_out_rows:,} held out{note}"


def make_passages(plan: Plan, worker: Worker, write: Callable[[PassageWriter], str]) -> PassageStore:
    """Return the passages of the store: those on disk, or new ones.

    Args:
        plan: what they are to be.
        worker: this process, holding the claim on the store.
        write: adds all of them to a writer; returns what their sides were chosen by.

    Raises:
        ConfigError: the folder holds others, or the store there was made of others.
        StoreError: it holds other things.
    """
    folder, existing = plan.out / "passages", known_settings(plan.out)
    check_folder(plan, existing)
    if _whole(folder, existing):
        return PassageStore(folder)
    if folder.exists():
        say(f"{worker.place.named(folder)} is damaged, unfinished or of another store, and is written again")
    partial = worker.partial()
    writer = PassageWriter(partial, plan.held_out_fraction, plan.settings.get("source_column") is not None)
    hashed = write(writer)
    if writer.n_rows == 0:
        raise DataError(f"{plan.source['name']} holds no passages")
    writer.finish({"hashed": hashed, "source": plan.source, "settings": plan.settings})
    if existing and PassageStore(partial).fingerprint != existing.passages_fingerprint:
        raise _of_others(plan)
    worker.place.replace_text(partial, folder)
    return PassageStore(folder)


def _whole(folder: Path, existing: StoreSettings | None) -> bool:
    """Tell whether all passages are there, undamaged, and belong to the store."""
    passages = records.if_whole(lambda: PassageStore(folder))
    if passages is None:
        return False
    is_same = existing is None or existing.passages_fingerprint == passages.fingerprint
    return is_same and not passages.problems(hashes=True)


def check_folder(plan: Plan, existing: StoreSettings | None) -> None:
    """Refuse a folder that holds anything but the beginning of this store.

    Raises:
        ConfigError: it holds others, or the store there was made of others.
        StoreError: it holds other things.
    """
    begun = _manifest(plan.out / "passages")
    names = {"passages", OBJECTS}
    if existing or begun:
        names |= {"zarr.json", SITES, *sites_in(plan.out)}
    for path in plan.out.glob("*"):
        is_claims = path.name == CLAIMS and holds_only_claims(path)
        if not (is_claims or path.name in names):
            raise StoreError(f"{plan.out} holds other files ({path.name}); choose a new folder")
    if existing and existing.kind != EMBEDDINGS:
        raise ConfigError(f"{plan.out} holds activations of a language model; choose another folder")
    if existing and (begun is None or begun.fingerprint != existing.passages_fingerprint):
        if existing.source_hash != plan.source_hash:
            raise _of_others(plan)
        return
    if begun is None:
        return
    settings.check_same(begun.settings.model_dump(mode="json"), plan.settings, plan.out)
    if begun.source.fingerprint != plan.source["fingerprint"]:
        raise ConfigError(
            f"{plan.source['name']} is not what {plan.out} was made of, or has changed since; choose another "
            "output folder, or remove that one"
        )


def _of_others(plan: Plan) -> ConfigError:
    """Make the error for passages in the folder that cannot say what they were made of, where the store's
    hashes show that it was something else."""
    return ConfigError(
        f"the list of the passages in {plan.out} is damaged or another store's, and {plan.source['name']} "
        "with these settings does not give it again byte by byte: the store was made of another source, with "
        "other settings or by another version of pyarrow. Use what it was made with, choose another output "
        "folder, or remove that one"
    )


def _manifest(folder: Path) -> PassageManifest | None:
    """Read the manifest of the passages on disk; None unless it is whole."""
    return records.if_whole(lambda: records.read(folder / "manifest.json", PassageManifest, ""))


class Layout(NamedTuple):
    """How the rows of a store lie in its files."""

    n_rows: int
    row_bytes: int
    """Bytes of a stored row, before compression."""
    compression: str | None
    shard_rows: int

    @property
    def n_shards(self) -> int:
        """Number of shards."""
        return -(-self.n_rows // self.shard_rows)

    @property
    def shard_bytes(self) -> int:
        """Bytes of a shard, before compression; the last one is padded to it."""
        return self.shard_rows * self.row_bytes


def layout_of(plan: Plan, existing: StoreSettings | None, n_rows: int, width: int) -> Layout:
    """Choose how rows lie: as asked for, or as a store of the same rows has them already."""
    form = form_of(plan.conversion.stored, width)
    row_bytes = form.columns * form.stored.itemsize
    fitting = max(BLOCK_TOKENS, SHARD_BYTES // row_bytes // BLOCK_TOKENS * BLOCK_TOKENS)
    compression = plan.compression or (existing.compression if existing else None)
    compression = None if compression == "raw" else compression
    asked = plan.shard_rows or min(SHARD_ROWS, fitting)
    return Layout(n_rows, row_bytes, compression, rows_per_shard(asked, n_rows, 1, compression))


def identity_of(plan: Plan, layout: Layout, passages_fingerprint: str | None) -> dict[str, object]:
    """Collect the settings that decide the store's content."""
    return {
        "format": FORMAT,
        "kind": EMBEDDINGS,
        "passages_fingerprint": passages_fingerprint,
        "source_hash": plan.source_hash,
        "n_rows": layout.n_rows,
        "shard_tokens": layout.shard_rows,
        "dtype": plan.conversion.stored,
        "compression": layout.compression,
        "model_dtype": None,
        "model_fingerprint": plan.made_by["model_fingerprint"],
        "mask": setting.identity(NO_MASK),
    }


def check_room(place: Place, layout: Layout) -> None:
    """Refuse what has no room where it is to lie.

    Raises:
        ConfigError: it has none.
    """
    n_bytes = layout.n_shards * layout.shard_bytes
    place.check_room(n_bytes, layout.shard_bytes, "--max-rows or --dtype bf16")


def open_store(
    plan: Plan, passages: PassageStore, width: int, worker: Worker
) -> tuple[ActivationStore, SiteWriter]:
    """Open the store with its array; both are made where they are missing.

    Raises:
        ConfigError: it was made with other settings, or the disk is too small.
    """
    existing = known_settings(plan.out)
    layout = layout_of(plan, existing, passages.n_rows, width)
    identity = identity_of(plan, layout, passages.fingerprint)
    check_same_store(plan.out, existing, identity)
    if existing is None:
        check_room(worker.place, layout)
        versions = {name: version(name) for name in ("saemill", "torch", "zarr")}
        made_by = {key: plan.made_by[key] for key in ("model", "revision")} | {"versions": versions}
        existing = StoreSettings.made(identity, **made_by)
    write_group(plan.out, existing, worker)
    store = worker.place.opened()
    return store, SiteWriter(store, Site(plan.site, width), worker)


def fill(
    store: ActivationStore,
    writer: SiteWriter,
    conversion: Conversion,
    batches: Callable[[int], Iterator[Rows]],
    worker: Worker,
    claim: Claim,
) -> str:
    """Write the shards that are missing or damaged. Return a sentence on what was done.

    Args:
        store: the store.
        writer: of its site.
        conversion: what the vectors become.
        batches: the rows from a number on, in order.
        worker: this process.
        claim: on the store.

    Raises:
        DataError: the rows end before the last shard, or a vector is refused.
        Interrupted: a signal came; what was finished is committed.
    """
    if not writer.is_calibrated:
        x_TD = torch.empty(len(first_rows(store)), writer.site.width)
        for _ in _Reader(conversion, batches).fill(x_TD, 0):
            worker.check_stop()
        writer.note(None, calibration_of(store, x_TD))
    mend(writer, damaged(writer))
    missing = writer.lacking()
    n_missing = sum(map(store.shard_length, missing))
    if 0 < len(missing) < store.n_shards:
        n_done = store.n_shards - len(missing)
        say(f"{n_done:,} of {counted(store.n_shards, 'shard')} are there, continuing with shard {missing[0]}")
    if missing:
        reader, spare = _Reader(conversion, batches), Spare()
        with progress("write", store.n_tokens, "passages", store.n_tokens - n_missing) as advance:
            for shard in missing:
                x_TD = torch.empty(store.shard_length(shard), writer.site.width, dtype=conversion.dtype)
                for n_rows in reader.fill(x_TD, shard * store.shard_tokens):
                    worker.check_stop()
                    advance(n_rows)
                stored_TC = spare.empty("stored", writer.form, len(x_TD))
                writer.form.encode(x_TD, stored_TC)
                writer.write(shard, stored_TC, claim, spare)
    if not writer.finish():
        raise StoreError(f"shards of {store.path} went missing meanwhile; run the command again")
    return (
        f"{counted(len(missing), 'shard')} written" if missing else "nothing to do, every shard was checked"
    )


class _Reader:
    """A reader of a source's rows: it goes through them once, and starts again where shards are left out."""

    def __init__(self, conversion: Conversion, batches: Callable[[int], Iterator[Rows]]) -> None:
        self.conversion, self.batches = conversion, batches
        self._stream: Iterator[Rows] = iter(())
        self._position = -1
        self._left: Tensor | None = None

    def fill(self, x_TD: Tensor, start: int) -> Iterator[int]:
        """Read rows `start` on into all of x_TD; yield how many came at a time."""
        if start != self._position:
            self._stream, self._position, self._left = self.batches(start), start, None
        n_filled = 0
        while n_filled < len(x_TD):
            if self._left is None:
                rows = next(self._stream, None)
                if rows is None:
                    raise DataError(f"the source ends at row {self._position:,}; it has changed meanwhile")
                self._left = self.conversion.of(rows)
            chunk = self._left[: len(x_TD) - n_filled]
            x_TD[n_filled : n_filled + len(chunk)] = chunk
            self._left = self._left[len(chunk) :] if len(chunk) < len(self._left) else None
            n_filled += len(chunk)
            self._position += len(chunk)
            yield len(chunk)

"""`saemill import-activations`: stored embeddings, from whatever holds them, become an ActivationStore."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from saemill.cache.claims.worker import Worker
from saemill.cache.placing import Place, place_of
from saemill.common import config as settings
from saemill.common.addresses import naming
from saemill.common.errors import DataError
from saemill.common.log import progress, say
from saemill.common.outlook import Outlook
from saemill.common.signals import stop_on_signal
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.forms.form import StoredType
from saemill.common.stores.passages import PassageWriter
from saemill.common.stores.site_records import known_settings
from saemill.common.stores.statistics import warnings
from saemill.common.world import World, speak_for
from saemill.embeddings.config import ImportConfig
from saemill.embeddings.outlook import Tally, outlook_of
from saemill.embeddings.rows import Conversion, Rows, Source
from saemill.embeddings.sources import Where, open_source, open_table
from saemill.embeddings.store import Plan, check_folder, describe, fill, make_passages, open_store
from saemill.embeddings.tables import Table
from saemill.embeddings.texts import join


def run(config: ImportConfig) -> ActivationStore:
    """Write embeddings to `config.out`, as activations are cached.

    Every row is read and checked before the first is written. A store that is there is finished or
    mended; nothing else of it is touched.

    Raises:
        ConfigError: settings that do not fit the source, or a store made of another.
        DataError: a source that cannot be read, or rows that cannot be used, named by their number.
        StoreError: the output holds other files.
        Interrupted: a signal came; the same call goes on.
    """
    place, source, table, plan, width = _prepared(config)
    with (
        stop_on_signal() as stop,
        naming(place.folder, place.name),
        Worker(place, stop) as worker,
        worker.hold("store") as claim,
    ):
        checking = _Checking(config, source, table, plan.conversion, worker.partial(), worker.check_stop)
        passages = make_passages(plan, worker, checking.write)
        store, writer = open_store(plan, passages, width, worker)
        batches = partial(_limited, source, max_rows=config.max_rows)
        what = fill(store, writer, plan.conversion, batches, worker, claim)
    say(f"{place.name}: {plan.site} complete, {describe(passages)}; {what}")
    array = store.site(plan.site)
    for warning in warnings(plan.site, array.statistics, array.dtype, store.text.unit):
        say(warning)
    return store


def outlook(config: ImportConfig) -> Outlook:
    """Check every row as `run` does, and work out what it would write; nothing is written.

    Raises:
        ConfigError, DataError, StoreError: as `run`.
    """
    place, source, table, plan, width = _prepared(config)
    tally = Tally()
    with naming(place.folder, place.name), TemporaryDirectory() as scratch:
        check_folder(plan, known_settings(plan.out))
        _Checking(config, source, table, plan.conversion, Path(scratch) / "texts").write(tally)
        return outlook_of("import-activations", plan, place, tally, width)


def _prepared(config: ImportConfig) -> tuple[Place, Source, Table | None, Plan, int]:
    """Open the source and plan the store. Returns also the width of its vectors."""
    speak_for(World.here())
    place = place_of(config.out)
    settings.check_folder(place.folder)
    source, table = _open(config)
    first = next(source.batches(0), None)
    if first is None:
        raise DataError(f"{config.source} holds no passages")
    conversion = Conversion(_stored_type(config, first), config.normalize)
    return place, source, table, _plan(config, place.folder, source, table, conversion), first.x_TD.shape[1]


def _open(config: ImportConfig) -> tuple[Source, Table | None]:
    where = Where(
        name=config.source,
        column=config.column,
        id_column=config.id_column,
        text_column=None if config.texts else config.text_column,
        source_column=config.source_column,
        width=config.width,
        raw_dtype=config.raw_dtype,
        subset=config.subset,
        split=config.split,
        revision=config.revision,
    )
    return open_source(where), open_table(config.texts) if config.texts else None


def _stored_type(config: ImportConfig, first: Rows) -> StoredType:
    names: dict[torch.dtype, StoredType] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    as_they_come = "fp32" if config.normalize else names.get(first.x_TD.dtype, "fp32")
    return config.dtype or as_they_come


def _plan(
    config: ImportConfig, folder: Path, source: Source, table: Table | None, conversion: Conversion
) -> Plan:
    texts = None if table is None else table.fingerprint()
    return Plan(
        out=folder,
        site=config.site or source.site,
        source={"name": config.source, "fingerprint": source.fingerprint()},
        settings=config.identity()
        | {"column": source.site, "site": config.site or source.site, "texts_fingerprint": texts},
        held_out_fraction=config.held_out_fraction,
        shard_rows=config.shard_rows,
        compression=config.compression,
        conversion=conversion,
        made_by={"model": None, "revision": None, "model_fingerprint": None},
    )


@dataclass(frozen=True, slots=True)
class _Checking:
    """A first pass over the source: every row is checked, and its id and text go to the passages."""

    config: ImportConfig
    source: Source
    table: Table | None
    conversion: Conversion
    scratch: Path
    """File that texts are looked up in meanwhile."""
    heed: Callable[[], None] = lambda: None
    """Called after each batch: it heeds signals."""

    def write(self, writer: PassageWriter | Tally) -> str:
        """Write a passage per row. Return what the held-out ones are chosen by."""
        config, hashed = self.config, "vectors"
        longer = config.max_rows is not None
        texts = join(self.source, self.table, config.id_column, config.text_column, self.scratch, longer)
        with progress("check", config.max_rows, "passages") as advance:
            for rows in _limited(self.source, 0, config.max_rows):
                self.heed()
                self.conversion.of(rows)
                ids, row_texts = texts.of(rows)
                hashed = "texts" if row_texts else "ids" if ids else "vectors"
                writer.add(ids, row_texts, _bytes(row_texts or ids or rows.x_TD), rows.sources)
                advance(len(rows.x_TD))
        texts.finish()
        self.scratch.unlink(missing_ok=True)
        return hashed


def _bytes(values: list[str] | Tensor) -> list[bytes]:
    """Return the bytes that distinguish a row from others."""
    if isinstance(values, Tensor):
        return [row.tobytes() for row in values.contiguous().view(torch.uint8).numpy()]
    return [value.encode() for value in values]


def _limited(source: Source, start: int, max_rows: int | None) -> Iterator[Rows]:
    """Read the source's rows from `start` on, up to `max_rows` of the whole."""
    for rows in source.batches(start):
        n_left = len(rows.x_TD) if max_rows is None else max_rows - rows.start
        if n_left < len(rows.x_TD):
            rows = Rows(
                rows.start,
                rows.x_TD[:n_left],
                rows.ids and rows.ids[:n_left],
                rows.texts and rows.texts[:n_left],
                rows.sources and rows.sources[:n_left],
            )
        if len(rows.x_TD):
            yield rows
        if max_rows is not None and n_left <= len(rows.x_TD):
            return

"""`saemill embed`: texts through an encoder of sentence-transformers into an ActivationStore."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import xxhash

from saemill.cache.claims.worker import Worker
from saemill.cache.placing import Place, place_of
from saemill.common import config as settings
from saemill.common.addresses import naming
from saemill.common.errors import ConfigError
from saemill.common.hub import loading
from saemill.common.log import progress, say
from saemill.common.outlook import Outlook
from saemill.common.signals import stop_on_signal
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.forms.form import FLOATS
from saemill.common.stores.passages import PassageStore, PassageWriter
from saemill.common.stores.shards import as_numpy
from saemill.common.stores.site_records import known_settings
from saemill.common.stores.statistics import warnings
from saemill.common.world import World, speak_for
from saemill.embeddings.config import EmbedConfig
from saemill.embeddings.outlook import Tally, outlook_of
from saemill.embeddings.rows import Conversion, Rows
from saemill.embeddings.sources import Where, open_hub
from saemill.embeddings.store import Plan, check_folder, describe, fill, make_passages, open_store
from saemill.embeddings.tables import Table, choose_column, strings

GROUP_BATCHES = 8
"""Batches that the encoder gets at once; it sorts their texts by length, to pad less."""


def run(config: EmbedConfig) -> ActivationStore:
    """Embed texts into `config.out`; the texts are stored there too.

    Raises:
        ConfigError: sentence-transformers is not installed, or settings that fit neither the texts nor
            the model.
        DataError: texts that cannot be read, or a model that computes NaN.
        StoreError: the output holds other files.
        Interrupted: a signal came; the same call goes on.
    """
    place, model, table, columns, plan = _prepared(config)
    with (
        stop_on_signal() as stop,
        naming(place.folder, place.name),
        Worker(place, stop) as worker,
        worker.hold("store") as claim,
    ):
        passages = make_passages(
            plan, worker, lambda writer: _copy(table, columns, config.max_rows, writer, worker.check_stop)
        )
        store, writer = open_store(plan, passages, _width(model), worker)
        encoder = _Encoder(model, passages, store.shard_tokens, config.batch_size, config.prompt)
        what = fill(store, writer, plan.conversion, encoder.batches, worker, claim)
    say(f"{place.name}: {plan.site} complete, {describe(passages)}; {what}")
    array = store.site(plan.site)
    for warning in warnings(plan.site, array.statistics, array.dtype, store.text.unit):
        say(warning)
    return store


def outlook(config: EmbedConfig) -> Outlook:
    """Load the model and read all texts as `run` does, and work out what it would write; nothing is written.

    Raises:
        ConfigError, DataError, StoreError: as `run`.
    """
    place, model, table, columns, plan = _prepared(config)
    tally = Tally()
    with naming(place.folder, place.name):
        check_folder(plan, known_settings(plan.out))
        _copy(table, columns, config.max_rows, tally)
        return outlook_of("embed", plan, place, tally, _width(model))


def _prepared(config: EmbedConfig) -> tuple[Place, Any, Table, list[str | None], Plan]:
    """Load the model, open the texts, choose their columns and plan the store."""
    world = World.here()
    speak_for(world)
    place = place_of(config.out)
    settings.check_folder(place.folder)
    model = _load(config, world.device(config.device))
    table = open_hub(
        Where(name=config.dataset, subset=config.subset, split=config.split, revision=config.revision)
    )
    chosen = {"text": config.text_column, "id": config.id_column}
    columns = [choose_column(table, what, column) for what, column in chosen.items()]
    columns.append(config.source_column and choose_column(table, "source", config.source_column))
    return place, model, table, columns, _plan(config, place.folder, table, _fingerprint(model))


def _width(model: Any) -> int:
    """Measure the width of the model's vectors."""
    return int(model.encode(["a"], show_progress_bar=False).shape[1])


def _plan(config: EmbedConfig, folder: Path, table: Table, fingerprint: str) -> Plan:
    """Plan the store's content.

    Args:
        config: of the command.
        folder: of the store.
        table: of the texts.
        fingerprint: of the model.
    """
    return Plan(
        out=folder,
        site=config.site,
        source={"name": config.dataset, "fingerprint": table.fingerprint()},
        settings=config.identity() | {"model_fingerprint": fingerprint},
        held_out_fraction=config.held_out_fraction,
        shard_rows=config.shard_rows,
        compression=config.compression,
        conversion=Conversion(config.dtype, config.normalize),
        made_by={
            "model": config.model,
            "revision": config.model_revision,
            "model_fingerprint": fingerprint,
        },
    )


def _load(config: EmbedConfig, device: torch.device) -> Any:
    try:
        import sentence_transformers
    except ImportError:
        raise ConfigError(
            "`saemill embed` needs sentence-transformers: pip install 'saemill[embed]'. Embeddings that were "
            "computed elsewhere are taken over by `saemill import-activations`"
        ) from None
    with loading("model", config.model):
        return sentence_transformers.SentenceTransformer(
            config.model,
            device=str(device),
            revision=config.model_revision,
            model_kwargs={"dtype": FLOATS[config.model_dtype]},
        )


def _fingerprint(model: Any) -> str:
    """Hash the weights, and the version of the library, whose pooling is a part of the model."""
    digest = xxhash.xxh3_64(version("sentence-transformers").encode())
    for name, values in model.state_dict().items():
        digest.update(name.encode())
        digest.update(as_numpy(values.cpu().contiguous()).tobytes())
    return digest.hexdigest()


def _copy(
    table: Table,
    columns: list[str | None],
    max_rows: int | None,
    writer: PassageWriter | Tally,
    heed: Callable[[], None] = lambda: None,
) -> str:
    """Add all texts to the passages. Return what the held-out ones are chosen by."""
    text_column, id_column, source_column = columns
    assert text_column is not None
    start = 0
    with progress("read", max_rows, "texts") as advance:
        for batch in table.read([name for name in columns if name is not None], 0):
            heed()
            rows = batch if max_rows is None else batch.slice(0, max_rows - start)
            texts = strings(rows[text_column], text_column, start)
            ids = None if id_column is None else strings(rows[id_column], id_column, start)
            sources = None if source_column is None else strings(rows[source_column], source_column, start)
            writer.add(ids, texts, [text.encode() for text in texts], sources)
            start += len(rows)
            advance(len(rows))
            if start == max_rows:
                break
    return "texts"


@dataclass(frozen=True, slots=True)
class _Encoder:
    """An encoder of passages: texts to vectors, by the model."""

    model: Any
    passages: PassageStore
    shard_rows: int
    batch_size: int
    prompt: str | None

    def batches(self, start: int) -> Iterator[Rows]:
        """Compute the rows from `start` on, the first row of a shard. Groups begin at each shard's first row,
        so that a shard's bytes do not depend on which shards were computed before it."""
        n_at_once = GROUP_BATCHES * self.batch_size
        for shard in range(start, self.passages.n_rows, self.shard_rows):
            end = min(shard + self.shard_rows, self.passages.n_rows)
            for first in range(shard, end, n_at_once):
                yield Rows(first, self._encode(first, min(first + n_at_once, end)))

    def _encode(self, start: int, stop: int) -> torch.Tensor:
        vectors: torch.Tensor = self.model.encode(
            self.passages.texts(start, stop),
            batch_size=self.batch_size,
            prompt=self.prompt,
            convert_to_tensor=True,
            show_progress_bar=False,
        )
        return vectors.cpu()

"""`saemill tokenize`: open the source, tokenize, pack, and write a TokenStore."""

import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import torch
import xxhash
from numpy.typing import NDArray

from saemill.common import config as settings
from saemill.common import durable
from saemill.common.errors import ConfigError, DataError
from saemill.common.log import counted, progress, say
from saemill.common.permutation import combine
from saemill.common.shards import ShardedArray
from saemill.common.tokenizer import check_ctx_len, load_tokenizer
from saemill.common.tokens import TokenizerInfo, TokenStore, cut_documents, write_token_store
from saemill.tokenize.packing import RowPacker, check_ids, unframed
from saemill.tokenize.source import Batch, Source, check_path, fingerprint_local, open_source

SHARD_TOKENS = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeConfig:
    """Settings of the stage."""

    dataset: str
    """Hub id, or local file or folder (parquet, jsonl(.gz), csv, arrow, txt, `save_to_disk`)."""
    tokenizer: str
    """Hub id or local folder of the tokenizer."""
    out: Path
    """Folder to write."""
    subset: str | None = None
    """The hub dataset's configuration."""
    split: str = "train"
    text_column: str = "text"
    ctx_len: int = 512
    """Tokens per row."""
    max_tokens: int | None = None
    """Stop after this many tokens (whole rows: rounded down to a multiple of ctx_len)."""
    streaming: bool = False
    """Read as a stream: nothing is downloaded beyond what `max_tokens` needs."""
    shuffle_seed: int | None = 42
    """Seed of the documents' order; none keeps the source's order."""
    held_out_fraction: float = 0.05
    """Share of documents, chosen by a hash of their text, that training never sees."""
    num_proc: int = 1
    """Processes that tokenize."""
    revision: str | None = None
    """The hub dataset's revision."""
    tokenizer_revision: str | None = None

    def __post_init__(self) -> None:
        for name in ("ctx_len", "num_proc"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not 0 <= self.held_out_fraction < 1:
            raise ConfigError(f"held_out_fraction must be in [0, 1), got {self.held_out_fraction}")
        settings.at_least(self, 0, "shuffle_seed")
        if self.max_tokens is not None and self.max_tokens < self.ctx_len:
            raise ConfigError(f"max_tokens must be at least one row of {self.ctx_len}, got {self.max_tokens}")

    def identity(self) -> dict[str, Any]:
        """The settings that decide the store's content."""
        return {k: v for k, v in settings.plain(self).items() if k not in ("out", "num_proc")}


def run(config: TokenizeConfig) -> TokenStore:
    """Tokenize a dataset into `config.out`; a finished store with the same settings is returned.

    The store appears whole: it is written beside its place and renamed at the end. Of several processes
    that are to make the same store one does; the others wait for it.

    Raises:
        ConfigError: settings that do not fit the data, or an output made with others.
        DataError: no text, or ids that the tokenizer does not have.
    """
    if store := _finished(config):
        say(f"{config.out} is finished already: {store.n_tokens:,} tokens in {store.n_rows:,} rows")
        return store
    check_path(config.dataset)
    tokenizer, info = load_tokenizer(config.tokenizer, config.tokenizer_revision)
    check_ctx_len(config.ctx_len, tokenizer, info)
    source = open_source(
        config.dataset,
        subset=config.subset,
        split=config.split,
        text_column=config.text_column,
        streaming=config.streaming,
        revision=config.revision,
    )
    beside = config.out.with_name(config.out.name + ".partial")
    with durable.exclusive(beside, wait=True) as alone:
        if not _finished(config):  # by the process that was here
            # Where folders cannot be locked every process has one of its own, and the first to end wins.
            partial = beside if alone else beside.with_name(f"{beside.name}-{uuid4().hex}")
            _write(config, partial, tokenizer, info, source)
            _publish(config, partial)
        with suppress(OSError):
            beside.rmdir()
    store = TokenStore(config.out)
    say(_summary(store))
    return store


def _write(
    config: TokenizeConfig, partial: Path, tokenizer: Any, info: TokenizerInfo, source: Source
) -> None:
    """Tokenize and pack the source into a folder that no other process writes to."""
    if partial.exists():
        for left in partial.iterdir():  # by a process that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    writer = _Writer(partial, config, info)
    with progress("tokenize", config.max_tokens, "tokens") as advance:
        for batch in _tokenized(config, tokenizer, source.batches(config.shuffle_seed)):
            before = writer.n_rows
            done = writer.add(batch)
            advance((writer.n_rows - before) * config.ctx_len)
            if done:
                break
    tokenizer.save_pretrained(partial / "tokenizer")
    writer.finish({"name": config.dataset, "fingerprint": source.fingerprint, "column": source.column})


def _publish(config: TokenizeConfig, partial: Path) -> None:
    """Give the written store its place, unless another process did meanwhile."""
    try:
        partial.replace(config.out)
    except OSError:
        if not _finished(config):
            raise
        shutil.rmtree(partial)
    durable.sync_folder(config.out.parent)


def _finished(config: TokenizeConfig) -> TokenStore | None:
    """The store at the output, if there is one made of the same source with the same settings."""
    settings.check_folder(config.out)
    if not config.out.exists() or not any(config.out.iterdir()):
        return None
    store = TokenStore(config.out)
    settings.check_same(store.manifest["settings"], config.identity(), config.out)
    _check_source(config, store)
    return store


def _check_source(config: TokenizeConfig, store: TokenStore) -> None:
    """Refuse a finished store whose local source has changed since; a hub's is fixed by its revision."""
    source = Path(config.dataset)
    if source.exists() and fingerprint_local(source) != store.manifest["source"]["fingerprint"]:
        raise ConfigError(
            f"{source} has changed since {config.out} was made of it; choose another output folder, or "
            "remove that one"
        )


def _summary(store: TokenStore) -> str:
    n_held_out = store.manifest["n_held_out_rows"]
    note = ""
    if store.manifest["settings"]["held_out_fraction"] > 0 and n_held_out == 0:
        note = "\nNo held-out row came about: raise --held-out-fraction, or assess on other tokens."
    return (
        f"{store.path}: {store.n_tokens:,} tokens in {counted(store.n_rows, 'row')} of {store.ctx_len} from "
        f"{counted(store.manifest['n_documents'], 'document')}; {counted(n_held_out, 'row')} held out{note}"
    )


def _tokenized(config: TokenizeConfig, tokenizer: Any, batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches with `input_ids`, in order; by `num_proc` processes with bounded read-ahead."""
    if config.num_proc == 1:
        for batch in batches:
            yield _tokenize_batch(tokenizer, batch)
        return
    arguments = (config.tokenizer, config.tokenizer_revision)
    context = get_context("spawn")
    with ProcessPoolExecutor(config.num_proc, context, _load_in_worker, arguments) as pool:
        waiting: deque[Future[Batch]] = deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(_tokenize_in_worker, batch))
                if len(waiting) > 2 * config.num_proc:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


_worker: dict[str, Any] = {}


def _load_in_worker(name: str, revision: str | None) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker["tokenizer"] = load_tokenizer(name, revision)[0]


def _tokenize_in_worker(batch: Batch) -> Batch:
    return _tokenize_batch(_worker["tokenizer"], batch)


def _tokenize_batch(tokenizer: Any, batch: Batch) -> Batch:
    if batch.texts is None:
        return batch
    encoded = tokenizer(batch.texts, add_special_tokens=False, verbose=False)
    return Batch(batch.source_index, batch.texts, encoded["input_ids"])


@dataclass(slots=True)
class _Writer:
    """Packs train and held-out documents into rows of their own and writes full shards."""

    path: Path
    config: TokenizeConfig
    info: TokenizerInfo
    n_rows: int = 0
    n_empty: int = 0
    rows: list[NDArray[Any]] = field(default_factory=list)
    held_out: list[bool] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    source_index: list[int] = field(default_factory=list)
    document_held_out: list[bool] = field(default_factory=list)
    text_hash: list[int] = field(default_factory=list)
    packers: dict[bool, RowPacker] = field(init=False)
    dtype: torch.dtype = field(init=False)
    shard_rows: int = field(init=False)
    n_written_shards: int = 0

    def __post_init__(self) -> None:
        self.packers = {side: RowPacker(self.config.ctx_len, self.info) for side in (False, True)}
        largest = self.info.vocab_size - 1
        types = (torch.uint8, torch.uint16, torch.uint32)
        self.dtype = next(t for t in types if largest <= torch.iinfo(t).max)
        self.shard_rows = max(1, SHARD_TOKENS // self.config.ctx_len)

    def add(self, batch: Batch) -> bool:
        """Pack a tokenized batch; True when `max_tokens` is reached."""
        assert batch.input_ids is not None
        for i, framed in enumerate(batch.input_ids):
            check_ids(framed, self.info.vocab_size, batch.source_index[i])
            ids = unframed(framed, self.info)
            text = batch.texts[i] if batch.texts is not None else None
            if not ids or (text is not None and not text.strip()):
                self.n_empty += 1
                continue
            content = text.encode() if text is not None else np.asarray(ids, np.uint32).tobytes()
            hashed = xxhash.xxh3_64_intdigest(content)
            held_out = combine(hashed) / 2**64 < self.config.held_out_fraction
            document = len(self.source_index)
            self.source_index.append(batch.source_index[i])
            self.document_held_out.append(held_out)
            self.text_hash.append(hashed)
            for row, segments in self.packers[held_out].add(document, ids):
                self._add_row(row, segments, held_out)
                if self.n_rows == self._max_rows():
                    return True
        return False

    def _max_rows(self) -> int | None:
        limit = self.config.max_tokens
        return None if limit is None else limit // self.config.ctx_len

    def _add_row(self, row: list[int], segments: list[tuple[int, int]], held_out: bool) -> None:
        address = self.n_rows * self.config.ctx_len
        self.starts += [address + position for position, _ in segments]
        self.numbers += [document for _, document in segments]
        self.rows.append(np.array(row, str(self.dtype).removeprefix("torch.")))
        self.held_out.append(held_out)
        self.n_rows += 1
        if len(self.rows) == self.shard_rows:
            self._flush()

    def _flush(self) -> None:
        """Write the buffered rows as a raw chunk file; the array's metadata follows at the end."""
        rows = np.zeros((self.shard_rows, self.config.ctx_len), str(self.dtype).removeprefix("torch."))
        rows[: len(self.rows)] = self.rows
        file = self.path / "tokens" / "c" / str(self.n_written_shards) / "0"
        file.parent.mkdir(parents=True)
        rows.tofile(file)
        self.n_written_shards += 1
        self.rows = []

    def finish(self, source: dict[str, Any]) -> None:
        """Write the rest and the manifest."""
        if self.n_rows == 0:
            n_empty = f" ({self.n_empty} of them empty)" if self.n_empty else ""
            raise DataError(
                f"{self.config.dataset} has too little text for one row of {self.config.ctx_len} "
                f"tokens: {counted(len(self.source_index) + self.n_empty, 'document')}{n_empty}"
            )
        if self.n_written_shards == 0:
            self.shard_rows = self.n_rows
        if self.rows:
            self._flush()
        shape = (self.n_rows, self.config.ctx_len)
        tokens = ShardedArray.create(self.path / "tokens", shape, self.shard_rows, self.dtype, {})
        segments = pa.table({"start": self.starts, "document": self.numbers})
        documents = pa.table(
            {
                "source_index": self.source_index,
                "held_out": self.document_held_out,
                "text_hash": pa.array(self.text_hash, pa.uint64()),
            }
        )
        write_token_store(
            self.path,
            tokens=tokens,
            held_out_R=np.array(self.held_out),
            segments=segments,
            documents=cut_documents(documents, segments, self.n_rows * self.config.ctx_len),
            tokenizer=self.info,
            extra={
                "n_empty_documents": self.n_empty,
                "source": source,
                "settings": self.config.identity(),
                "versions": {name: version(name) for name in ("saemill", "tokenizers", "datasets")},
            },
        )

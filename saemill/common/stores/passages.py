"""PassageStore: what each row of an embedding store is, in place of tokens: a text, an id, a side.

A passage is one embedded thing; its address is its row. Layout of the folder:

    passages.parquet   id, text (either may be null), text_hash, held_out, of several sources also source, a
                       number; a row group per 1,024 passages
    manifest.json      written last: size and hash, source, settings
"""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from saemill.common import durable, records
from saemill.common.errors import ConfigError, DataError, MissingError, StoreError
from saemill.common.records import Count, Positive, Record
from saemill.common.stores.columns import read_table
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.permutation import combine
from saemill.common.stores.tokens import Settings, Source

FORMAT: Final = "saemill passages 2"
FILE = "passages.parquet"
REPAIR = "Run the command that made the store (`saemill import-activations`, `saemill embed`) again."
GROUP_ROWS = 1024
"""Passages per row group of the file: as many are read to show one of them."""
NO_MASK = MaskConfig(special_tokens=False, first_positions=0)
"""Mask of passages, which have neither positions nor tokens that could be left out."""
SCHEMA = pa.schema(
    [("id", pa.string()), ("text", pa.string()), ("text_hash", pa.uint64()), ("held_out", pa.bool_())]
)

WITH_SOURCES = SCHEMA.append(pa.field("source", pa.uint16()))
"""The same of passages with sources, each with the number of its own."""
MOST_SOURCES = 1 << 16


class PassageSettings(Settings):
    """The user's settings that decided the passages and vectors."""

    normalize: bool
    """Whether each vector was divided by its length."""


class PassageManifest(Record):
    """`manifest.json` of the passages: what they are, and the hash of their file."""

    format: Literal["saemill passages 2"] = FORMAT
    n_rows: Positive
    n_held_out_rows: Count
    hashed: Literal["texts", "ids", "vectors"]
    """Basis of the hash that chose the held-out passages."""
    source: Source
    sources: tuple[str, ...] = ()
    """Names of the passages' sources, where they are known; their column `source` numbers them."""
    settings: PassageSettings
    versions: dict[str, str]
    files: tuple[records.File, ...]
    """List with `passages.parquet` alone."""
    fingerprint: str


class PassageStore:
    """Read access to the passages of an embedding store. It answers what a `TokenStore` answers, a
    passage being a row of one token.

    Args:
        path: the folder.
        repair: the sentence on what to do about damage.

    Raises:
        StoreError: the folder is missing, unfinished or damaged (the hash of the passages' file is compared
            when it is first read).
    """

    ctx_len = 1
    unit, row, document = "passage", "passage", "distinct passage"
    """Words of messages for an address, a row, and a text of its own."""

    def __init__(self, path: Path | str, repair: str = REPAIR) -> None:
        self.path, self.repair = Path(path), repair
        try:
            self.manifest = records.read(self.path / "manifest.json", PassageManifest, repair)
        except MissingError:
            raise MissingError(f"{self.path} is unfinished: manifest.json is missing. {repair}") from None
        if [file.path for file in self.manifest.files] != [FILE]:
            raise StoreError(f"{self.path}/manifest.json is damaged: it must list {FILE} alone. {repair}")
        if bad := self.problems(hashes=False):
            raise StoreError("\n".join([*bad, repair]))
        self.n_rows = self.n_tokens = self.manifest.n_rows
        self.fingerprint = self.manifest.fingerprint
        self._group = lru_cache(16)(self._read_group)

    @property
    def content(self) -> dict[str, str]:
        """Hash of the file that says which passages there are, and which are held out."""
        return {file.path: file.xxh3 for file in self.manifest.files}

    @cached_property
    def _file(self) -> Path:
        """Path of the passages' file, after its hash was compared."""
        if bad := self.problems(hashes=True):
            raise StoreError(f"{bad[0]}. {self.repair}")
        return self.path / FILE

    @cached_property
    def _sides(self) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
        table = read_table(self._file, SCHEMA, self.repair, ["text_hash", "held_out"])
        n_held_out = int(np.count_nonzero(table["held_out"].to_numpy()))
        if (len(table), n_held_out) != (self.n_rows, self.manifest.n_held_out_rows):
            raise StoreError(
                f"{self._file} holds {len(table):,} passages, {n_held_out:,} of them held out; its manifest "
                f"tells of {self.n_rows:,} and {self.manifest.n_held_out_rows:,}. {self.repair}"
            )
        return table["text_hash"].to_numpy(), table["held_out"].to_numpy()

    @property
    def held_out_R(self) -> NDArray[np.bool_]:
        """Passages that training never sees, bool [n_rows]."""
        return self._sides[1]

    @cached_property
    def _distinct(self) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
        """Distinct texts: hash, first passage with it; and the text of each passage."""
        hashes, first, document = np.unique(self._sides[0], return_index=True, return_inverse=True)
        return hashes, first, document

    @cached_property
    def documents(self) -> pa.Table:
        """Table with one line per distinct text: text_hash, start (its first passage), held_out, and of
        passages with sources the source of the first."""
        hashes, first, _ = self._distinct
        columns = {"text_hash": hashes, "start": first, "held_out": self.held_out_R[first]}
        if self.manifest.sources:
            columns["source"] = self._sources[first]
        return pa.table(columns)

    @cached_property
    def _sources(self) -> NDArray[np.uint16]:
        """Number of each passage's source, uint16 [n_rows]."""
        table = read_table(self._file, WITH_SOURCES, self.repair, ["source"])
        numbers: NDArray[np.uint16] = table["source"].to_numpy()
        if len(numbers) and numbers.max() >= len(self.manifest.sources):
            raise StoreError(
                f"{self._file} names source {numbers.max()}, of {len(self.manifest.sources)}. {self.repair}"
            )
        return numbers

    def document_of(self, addresses: NDArray[np.int64]) -> NDArray[np.int64]:
        """Look up the text (line of `documents`) of each passage; copies share one. Same shape, int64."""
        return self._distinct[2][addresses]

    def keep(self, start: int, stop: int, mask: MaskConfig) -> NDArray[np.bool_]:
        """Choose the positions of some rows that count: all. bool [stop - start, 1].

        Raises:
            ConfigError: a mask that leaves out positions or tokens, which passages do not have.
        """
        if mask != NO_MASK:
            raise ConfigError("passages have no positions, tokens or roles that a mask could leave out")
        return np.ones((stop - start, 1), bool)

    def texts(self, start: int, stop: int) -> list[str | None]:
        """Read the texts of passages start..stop."""
        return [self.passage(address)[1] for address in range(start, stop)]

    def passage(self, address: int) -> tuple[str | None, str | None]:
        """Read id and text of a passage; None where there is none."""
        group, row = divmod(address, GROUP_ROWS)
        ids, texts = self._group(group)
        return ids[row].as_py(), texts[row].as_py()

    def _read_group(self, group: int) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
        table = read_table(self._file, SCHEMA, self.repair, ["id", "text"], group)
        return table["id"], table["text"]

    def provenance(self, _mask: MaskConfig) -> dict[str, Any]:
        """Collect what an SAE records of its training data; nothing is masked."""
        return {
            "dataset": self.manifest.source.name,
            "normalized": self.manifest.settings.normalize,
        }

    @property
    def how_held_out(self) -> str:
        """Sentence on how the held-out passages were chosen."""
        fraction, by = self.manifest.settings.held_out_fraction, self.manifest.hashed
        return f"those held out when the store was made ({fraction:.0%}, chosen by a hash of their {by})"

    hint_to_hold_out = "make the store with --held-out-fraction above 0"

    def problems(self, hashes: bool) -> list[str]:
        """List each file that is missing, of the wrong size or, with `hashes`, of other content."""
        return records.problems(self.path, self.manifest.files, hashes)


class PassageWriter:
    """A writer of a store's passages, one batch after the other, in whole row groups.

    Args:
        path: a new folder.
        held_out_fraction: share of the passages that is held out.
        with_sources: whether each passage has a source.
    """

    def __init__(self, path: Path, held_out_fraction: float, with_sources: bool = False) -> None:
        self.path, self.fraction = path, held_out_fraction
        self._schema = WITH_SOURCES if with_sources else SCHEMA
        self._sources: dict[str, int] = {}
        """Name of each source → its number, as they come."""
        self.n_rows = self.n_held_out = 0
        path.mkdir(parents=True)
        self._file = pq.ParquetWriter(path / FILE, self._schema, compression="zstd")
        self._waiting: list[pa.Table] = []
        self._n_waiting = 0

    def add(
        self,
        ids: Sequence[str] | None,
        texts: Sequence[str] | None,
        hashed: Sequence[bytes],
        sources: Sequence[str] | None = None,
    ) -> None:
        """Add some passages.

        Args:
            ids: what they are called, if they are.
            texts: their texts, if they are known.
            hashed: bytes that distinguish one from another; equal ones come on the same side.
            sources: their sources, if they have any.

        Raises:
            DataError: there are too many sources.
        """
        hashes = [xxhash.xxh3_64_intdigest(value) for value in hashed]
        held_out = [combine(value) / 2**64 < self.fraction for value in hashes]
        n = len(hashes)
        columns: list[Sequence[Any]] = [ids or [None] * n, texts or [None] * n, hashes, held_out]
        if sources is not None:
            columns.append([self._sources.setdefault(name, len(self._sources)) for name in sources])
            if len(self._sources) > MOST_SOURCES:
                raise DataError(f"more than {MOST_SOURCES:,} sources; name a column with fewer")
        arrays = [pa.array(c, field.type) for c, field in zip(columns, self._schema, strict=True)]
        self._waiting.append(pa.table(arrays, schema=self._schema))
        self._n_waiting += n
        self.n_rows += n
        self.n_held_out += sum(held_out)
        if self._n_waiting >= GROUP_ROWS:
            self._write(self._n_waiting // GROUP_ROWS * GROUP_ROWS)

    def _write(self, n_rows: int) -> None:
        table = pa.concat_tables(self._waiting)
        self._file.write_table(table[:n_rows], row_group_size=GROUP_ROWS)
        self._waiting, self._n_waiting = [table[n_rows:]], len(table) - n_rows

    def finish(self, extra: dict[str, Any]) -> None:
        """Write the rest and the manifest.

        Args:
            extra: further entries of the manifest: source, settings, hashed (what the sides follow from).
        """
        if self._n_waiting:
            self._write(self._n_waiting)
        self._file.close()
        files = records.listed(self.path)
        manifest = PassageManifest(
            n_rows=self.n_rows,
            n_held_out_rows=self.n_held_out,
            sources=tuple(self._sources),
            versions={name: version(name) for name in ("saemill", "pyarrow")},
            files=files,
            fingerprint=durable.hash_json([FORMAT, [file.model_dump() for file in files]]),
            **extra,
        )
        records.write(self.path / "manifest.json", manifest)

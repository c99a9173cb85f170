"""Documents out of any dataset: a hub id, local files or folders, or already tokenized columns."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from saemill.common import durable
from saemill.common.config import nearest
from saemill.common.errors import ConfigError, DataError
from saemill.common.permutation import permutation

READERS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
    ".txt": "text",
}
SHUFFLE_BUFFER_DOCUMENTS = 10_000
BATCH_DOCUMENTS = 512
INDEX = "__source_index__"


@dataclass(frozen=True, slots=True)
class Batch:
    """Some documents: their numbers in the source, and their texts or their token ids."""

    source_index: list[int]
    texts: list[str] | None
    input_ids: list[list[int]] | None


@dataclass(frozen=True, slots=True)
class Source:
    """An opened dataset."""

    dataset: Any
    column: str
    fingerprint: str
    streaming: bool

    def batches(self, shuffle_seed: int | None) -> Iterator[Batch]:
        """All documents, in the order of the keyed shuffle (none: in the source's order).

        A stream is shuffled within a buffer of 10,000 documents by `datasets`.
        """
        documents = self._shuffled(shuffle_seed)
        while items := list(islice(documents, BATCH_DOCUMENTS)):
            index = [number for number, _ in items]
            values = [value for _, value in items]
            if self.column == "input_ids":
                yield Batch(index, None, values)
            else:
                yield Batch(index, ["" if value is None else str(value) for value in values], None)

    def _shuffled(self, seed: int | None) -> Iterator[tuple[int, Any]]:
        if self.streaming:
            stream = self.dataset.map(lambda _, i: {INDEX: i}, with_indices=True)
            if seed is not None:
                stream = stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER_DOCUMENTS)
            for example in stream:
                yield example[INDEX], self._document(example)
            return
        n = len(self.dataset)
        order = np.arange(n) if seed is None else permutation(n, seed)
        for first in range(0, n, BATCH_DOCUMENTS):
            numbers = order[first : first + BATCH_DOCUMENTS]
            for number, example in zip(numbers, self.dataset.select(numbers), strict=True):
                yield int(number), self._document(example)

    def _document(self, example: dict[str, Any]) -> Any:
        value = example[self.column]
        if self.column == "input_ids" and example.get("attention_mask") is not None:
            return [token for token, real in zip(value, example["attention_mask"], strict=True) if real]
        return value


def open_source(
    name: str,
    *,
    subset: str | None,
    split: str,
    text_column: str,
    streaming: bool,
    revision: str | None,
) -> Source:
    """Open a dataset and choose the column that holds the documents.

    Args:
        name: hub id, or a local file or folder (parquet, jsonl, csv, arrow, txt, or a
            `save_to_disk` folder).
        text_column: the column of texts; where it is absent but `input_ids` is present, the
            dataset is taken as tokenized already.

    Raises:
        ConfigError: no such file, kind, split or column.
        DataError: the dataset is empty.
    """
    path = Path(name)
    if path.exists():
        if revision:
            raise ConfigError(f"--revision has no effect on the local path {name}; leave it out")
        dataset = _open_local(path, subset, split, streaming)
        fingerprint = _fingerprint_local(path)
    elif name.startswith((".", "/", "~")) or path.suffix in READERS:
        raise ConfigError(f"no file or folder {name}")
    else:
        dataset = datasets.load_dataset(name, subset, split=split, streaming=streaming, revision=revision)
        fingerprint = durable.hash_json([name, subset, split, revision, str(dataset.info.version)])
    column = _choose_column(dataset, text_column, name)
    if not streaming and len(dataset) == 0:
        raise DataError(f"{name} has no rows")
    fingerprint = durable.hash_json([fingerprint, subset, split, column])
    return Source(dataset, column, fingerprint, streaming)


def _open_local(path: Path, subset: str | None, split: str, streaming: bool) -> Any:
    if path.is_dir() and any((path / n).exists() for n in ("state.json", "dataset_dict.json")):
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise ConfigError(f"{path} has no split {split!r}; {nearest(split, saved)}")
            saved = saved[split]
        return saved.to_iterable_dataset() if streaming else saved
    reader = _reader_of(path)
    options: dict[str, Any] = {"sample_by": "paragraph"} if reader == "text" else {}
    if any(file.suffix == ".tsv" for file in _data_files(path)):
        options["sep"] = "\t"
    try:
        if path.is_dir():
            return datasets.load_dataset(str(path), subset, split=split, streaming=streaming, **options)
        if subset or split != "train":
            raise ConfigError(f"the file {path} has neither subsets nor splits; leave the flags out")
        return datasets.load_dataset(
            reader, data_files=str(path), split="train", streaming=streaming, **options
        )
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"cannot open {path}: {error}") from error


def _data_files(path: Path) -> list[Path]:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sorted(file for file in files if _suffix(file) in READERS)


def _suffix(file: Path) -> str:
    """The last suffix that is not a compression's."""
    suffixes = [s.lower() for s in file.suffixes if s.lower() not in (".gz", ".zst", ".bz2", ".xz")]
    return suffixes[-1] if suffixes else ""


def _reader_of(path: Path) -> str:
    kinds = {READERS[_suffix(file)] for file in _data_files(path)}
    if len(kinds) != 1:
        found = f"several kinds ({', '.join(sorted(kinds))})" if kinds else "none of them"
        raise ConfigError(f"{path} must hold files of one kind out of {', '.join(READERS)}; found {found}")
    return kinds.pop()


def _fingerprint_local(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    files = _data_files(path) or [file for file in path.rglob("*") if file.is_file()]
    return durable.hash_folder(folder, files)


def _choose_column(dataset: Any, text_column: str, name: str) -> str:
    columns = dataset.column_names
    if columns is None:
        first = next(iter(dataset), None)
        if first is None:
            raise DataError(f"{name} has no rows")
        columns = list(first)
    if text_column in columns:
        return text_column
    if "input_ids" in columns:
        return "input_ids"
    raise ConfigError(
        f"{name} has no column {text_column!r}; it has {', '.join(columns)}. Name one with --text-column."
    )

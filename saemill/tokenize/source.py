"""Documents out of any dataset: a hub id, local files or folders, or already tokenized columns."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np

from saemill.common import durable
from saemill.common.config import nearest
from saemill.common.errors import ConfigError, DataError
from saemill.common.permutation import combine, permutation

T = TypeVar("T")
KINDS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".arrow": "arrow",
    ".txt": "text",
}
OPTIONS: dict[str, dict[str, Any]] = {"text": {"sample_by": "paragraph"}, "tsv": {"sep": "\t"}}
SHUFFLE_BUFFER_DOCUMENTS = 10_000
BATCH_DOCUMENTS = 512


@dataclass(frozen=True, slots=True)
class Batch:
    """Some documents: their numbers in the source, and their texts or their token ids."""

    source_index: list[int]
    texts: list[str] | None
    input_ids: list[list[int]] | None


@dataclass(frozen=True, slots=True)
class Source:
    """An opened dataset."""

    name: str
    dataset: Any
    column: str
    fingerprint: str
    streaming: bool

    def batches(self, shuffle_seed: int | None) -> Iterator[Batch]:
        """All documents, in the order of the keyed shuffle (none: in the source's order).

        A stream is shuffled within a buffer of 10,000 documents.
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
            stream = enumerate(map(self._document, _examples(self.dataset, self.name)))
            yield from stream if seed is None else shuffled_stream(stream, seed, SHUFFLE_BUFFER_DOCUMENTS)
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


def _examples(stream: Iterable[Any], name: str) -> Iterator[Any]:
    try:
        yield from stream
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {name}: {error}") from error


def shuffled_stream(items: Iterable[T], seed: int, buffer_items: int) -> Iterator[T]:
    """The items in a keyed order: each new one takes the place in the buffer of one that leaves.

    A stream that fits into the buffer comes in the order of `permutation`. (`datasets` shuffles the
    files of a stream as well, after which a document's number in the source is unknown.)
    """
    items = iter(items)
    buffer = list(islice(items, buffer_items))
    for number, item in enumerate(items):
        place = combine(seed, number) % buffer_items
        yield buffer[place]
        buffer[place] = item
    for place in permutation(len(buffer), seed):
        yield buffer[place]


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
        DataError: the dataset is empty or cannot be read.
    """
    dataset, fingerprint = open_dataset(
        name, subset=subset, split=split, streaming=streaming, revision=revision
    )
    column = _choose_column(dataset, text_column, name)
    if not streaming and len(dataset) == 0:
        raise DataError(f"{name} has no rows")
    return Source(name, dataset, column, fingerprint, streaming)


def open_dataset(
    name: str, *, subset: str | None, split: str, streaming: bool, revision: str | None
) -> tuple[Any, str]:
    """Open a dataset with all its columns.

    Returns: the dataset, as `datasets` has it, and what identifies its content.

    Raises:
        ConfigError: no such file, kind or split.
        DataError: it cannot be read.
    """
    path = Path(name)
    check_path(name)
    if path.exists():
        if revision:
            raise ConfigError(f"--revision has no effect on the local path {name}; leave it out")
        dataset = _open_local(path, subset, split, streaming)
        fingerprint = fingerprint_local(path)
    else:
        dataset = _load(name, name, subset, split=split, streaming=streaming, revision=revision)
        fingerprint = durable.hash_json([name, subset, split, revision, str(dataset.info.version)])
    return dataset, fingerprint


def check_path(name: str) -> None:
    """Refuse the name of a dataset that can only be a path and leads nowhere.

    Raises:
        ConfigError: it does.
    """
    path = Path(name)
    if (name.startswith((".", "/", "~")) or _suffix(path) in KINDS) and not path.exists():
        raise ConfigError(f"no file or folder {name}")


def _load(shown: str, *arguments: Any, **options: Any) -> Any:
    """`datasets.load_dataset`, its failures told with the dataset's name."""
    try:
        return datasets.load_dataset(*arguments, **options)
    except datasets.exceptions.DatasetGenerationError as error:
        raise DataError(f"cannot read {shown}: {error.__cause__ or error}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot open {shown}: {error}") from error
    except StopIteration:
        raise DataError(f"{shown} has no rows") from None


def _open_local(path: Path, subset: str | None, split: str, streaming: bool) -> Any:
    if path.is_dir() and any((path / n).exists() for n in ("state.json", "dataset_dict.json")):
        saved = _load_saved(path, subset, split)
        return saved.to_iterable_dataset() if streaming else saved
    kind = _kind_of(path)
    options = OPTIONS.get(kind, {}) | {"split": split, "streaming": streaming}
    if path.is_dir():
        return _load(str(path), str(path), subset, **options)
    if subset or split != "train":
        raise ConfigError(f"the file {path} has neither subsets nor splits; leave the flags out")
    return _load(str(path), "csv" if kind == "tsv" else kind, data_files=str(path), **options)


def _load_saved(path: Path, subset: str | None, split: str) -> Any:
    """One split of a `save_to_disk` folder; a flag that chooses nothing is refused."""
    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError, LookupError) as error:
        raise ConfigError(f"cannot open {path}: {error}") from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise ConfigError(f"{path} has no split {split!r}; {nearest(split, saved)}")
        saved = saved[split]
    elif split not in ("train", str(saved.split)):
        raise ConfigError(f"{path} has no splits; leave out --split {split}")
    if subset:
        raise ConfigError(f"{path} has no subsets; leave out --subset {subset}")
    return saved


def _data_files(path: Path) -> list[Path]:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sorted(file for file in files if _suffix(file) in KINDS)


def _suffix(file: Path) -> str:
    """The last suffix that is not a compression's."""
    suffixes = [s.lower() for s in file.suffixes if s.lower() not in (".gz", ".zst", ".bz2", ".xz")]
    return suffixes[-1] if suffixes else ""


def _kind_of(path: Path) -> str:
    kinds = {KINDS[_suffix(file)] for file in _data_files(path)}
    if len(kinds) != 1:
        found = f"several kinds ({', '.join(sorted(kinds))})" if kinds else "none of them"
        raise ConfigError(f"{path} must hold files of one kind out of {', '.join(KINDS)}; found {found}")
    return kinds.pop()


def fingerprint_local(path: Path) -> str:
    """A hash of the names and contents of a local dataset's files."""
    folder = path if path.is_dir() else path.parent
    files = _data_files(path) or [file for file in path.rglob("*") if file.is_file()]
    return durable.hash_folder(folder, files)


def _choose_column(dataset: Any, text_column: str, name: str) -> str:
    columns = dataset.column_names
    if columns is None:
        first = next(_examples(dataset, name), None)
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

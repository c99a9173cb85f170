"""Documents out of any dataset: a hub id, local files or folders, or already tokenized columns."""

import atexit
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np

from saemill.common import durable
from saemill.common.config import nearest
from saemill.common.errors import ConfigError, DataError, DiskError, SaemillError
from saemill.common.log import say
from saemill.common.models.chat import Message
from saemill.common.stores.permutation import combine, permutation
from saemill.tokenize.chats import conversation_of
from saemill.tokenize.columns import MASK, Column, choose, text_of
from saemill.tokenize.files import (
    DELIMITERS,
    KINDS,
    check_whole,
    csv_columns,
    data_files,
    fault_of,
    fingerprint_local,
    kind_of,
    suffix_of,
    true_name,
)
from saemill.tokenize.ids import ids_of, masked
from saemill.tokenize.memory import Given
from saemill.tokenize.words import LabelledWords, words_of

T = TypeVar("T")
SHUFFLE_BUFFER_DOCUMENTS = 10_000
BATCH_DOCUMENTS = 512
UNKNOWN = "a stream in memory"
"""In the place of the hash of what is read once."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of documents: texts, conversations or token ids; what they lack is filled in later."""

    origin: str
    """Where they are from, for messages."""
    source_index: list[int]
    """Their numbers in the source."""
    texts: list[str] | None = None
    conversations: list[list[Message]] | None = None
    input_ids: list[list[int]] | None = None
    roles: list[list[str | None]] | None = None
    """Of conversations, the role of the message that each id is of; None of one between messages."""
    special: list[bool] | None = None
    """Of texts and conversations, whether they write a special token out."""
    labels: list[str] | None = None
    """Names of their sources, of a column of these."""
    words: list[LabelledWords] | None = None
    """Of texts whose words are labelled, these."""
    token_words: list[list[int]] | None = None
    """Of these the number of the word that each id is of; -1 of one of none."""

    def where(self, place: int) -> str:
        """Name a document for messages."""
        return f"row {self.source_index[place]} of {self.origin}"


@dataclass(frozen=True, slots=True)
class Source:
    """An opened dataset."""

    name: str
    dataset: Any
    column: Column
    fingerprint: str
    streaming: bool

    def batches(self, shuffle_seed: int | None) -> Iterator[Batch]:
        """Read all documents, in the order of the keyed shuffle (no seed: in the source's order).

        A stream is shuffled within a buffer of 10,000 documents.

        Raises:
            DataError: the dataset cannot be read, or a row holds no document; it is named.
        """
        documents = self._shuffled(shuffle_seed)
        while items := list(islice(documents, BATCH_DOCUMENTS)):
            batch = Batch(self.origin, [number for number, _ in items], labels=self._labels(items))
            name = self.column.name
            if self.column.holds_ids:
                yield replace(batch, input_ids=[self._ids(number, example) for number, example in items])
            elif self.column.holds_chats:
                chats = [conversation_of(example[name], self.where(number)) for number, example in items]
                yield replace(batch, conversations=chats)
            elif self.column.words is not None:
                words = [words_of(example, self.column, self.where(number)) for number, example in items]
                yield replace(batch, texts=[each.text for each in words], words=words)
            else:
                texts = [text_of(example[name], self.where(number)) for number, example in items]
                yield replace(batch, texts=texts)

    def _labels(self, items: list[tuple[int, dict[str, Any]]]) -> list[str] | None:
        """Read the names of the documents' sources, if a column has them."""
        if (column := self.column.source) is None:
            return None
        for number, example in items:
            if not isinstance(example[column], str) or not example[column]:
                raise DataError(
                    f"row {number} of {self.name} names no source in its column {column}, but "
                    f"{example[column]!r:.60}; mend that row, or leave --source-column out"
                )
        return [example[column] for _, example in items]

    def rows_of_ids(self) -> Iterator[tuple[str, list[int]]]:
        """Read each row's place, for messages, and its ids: of a stream the first batch, of a dataset all."""
        rows = self._shuffled(None)
        for number, example in islice(rows, BATCH_DOCUMENTS) if self.streaming else rows:
            yield self.where(number), self._ids(number, example)

    def where(self, number: int) -> str:
        """Name a row for messages."""
        return f"row {number} of {self.origin}"

    @property
    def origin(self) -> str:
        """Dataset and column, for messages."""
        return f"{self.name} (column {self.column.name})"

    def _ids(self, number: int, example: dict[str, Any]) -> list[int]:
        where = self.where(number)
        ids = ids_of(example[self.column.name], where)
        return masked(ids, example[MASK], where) if self.column.masked else ids

    def _shuffled(self, seed: int | None) -> Iterator[tuple[int, dict[str, Any]]]:
        if self.streaming:
            stream = enumerate(_examples(self.dataset, self.name))
            yield from stream if seed is None else shuffled_stream(stream, seed, SHUFFLE_BUFFER_DOCUMENTS)
            return
        n = len(self.dataset)
        order = np.arange(n) if seed is None else permutation(n, seed)
        for first in range(0, n, BATCH_DOCUMENTS):
            numbers = order[first : first + BATCH_DOCUMENTS]
            examples = _examples(self.dataset.select(numbers), self.name)
            for number, example in zip(numbers, examples, strict=True):
                yield int(number), example


def _examples(dataset: Iterable[Any], name: str) -> Iterator[dict[str, Any]]:
    """Read the rows. A library's error on a file that it cannot read is repeated with the file's name."""
    rows = iter(dataset)
    while True:
        with _reading(name):
            example = next(rows, None)
        if example is None:
            return
        yield example


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn an error of the library that reads, while the block runs, into one of ours.

    Decompressors, parsers and Arrow raise errors of many kinds, some of them no more than `Exception`.
    """
    try:
        yield
    except SaemillError:
        raise
    except Exception as error:
        raise _fault(name, error) from error


def _fault(name: str, error: Exception) -> SaemillError:
    """Name the file that is at fault and why; where it is not known, repeat what the library said."""
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        assert isinstance(error.__cause__, Exception)
        return _fault(name, error.__cause__)
    if isinstance(error, OSError) and (disk := durable.explained(error)):
        return DiskError(disk)
    if "Dataset scripts are no longer supported" in str(error) or "trust_remote_code" in str(error):
        return ConfigError(
            f"cannot open {name}: it is a program of its own, which saemill does not run; save it as parquet "
            "or jsonl where you trust it, and name those files"
        )
    for file in data_files(Path(name)) if Path(name).exists() else []:
        if fault := fault_of(file):
            return DataError(f"cannot read {file}: {fault}")
    if isinstance(error, StopIteration):
        return DataError(f"{name} has no rows")
    return DataError(f"cannot read {name}: {error or type(error).__name__}")


def shuffled_stream(items: Iterable[T], seed: int, buffer_items: int) -> Iterator[T]:
    """Yield the items in a keyed order: each new one takes the place in the buffer of one that leaves.

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
    chat_column: str | None = None,
    source_column: str | None = None,
    words_column: str | None = None,
    word_labels: tuple[str, ...] = (),
    given: Given | None = None,
) -> Source:
    """Open a dataset and choose the column that holds the documents.

    Args:
        name: hub id, or a local file or folder (parquet, jsonl, csv, arrow, txt, or a
            `save_to_disk` folder).
        text_column: the column of texts; where it is absent but `input_ids` or `tokens` is present, the
            dataset counts as tokenized already.
        chat_column: a column of conversations, to read in its place.
        source_column: a column with the name of each document's source.
        words_column: a column of lists of words, which the texts hold, or which make them.
        word_labels: columns that label these words.
        given: the dataset, if it is in memory.

    Raises:
        ConfigError: no such file, kind, split or column, or a column that holds no documents.
        DataError: the dataset is empty or cannot be read.
    """
    if given is not None:
        dataset, fingerprint = given.dataset, given.fingerprint or UNKNOWN
        streaming = given.fingerprint is None
    else:
        dataset, fingerprint = open_dataset(
            name, subset=subset, split=split, streaming=streaming, revision=revision
        )
    column = choose(
        _features(dataset, name),
        text_column,
        name,
        chat_column=chat_column,
        source_column=source_column,
        words_column=words_column,
        word_labels=word_labels,
    )
    if not streaming and len(dataset) == 0:
        raise DataError(f"{name} has no rows")
    # Other columns may hold pictures or sound, which nobody needs decoded.
    return Source(name, dataset.select_columns(column.needed), column, fingerprint, streaming)


def _features(dataset: Any, name: str) -> Any:
    """Read the columns' types. Where a stream does not state them, its first row is read."""
    if dataset.features is not None:
        return dataset.features
    first = next(_examples(dataset, name), None)
    if first is None:
        raise DataError(f"{name} has no rows")
    with _reading(name):
        return datasets.Dataset.from_list([first]).features


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
    if (name.startswith((".", "/", "~")) or suffix_of(path) in KINDS) and not path.exists():
        raise ConfigError(f"no file or folder {name}")


def _load(shown: str, *arguments: Any, **options: Any) -> Any:
    """Call `datasets.load_dataset`; errors name the dataset."""
    try:
        return datasets.load_dataset(*arguments, **options)
    except datasets.exceptions.DatasetGenerationError as error:
        raise _fault(shown, error) from error
    except Exception as error:
        fault = _fault(shown, error)
        if isinstance(error, OSError | ValueError) and str(fault).startswith(f"cannot read {shown}: {error}"):
            raise ConfigError(f"cannot open {shown}: {error}") from error
        raise fault from error


def _open_local(path: Path, subset: str | None, split: str, streaming: bool) -> Any:
    if path.is_dir() and any((path / n).exists() for n in ("state.json", "dataset_dict.json")):
        # The format that it was saved with (torch, numpy) is that of whoever saved it.
        saved = _load_saved(path, subset, split).with_format(None)
        return saved.to_iterable_dataset() if streaming else saved
    shown, path = str(path), _rightly_named(path)
    kind = kind_of(path)
    check_whole(path)
    options = _options(path, kind) | {"split": split, "streaming": streaming}
    if path.is_dir():
        return _load(shown, str(path), subset, **options)
    if subset or split != "train":
        raise ConfigError(f"the file {shown} has neither subsets nor splits; leave the flags out")
    return _load(shown, "csv" if kind == "tsv" else kind, data_files=str(path), **options)


def _rightly_named(path: Path) -> Path:
    """Return a file's path; of one whose name is not that of its content, a link with the right name, which
    libraries go by. It is there as long as this process, which may read from it at any time."""
    if not path.is_file() or (name := true_name(path)) == path.name:
        return path
    say(f"{path} is read as {name}, which it is by its first bytes")
    folder = Path(tempfile.mkdtemp(prefix="saemill-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / name).symlink_to(path.absolute())
    return folder / name


def _options(path: Path, kind: str) -> dict[str, Any]:
    """Choose how files of a kind are read: a blank line ends a document; all that csv holds is text, `NA` and
    `001` too."""
    if kind == "text":
        return {"sample_by": "paragraph", "encoding": "utf-8-sig"}
    if kind not in DELIMITERS:
        return {}
    features = datasets.Features({name: datasets.Value("string") for name in csv_columns(path, kind)})
    return {"features": features, "sep": DELIMITERS[kind], "keep_default_na": False}


def _load_saved(path: Path, subset: str | None, split: str) -> Any:
    """Load one split of a `save_to_disk` folder. A flag that chooses nothing is refused."""
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # of json, of Arrow and of its own
        raise ConfigError(
            f"cannot open {path}: {error or type(error).__name__}; it is damaged, save it anew"
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise ConfigError(f"{path} has no split {split!r}; {nearest(split, saved)}")
        saved = saved[split]
    elif split not in ("train", str(saved.split)):
        raise ConfigError(f"{path} has no splits; leave out --split {split}")
    if subset:
        raise ConfigError(f"{path} has no subsets; leave out --subset {subset}")
    return saved

"""A dataset that is in memory already, given from Python in place of a name."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import xxhash

from saemill.common.config import nearest
from saemill.common.errors import ConfigError
from saemill.tokenize.columns import choose
from saemill.tokenize.config import TokenizeConfig

NAME = "in memory"
"""Name of the dataset in settings and messages."""


@dataclass(frozen=True, slots=True)
class Given:
    """The dataset, as `datasets` has it."""

    dataset: Any
    fingerprint: str | None
    """Hash of its documents; None of a stream, which is read once."""


def given(dataset: Any, config: TokenizeConfig) -> Given:
    """Take texts, a dataset, one of several splits or a stream as they are.

    Args:
        dataset: a list of texts, or a `Dataset`, `DatasetDict` or `IterableDataset`.
        config: which split and columns are read.

    Raises:
        ConfigError: it is nothing of these, has no such split or column, or a setting has no effect on it.
    """
    for name, default in (("subset", None), ("revision", None), ("streaming", False)):
        if getattr(config, name) != default:
            raise ConfigError(f"{name} has no effect on a dataset in memory; leave it out")
    if isinstance(dataset, datasets.DatasetDict | datasets.IterableDatasetDict):
        if config.split not in dataset:
            raise ConfigError(f"the dataset has no split {config.split!r}; {nearest(config.split, dataset)}")
        dataset = dataset[config.split]
    elif config.split != "train":
        raise ConfigError("split has no effect on a dataset in memory without splits; leave it out")
    if isinstance(dataset, Sequence) and all(isinstance(text, str) for text in dataset):
        dataset = datasets.Dataset.from_dict({config.text_column: list(dataset)})
    if isinstance(dataset, datasets.IterableDataset):
        return Given(dataset, None)
    if not isinstance(dataset, datasets.Dataset):
        raise ConfigError(
            "dataset must be a name, a list of texts, or a Dataset, DatasetDict or IterableDataset of "
            f"`datasets`, got {type(dataset).__name__}"
        )
    dataset = dataset.with_format(None)
    return Given(dataset, _hash(dataset, config))


def _hash(dataset: datasets.Dataset, config: TokenizeConfig) -> str:
    """Hash the columns that are read, row by row."""
    column = choose(
        dataset.features,
        config.text_column,
        NAME,
        chat_column=config.chat_column,
        source_column=config.source_column,
        words_column=config.words_column,
        word_labels=config.word_labels,
    )
    digest = xxhash.xxh3_64()
    for row in dataset.select_columns(column.needed):
        digest.update(json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()

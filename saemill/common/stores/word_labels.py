"""Labels that a corpus gives to its words, such as parts of speech, token by token.

Layout of `labels/`, beside a token store's other arrays:

    zarr.json     Zarr group
    <column>/     Zarr array [n_rows, ctx_len] of uint16, a column of the dataset: 0 where a token has no
                  label, else the label's number in the manifest's list of names, counted from 1
"""

from typing import Annotated, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from saemill.common.records import Name, Record
from saemill.common.stores.shards import ShardedArray

FOLDER: Final = "labels"
GROUP: Final = f"{FOLDER}/zarr.json"
DTYPE = torch.uint16
MOST_NAMES = (1 << 16) - 1
"""Number of labels that two bytes tell apart, beside none."""


class WordLabels(Record):
    """The labels of one column."""

    column: Name
    """Name of the dataset's column, and of the array."""
    names: Annotated[tuple[str, ...], Field(min_length=1, max_length=MOST_NAMES)]
    """Names of the labels in the order in which they came; the array numbers them from 1."""

    @property
    def array(self) -> str:
        """Path of the array in a token store."""
        return f"{FOLDER}/{self.column}"


def at(numbers: ShardedArray, addresses_N: NDArray[np.int64]) -> NDArray[Any]:
    """Look up the numbers of the labels at some addresses, row by row. uint16 [N]"""
    row_N, position_N = np.divmod(addresses_N, numbers.width)
    rows, place_N = np.unique(row_N, return_inverse=True)
    read = [numbers.read(row, row + 1) for row in rows.tolist()]
    found: NDArray[Any] = np.concatenate([np.zeros((0, numbers.width), np.uint16), *read])
    return found[place_N, position_N]

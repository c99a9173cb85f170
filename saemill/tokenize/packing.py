"""Packing: documents joined by the separator into full rows, framed as the model expects."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from saemill.common.errors import DataError
from saemill.common.tokens import TokenizerInfo


@dataclass(slots=True)
class RowPacker:
    """Fills rows of `ctx_len` with documents, each followed by the separator."""

    ctx_len: int
    tokenizer: TokenizerInfo
    _row: list[int] = field(default_factory=list)
    _segments: list[tuple[int, int]] = field(default_factory=list)

    def add(self, document: int, ids: list[int]) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        """Append a document; yield each row that it fills.

        Args:
            document: its number.
            ids: its token ids, without frame and separator.

        Yields: the row's `ctx_len` ids, and its segments as (position, document); the first
            segment is at position 0 and includes the frame.
        """
        info = self.tokenizer
        end = self.ctx_len - len(info.suffix_ids)
        pending = [*ids, info.separator_id]
        offset = 0
        while offset < len(pending):
            if not self._row:
                self._row = list(info.prefix_ids)
                self._segments = [(0, document)]
            elif offset == 0:
                self._segments.append((len(self._row), document))
            piece = pending[offset : offset + end - len(self._row)]
            self._row += piece
            offset += len(piece)
            if len(self._row) == end:
                yield [*self._row, *info.suffix_ids], self._segments
                self._row, self._segments = [], []


def unframed(ids: list[int], info: TokenizerInfo) -> list[int]:
    """The ids without the frame and the separator that a tokenized dataset may carry."""
    start, stop = 0, len(ids)
    if info.prefix_ids and tuple(ids[: len(info.prefix_ids)]) == info.prefix_ids:
        start = len(info.prefix_ids)
    while stop > start and ids[stop - 1] == info.separator_id:
        stop -= 1
    return ids[start:stop]


def check_ids(ids: list[int], vocab_size: int, source_index: int) -> None:
    """Refuse ids of a tokenized dataset that the tokenizer does not have."""
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise DataError(
            f"row {source_index} of the tokenized dataset has ids {min(ids)}..{max(ids)}, but the "
            f"tokenizer has {vocab_size}; name the tokenizer that made it with --tokenizer"
        )

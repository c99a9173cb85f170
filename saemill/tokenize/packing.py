"""Packing: documents joined by the separator into full rows, framed as the model expects."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from saemill.common.stores.tokens import TokenizerInfo


@dataclass(slots=True)
class RowPacker:
    """A packer of rows of `ctx_len` ids: documents one after the other, each followed by the separator."""

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

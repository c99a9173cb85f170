"""Packing: documents joined by the separator into full rows, framed as the model expects."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from saemill.common.stores.tokens import TokenizerInfo

Mark = tuple[int, ...]
"""What a store tells of an id: numbers of the role of its message, and of the labels of its word; 0 for
none."""


@dataclass(frozen=True, slots=True)
class Row:
    """A full row."""

    ids: list[int]
    segments: list[tuple[int, int]]
    """Position and document of each piece; the first is at position 0 and includes the frame."""
    marks: list[Mark]
    """Mark of each id; empty where rows have none."""


@dataclass(slots=True)
class RowPacker:
    """A packer of rows of `ctx_len` ids: documents one after the other, each followed by the separator."""

    ctx_len: int
    tokenizer: TokenizerInfo
    document_start: int | None = None
    """Id that each document begins with."""
    mark_length: int = 0
    """Number of the numbers in a mark; 0 where rows have none."""
    _ids: list[int] = field(default_factory=list)
    _marks: list[Mark] = field(default_factory=list)
    _segments: list[tuple[int, int]] = field(default_factory=list)

    def n_tokens(self, ids: list[int]) -> int:
        """Count the tokens of a document with what stands around it."""
        return len(self._around(ids, [])[0])

    def _unmarked(self, n: int) -> list[Mark]:
        """Make the marks of ids of which nothing is told."""
        return [(0,) * self.mark_length] * n if self.mark_length else []

    def _around(self, ids: list[int], marks: list[Mark]) -> tuple[list[int], list[Mark]]:
        """Put what documents begin and end with around one, without marks of their own."""
        start, separator = self.document_start, self.tokenizer.separator_id
        before = [start] if start is not None and ids[:1] != [start] else []
        after = [separator] if separator is not None else []
        marks = marks or self._unmarked(len(ids))
        around = [*before, *ids, *after]
        return around, [*self._unmarked(len(before)), *marks, *self._unmarked(len(after))][: len(around)]

    def add(self, document: int, ids: list[int], marks: list[Mark]) -> Iterator[Row]:
        """Append a document; yield each row that it fills.

        Args:
            document: its number.
            ids: its token ids, without frame and separator.
            marks: that of each id, and of the separator where it has one; empty where none has.
        """
        info = self.tokenizer
        end = self.ctx_len - len(info.suffix_ids)
        pending, pending_marks = self._around(ids, marks)
        offset = 0
        while offset < len(pending):
            if not self._ids:
                is_there = self.document_start is not None and info.prefix_ids == (pending[offset],)
                self._ids = [] if is_there else list(info.prefix_ids)
                self._marks, self._segments = self._unmarked(len(self._ids)), [(0, document)]
            elif offset == 0:
                self._segments.append((len(self._ids), document))
            n = min(len(pending) - offset, end - len(self._ids))
            self._ids += pending[offset : offset + n]
            self._marks += pending_marks[offset : offset + n]
            offset += n
            if len(self._ids) == end:
                suffix = info.suffix_ids
                marks_S = [*self._marks, *self._unmarked(len(suffix))]
                yield Row([*self._ids, *suffix], self._segments, marks_S)
                self._ids, self._marks, self._segments = [], [], []

"""Packing: documents joined by the separator into full rows, framed as the model expects."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from saemill.common.stores.tokens import TokenizerInfo


@dataclass(frozen=True, slots=True)
class Row:
    """A full row."""

    ids: list[int]
    segments: list[tuple[int, int]]
    """Position and document of each piece; the first is at position 0 and includes the frame."""
    roles: list[int]
    """Number of the role of each id, 0 where it has none; empty where rows do not tell it."""


@dataclass(slots=True)
class RowPacker:
    """A packer of rows of `ctx_len` ids: documents one after the other, each followed by the separator."""

    ctx_len: int
    tokenizer: TokenizerInfo
    document_start: int | None = None
    """Id that each document begins with."""
    has_roles: bool = False
    """Whether rows tell the role of each id."""
    _ids: list[int] = field(default_factory=list)
    _roles: list[int] = field(default_factory=list)
    _segments: list[tuple[int, int]] = field(default_factory=list)

    def n_tokens(self, ids: list[int]) -> int:
        """Count the tokens of a document with what stands around it."""
        return len(self._around(ids, [])[0])

    def _around(self, ids: list[int], roles: list[int]) -> tuple[list[int], list[int]]:
        """Put what documents begin and end with around one, and no role to it."""
        start, separator = self.document_start, self.tokenizer.separator_id
        before = [start] if start is not None and ids[:1] != [start] else []
        after = [separator] if separator is not None else []
        roles = roles or [0] * len(ids)
        around = [*before, *ids, *after]
        if not self.has_roles:
            return around, []
        return around, [*[0] * len(before), *roles, *[0] * len(after)][: len(around)]

    def add(self, document: int, ids: list[int], roles: list[int]) -> Iterator[Row]:
        """Append a document; yield each row that it fills.

        Args:
            document: its number.
            ids: its token ids, without frame and separator.
            roles: the role of each id, and of the separator where it has one; empty where none has.
        """
        info = self.tokenizer
        end = self.ctx_len - len(info.suffix_ids)
        pending, pending_roles = self._around(ids, roles)
        offset = 0
        while offset < len(pending):
            if not self._ids:
                is_there = self.document_start is not None and info.prefix_ids == (pending[offset],)
                self._ids = [] if is_there else list(info.prefix_ids)
                self._roles, self._segments = [0] * len(self._ids), [(0, document)]
            elif offset == 0:
                self._segments.append((len(self._ids), document))
            n = min(len(pending) - offset, end - len(self._ids))
            self._ids += pending[offset : offset + n]
            self._roles += pending_roles[offset : offset + n] if self.has_roles else ()
            offset += n
            if len(self._ids) == end:
                suffix = info.suffix_ids
                roles_S = [*self._roles, *[0] * len(suffix)] if self.has_roles else []
                yield Row([*self._ids, *suffix], self._segments, roles_S)
                self._ids, self._roles, self._segments = [], [], []

"""Rows of token ids of a dataset that is tokenized already: checked, and freed of frame and padding."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from saemill.common.errors import DataError
from saemill.common.stores.tokens import TokenizerInfo

RUN, FEWEST_ROWS = 4, 8
"""Times that an end of a row repeats an id that is taken for padding, and rows of which most must do so."""


def ids_of(value: Any, where: str) -> list[int]:
    """Read a row's ids. Whole numbers that are written as floats (5.0) are accepted.

    Args:
        value: what the dataset holds.
        where: the row, for messages.

    Raises:
        DataError: it is no list of whole numbers.
    """
    if not isinstance(value, list):
        raise DataError(f"{where} must be a list of token ids, got {_shown(value)}; mend or remove that row")
    for token in value:
        if type(token) is not int and not (isinstance(token, float) and token.is_integer()):
            raise DataError(
                f"{where} must hold whole numbers, the ids of tokens, got {_shown(token)} among them; mend "
                "or remove that row"
            )
    return [int(token) for token in value]


def _shown(value: Any) -> str:
    """Shorten a value for messages."""
    return "null" if value is None else f"{value!r:.60}"


def masked(ids: list[int], mask: Any, where: str) -> list[int]:
    """Select the ids at which the row's attention mask is 1.

    Raises:
        DataError: the mask has another length, or other values than 0 and 1.
    """
    if not isinstance(mask, list) or len(mask) != len(ids):
        got = f"{len(mask)} values" if isinstance(mask, list) else _shown(mask)
        raise DataError(
            f"{where} has {len(ids)} ids, but its attention_mask is {got}; mend that row, or leave the "
            "column out"
        )
    if other := [value for value in mask if value not in (0, 1)]:
        raise DataError(
            f"the attention_mask of {where} must hold 0 and 1, got {_shown(other[0])}; mend that row, or "
            "leave the column out"
        )
    return [token for token, real in zip(ids, mask, strict=True) if real]


def check_ids(ids: list[int], vocab_size: int, where: str) -> None:
    """Refuse ids that the tokenizer does not have.

    Raises:
        DataError: naming the row and its smallest and largest id.
    """
    if ids and min(ids) < 0:
        raise DataError(
            f"{where} has the id {min(ids)}; ids are 0 or more (-100 is a label's, not a token's): mend it"
        )
    if ids and max(ids) >= vocab_size:
        raise DataError(
            f"{where} has ids {min(ids)}..{max(ids)}, but the tokenizer has {vocab_size}; name the tokenizer "
            "that made it with --tokenizer"
        )


def padding_of(info: TokenizerInfo) -> int | None:
    """Return the id that rows are padded with: the padding token, or of a tokenizer without one the
    separator."""
    return info.separator_id if info.pad_id is None else info.pad_id


def n_padding(ids: list[int], info: TokenizerInfo) -> tuple[int, int]:
    """Count the ids at the start and at the end of a row that are padding.

    Where padding and separator are one token, as of a tokenizer without a padding token, a single one is a
    separator, and so is the last before the text or the first after it.
    """
    pad = padding_of(info)
    if pad is None:
        return 0, 0
    n = len(ids)
    left = next((place for place, token in enumerate(ids) if token != pad), n)
    right = next((place for place, token in enumerate(reversed(ids)) if token != pad), 0) if left < n else 0
    if pad == info.separator_id or info.prefix_ids == (pad,):
        if left == n:
            return n, 0
        return max(0, left - 1), max(0, right - 1)
    return left, right


def unframed(ids: list[int], info: TokenizerInfo) -> list[int]:
    """Cut off the frame and the separators that a row may carry at its ends."""
    start, stop = 0, len(ids)
    n_prefix, n_suffix = len(info.prefix_ids), len(info.suffix_ids)
    if n_prefix and tuple(ids[:n_prefix]) == info.prefix_ids:
        start = n_prefix
    while start < stop and ids[start] == info.separator_id:
        start += 1
    if n_suffix and stop - start >= n_suffix and tuple(ids[stop - n_suffix :]) == info.suffix_ids:
        stop -= n_suffix
    while stop > start and ids[stop - 1] == info.separator_id:
        stop -= 1
    return ids[start:stop]


def _runs(ids: list[int], info: TokenizerInfo) -> Iterator[tuple[str, int]]:
    """List the ends of a row that are one id several times, with the id, unless that is the padding."""
    for end, edge in (("begin", ids[:RUN]), ("end", ids[-RUN:])):
        if len(edge) == RUN and len(set(edge)) == 1 and edge[0] not in (info.pad_id, info.separator_id):
            yield end, edge[0]


@dataclass(frozen=True, slots=True)
class Lengths:
    """The result of `survey`."""

    common: int | None
    """Number of ids that every row has that is not empty; None where they differ."""
    why: str = ""
    """Reason why rows differ, or count as padded; it names a row where one shows it."""


def survey(rows: Iterable[tuple[str, list[int]]], info: TokenizerInfo) -> Lengths:
    """Measure rows: how long they are, and whether all are full, equally long and none of them padded.

    Where padding and separator are one token, a few rows that end in two are no proof: the rows count
    as padded where most of them are.

    Args:
        rows: (where, ids) of each.
        info: the tokenizer.

    Raises:
        DataError: most rows begin, or end, with one id several times, which is not the tokenizer's padding.
    """
    common, n_rows, n_padded = None, 0, 0
    ambiguous = padding_of(info) in (info.separator_id, *info.prefix_ids)
    runs: Counter[tuple[str, int]] = Counter()
    for where, ids in rows:
        n_pad = sum(n_padding(ids, info))
        if n_pad == len(ids) and not (ambiguous and len(ids) == common):
            continue
        n_rows += 1
        if common is None:
            common = len(ids)
        if n_pad and not ambiguous:
            return Lengths(None, f"{where} is padded")
        if len(ids) != common:
            return Lengths(None, f"{where} has {len(ids)} ids, an earlier one {common}")
        n_padded += n_pad > 0
        runs.update(_runs(ids, info))
    for (end, token), n in runs.items():
        if 2 * n > n_rows >= FEWEST_ROWS:
            raise DataError(
                f"{n:,} of {n_rows:,} rows {end} with the id {token} {RUN} times or more, as if padded with "
                "it, but it is not the tokenizer's padding; give the rows an attention_mask, or name a "
                "tokenizer that has it as its pad_token"
            )
    if 2 * n_padded > n_rows:
        return Lengths(None, f"{n_padded} of {n_rows} rows are padded")
    return Lengths(common)

"""Rounding to the stored type, and what is wrong with a file that was written."""

import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saemill.common import durable
from saemill.common.errors import DiskError
from saemill.common.stores.rounding import largest, not_finite, round_into, rounded


def bf16_bits(x: float) -> int:
    """Oracle: the upper half of the bits of an fp32 value, rounded by hand, ties to even."""
    bits = int(struct.unpack("<I", struct.pack("<f", x))[0])
    upper, rest = bits >> 16, bits & 0xFFFF
    return upper + (rest > 0x8000 or (rest == 0x8000 and upper & 1 == 1))


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20))
def test_bf16_is_rounded_to_the_nearest_ties_to_even(values: list[float]) -> None:
    """Oracle: the bits, by integer arithmetic."""
    x_T = torch.tensor(values)
    stored_T = torch.empty(len(values), dtype=torch.bfloat16)
    round_into(stored_T, x_T)
    expected = [bf16_bits(value) for value in x_T.tolist()]
    assert stored_T.view(torch.uint16).tolist() == expected
    assert torch.equal(rounded(x_T, torch.bfloat16).view(torch.uint16), stored_T.view(torch.uint16))


@given(st.lists(st.floats(-65_000, 65_000, width=32), min_size=1, max_size=20))
def test_fp16_is_what_ieee_754_says(values: list[float]) -> None:
    """Oracle: Python's own half precision, of `struct`."""
    stored_T = rounded(torch.tensor(values), torch.float16)
    expected = [struct.unpack("<e", struct.pack("<e", value))[0] for value in values]
    assert stored_T.tolist() == expected


def test_what_is_beyond_a_type_is_found() -> None:
    """Oracle: 65,504, the largest half; 65,519 still rounds to it, 65,520 does not."""
    x_TD = torch.tensor([[1.0, 65_519.0], [65_520.0, -1e9], [2.0, torch.nan]])
    stored_TD = torch.zeros(3, 2, dtype=torch.float16)
    round_into(stored_TD, x_TD)
    bad_TD = not_finite(stored_TD)
    assert bad_TD is not None
    assert bad_TD.tolist() == [[False, False], [True, True], [False, True]]
    assert stored_TD[0, 1] == largest(torch.float16) == 65_504
    assert not_finite(rounded(x_TD[:2], torch.bfloat16)) is None


@given(
    st.lists(st.integers(-(2**15), 2**15 - 1), min_size=1, max_size=8),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_any_bits_that_are_no_number_are_found(bits: list[int], dtype: torch.dtype) -> None:
    """Oracle: `torch.isfinite`; the bits are the upper half of a value's, also of NaN and infinity."""
    upper = torch.tensor(bits, dtype=torch.int16)
    stored_T = upper.view(dtype) if dtype.itemsize == 2 else (upper.int() << 16).view(dtype)
    bad_T, finite_T = not_finite(stored_T), torch.isfinite(stored_T)
    assert (bad_T is None) == bool(finite_T.all())
    assert bad_T is None or torch.equal(bad_T, ~finite_T)


def test_a_files_problem_in_one_spelling(tmp_path: Path) -> None:
    """Oracle: the words that `show`, `verify` and every reader put after the name."""
    file = tmp_path / "x"
    assert durable.problem(file, 3) == "file is missing"
    assert durable.problem(file / "below", 3) == "file is missing"
    file.write_bytes(b"abc")
    good = durable.hash_bytes(b"abc")
    assert durable.problem(file, 3) is None
    assert durable.problem(file, 3, good) is None
    assert durable.problem(file, 4000, good) == "file has 3 bytes, expected 4,000"
    assert durable.problem(file, 3, "0" * 16) == "content differs from its hash"
    assert durable.problem(tmp_path, 3) == "it is no file"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(DiskError, match="loop cannot be read"):
        durable.problem(tmp_path / "loop", 3)

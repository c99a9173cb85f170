"""The content of a file, read range by range."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import make_store

from saemill.common.errors import MissingError
from saemill.common.stores.content import FileContent


@given(st.binary(max_size=50), st.integers(-60, 60), st.integers(-60, 60))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_slices_are_those_of_the_bytes(tmp_path: Path, content: bytes, start: int, stop: int) -> None:
    """Oracle: Python's slices of the same bytes."""
    file = tmp_path / "file"
    file.write_bytes(content)
    opened = FileContent(file)
    assert len(opened) == len(content)
    assert opened[start:stop].tobytes() == content[start:stop]


def test_a_file_that_is_cut_off_falls_short(tmp_path: Path) -> None:
    """Oracle: the bytes that are left; a mapped file would end the process."""
    file = tmp_path / "file"
    file.write_bytes(b"0123456789" * 1000)
    opened = FileContent(file)
    os.truncate(file, 5)
    assert opened[2:9000].tobytes() == b"234"
    file.unlink()
    with pytest.raises(MissingError, match=r"file: file is missing\. Do so"):
        FileContent(file, "Do so")


def test_what_is_read_of_a_store_is_not_mapped(tmp_path: Path) -> None:
    """Oracle: the kernel's list of what the process has mapped; of a mapped shard it names the file."""
    values = torch.randn(400 * 16, 8, generator=torch.Generator().manual_seed(1))
    store = make_store(tmp_path, n_rows=400, ctx_len=16, d=8, shard_tokens=1000, values_TD=values)
    site = store.array("a")
    site.block(2, 1)
    shard = str(site.array.shard_path(2))
    assert shard not in Path("/proc/self/maps").read_text()
    assert len(site.array.shard(2)) == store.shard_length(2)
    assert shard in Path("/proc/self/maps").read_text()

"""Memory in huge pages: oracle `torch.zeros`, and what Linux says of the process."""

import mmap
from pathlib import Path
from unittest import mock

import pytest
import torch

from saemill.train.memory import LEAST_BYTES, zeros


def flags_at(address: int) -> list[str]:
    """Linux's flags of this process's memory at an address; none where there is no memory."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head, *rest = line.split()
        if not head.endswith(":"):
            first, last = (int(edge, 16) for edge in head.split("-"))
            inside = first <= address < last
        elif inside and head == "VmFlags:":
            return rest
    return []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.uint8])
@pytest.mark.parametrize("n_bytes", [1 << 10, LEAST_BYTES, LEAST_BYTES + 60])
def test_it_is_as_torch_makes_it(dtype: torch.dtype, n_bytes: int) -> None:
    """Oracle: `torch.zeros` and `torch.full` of the same shape and type."""
    shape = (2, n_bytes // dtype.itemsize // 2)
    made = zeros(*shape, dtype=dtype)
    assert torch.equal(made, torch.zeros(shape, dtype=dtype))
    assert made.is_contiguous()
    made.fill_(3)
    assert torch.equal(made, torch.full(shape, 3, dtype=dtype))


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no huge pages"
)
def test_large_memory_is_marked_for_huge_pages_until_it_is_dropped() -> None:
    """Oracle: Linux's flags of the memory at that address."""
    large = zeros(LEAST_BYTES // 4)
    address = large.data_ptr()
    assert "hg" in flags_at(address)
    del large
    assert "hg" not in flags_at(address)


def test_a_system_without_huge_pages_gives_others() -> None:
    """Oracle: Linux's answer where it was built without them."""

    class Pages(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(22, "Invalid argument")

    with mock.patch("mmap.mmap", Pages):
        assert not zeros(LEAST_BYTES, dtype=torch.uint8).any()

"""Memory in huge pages: oracle `torch.zeros`, and what Linux says of the process."""

import mmap
from pathlib import Path
from unittest import mock

import pytest
import torch

from saemill.train.memory import LEAST_BYTES, zeros

CHOICE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HAS_HUGE_PAGES = CHOICE.exists() and "[never]" not in CHOICE.read_text()


def huge_bytes() -> int:
    """Of this process, in huge pages."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("AnonHugePages"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.uint8])
@pytest.mark.parametrize("n_bytes", [1 << 10, LEAST_BYTES, LEAST_BYTES + 60])
def test_it_is_as_torch_makes_it(dtype: torch.dtype, n_bytes: int) -> None:
    shape = (2, n_bytes // dtype.itemsize // 2)
    made = zeros(*shape, dtype=dtype)
    assert torch.equal(made, torch.zeros(shape, dtype=dtype))
    assert made.is_contiguous()
    made.fill_(3)
    assert torch.equal(made, torch.full(shape, 3, dtype=dtype))


@pytest.mark.skipif(not HAS_HUGE_PAGES, reason="this system gives no huge pages")
def test_large_memory_is_in_huge_pages_until_it_is_dropped() -> None:
    before = huge_bytes()
    made = zeros(1 << 24, dtype=torch.uint8).fill_(1)
    assert huge_bytes() - before >= len(made) // 2
    del made
    assert huge_bytes() <= before


def test_a_system_without_huge_pages_gives_others() -> None:
    """Oracle: Linux's answer where it was built without them."""

    class Pages(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(22, "Invalid argument")

    with mock.patch("mmap.mmap", Pages):
        assert not zeros(LEAST_BYTES, dtype=torch.uint8).any()

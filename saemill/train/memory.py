"""Memory that lives from step to step, in huge pages.

A step fetches rows from all over the weights. Of pages of 4 KiB a processor remembers only some, and waits to
learn where the others lie; of huge ones, 2 MiB, it remembers all.
"""

import math
import mmap

import torch
from torch import Tensor

LEAST_BYTES = 1 << 22
"""Bytes from which huge pages are used; smaller tensors are torch's."""
CPU = torch.device("cpu")


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> Tensor:
    """Make a tensor as `torch.zeros`; on a CPU in huge pages, where Linux has them. Pages never touched take
    no memory."""
    n_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or n_bytes < LEAST_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(*shape, dtype=dtype, device=device)
    try:
        pages = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them, or too little memory, for which torch has the better message
        return torch.zeros(*shape, dtype=dtype)
    return torch.frombuffer(pages, dtype=dtype).view(shape)

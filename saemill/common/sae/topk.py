"""The k largest pre-activations of each token, exactly."""

import torch
from torch import Tensor

LOOPS = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.float16: torch.float32}
"""Dtypes whose largest entries loops find, and as what the loops read them."""


def topk(pre_TF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Select the k largest entries of each row after ReLU, exactly, in no particular order.

    On a CPU by loops that numba compiles when they are first needed. The same row always gives the same
    result.

    Args:
        pre_TF: bfloat16, float16 or float32; others, and tensors not on the CPU, go through torch.topk.

    Returns: values [T, k] in the same dtype, 0 or more, differentiable; indices int64 [T, k].
    Entries below 0 count as 0: which of them fill the row is arbitrary. So are rows with a NaN.
    """
    if pre_TF.is_cpu and pre_TF.dtype in LOOPS:
        from saemill.common.loops.largest import largest  # numba is loaded where it is used

        indices = torch.empty(len(pre_TF), k, dtype=torch.int64)
        largest(pre_TF.detach().to(LOOPS[pre_TF.dtype]).contiguous(), indices)
    else:
        indices = pre_TF.topk(k, sorted=False).indices
    return pre_TF.gather(1, indices).relu(), indices

"""Checks of the kernels' arguments, since a kernel would read past the end in silence; and launch options."""

import torch
from torch import Tensor

INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of activations and of the weights that are gathered."""

NUMERICS = {"enable_fp_fusion": True}
"""Set explicitly: Triton 3.10 changes the default, and with it the last bits."""


def expect(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another dtype or shape, or one with gaps.

    Raises:
        TypeError: another dtype.
        ValueError: another shape, or not contiguous.
    """
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {names}, got {tensor.dtype}; convert it first")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, got strides {tensor.stride()}; call .contiguous() first"
        )

"""The k largest pre-activations of each token, exactly, in small selections."""

import torch
from torch import Tensor

FAN_OUT = 4
"""Entries per group of candidates."""
SMALL = 512
"""Length of a row up to which the k largest are selected directly."""


def topk(pre_TF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Select the k largest entries of each row after ReLU, exactly, in no particular order.

    A row is cut into F/4 strided groups of 4. The k largest entries lie in the k groups with the
    largest maxima: were one's group not among them, k other groups would each hold something larger.
    So the k best groups are found, by the same rule again, and then the k best of their 4k entries.
    On a CPU the last selections are numpy's vectorised partition of integers that hold an entry's
    bits, which are ordered like the numbers where these are not negative, and its place. Ties are
    broken by place, so that the same row always gives the same result.

    Args:
        pre_TF: bfloat16, float16 or float32; others, and tensors not on the CPU, go through torch.topk.

    Returns: values [T, k] in the same dtype, 0 or more, differentiable; indices int64 [T, k].
    Entries below 0 count as 0: which of them fill the row is arbitrary. So are rows with a NaN.
    """
    bits = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
    if pre_TF.is_cpu and pre_TF.dtype in bits:
        indices = _largest(pre_TF.detach().contiguous().view(bits[pre_TF.dtype]), k)
    else:
        indices = pre_TF.topk(k, sorted=False).indices
    return pre_TF.gather(1, indices).relu(), indices


def _largest(bits_TN: Tensor, k: int) -> Tensor:
    """Find the places of the k largest integers of each row, negative ones counted as 0. int64 [T, k]."""
    n = bits_TN.shape[1]
    n_groups = n // FAN_OUT
    if n <= SMALL or n % FAN_OUT or n_groups < 2 * k:
        return _partition(bits_TN, k)
    grouped = bits_TN.view(-1, FAN_OUT, n_groups)
    chosen_TK = _largest(grouped.amax(1), k)
    candidates = grouped.gather(2, chosen_TK[:, None, :].expand(-1, FAN_OUT, -1)).flatten(1)
    places_TK = _partition(candidates, k)
    return (places_TK // k) * n_groups + chosen_TK.gather(1, places_TK % k)


def _partition(bits_TN: Tensor, k: int) -> Tensor:
    """Select as `_largest` does, by partitioning keys of the entry's bits above its place in the row."""
    n = bits_TN.shape[1]
    narrow = bits_TN.dtype == torch.int16 and n <= 1 << 16
    dtype, shift = (torch.int32, 16) if narrow else (torch.int64, 32)
    keys_TN = bits_TN.clamp(min=0).to(dtype).bitwise_left_shift_(shift)
    keys = keys_TN.bitwise_or_(torch.arange(n, dtype=dtype)).numpy()
    keys.partition(n - k, axis=1)
    return torch.from_numpy(keys[:, n - k :]).bitwise_and((1 << shift) - 1).long()

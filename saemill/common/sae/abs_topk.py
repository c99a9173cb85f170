"""The k largest pre-activations of each token by absolute value, with their signs."""

from torch import Tensor

from saemill.common.sae.topk import topk


def abs_topk(pre_TF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Select the k entries of each row that are largest by absolute value, exactly, in no particular order.

    Args:
        pre_TF: pre-activations.
        k: 1 to F.

    Returns: values [T, k] in the same dtype, of either sign, differentiable; indices int64 [T, k].
    """
    _, indices = topk(pre_TF.detach().abs(), k)
    return pre_TF.gather(1, indices), indices

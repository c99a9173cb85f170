"""The k largest pre-activations of each token, exactly, in two small selections."""

from torch import Tensor

GROUP = 16
"""Latents per group of candidates."""


def topk(pre_TF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row, exactly, in no particular order.

    The row is cut into F/16 strided groups of 16 latents. The k largest entries lie in the k groups with
    the largest maxima: were one's group not among them, k other groups would each hold something
    larger. So two small selections do. Ties are broken arbitrarily.

    Args:
        pre_TF: any float dtype.

    Returns: values [T, k] in the same dtype, indices int64 [T, k].
    """
    n_tokens, n_latents = pre_TF.shape
    n_groups = n_latents // GROUP
    if n_latents % GROUP or n_groups < 2 * k:
        values, indices = pre_TF.topk(k, sorted=False)
        return values, indices
    grouped = pre_TF.view(n_tokens, GROUP, n_groups)
    chosen_TK = grouped.amax(1).topk(k, sorted=False).indices
    candidates = grouped.gather(2, chosen_TK[:, None, :].expand(-1, GROUP, -1)).flatten(1)
    values, places = candidates.topk(k, sorted=False)
    return values, (places // k) * n_groups + chosen_TK.gather(1, places % k)

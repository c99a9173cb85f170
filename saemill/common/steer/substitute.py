"""What takes an activation's place at a site: an SAE's reconstruction, after an edit or as it is.

A transcoder encodes x at one site, and what it decodes to takes the place of the activation at another.

    f = encode(x)    f' = edit(f)    x' = x + decode(f') − decode(f)    with the error kept
                                     x' = decode(f')                    without

`splice` puts it into any transformer, and `saemill assess` into the model whose losses it measures.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from saemill.common.errors import ConfigError
from saemill.common.sae.sae import Encoded, Sae

Edit = Callable[[Encoded], tuple[Tensor, Tensor]]
"""Change of codes: top_acts, top_indices [B, S, k] → the same, [B, S, any k]. It may change its arguments in
place."""


class Substitute:
    """An SAE that takes the place of activations.

    Args:
        sae: on the activations' device.
        edits: of the latents, in order.
        keep_error: add what the SAE does not reconstruct, x − decode(f).
    """

    def __init__(self, sae: Sae, edits: Sequence[Edit] = (), *, keep_error: bool = False) -> None:
        self.sae, self.edits, self.keep_error = sae, edits, keep_error
        self.fired: tuple[Encoded, Tensor] | None = None
        """Codes of the latest activation, before the edits, and bool [B, S]: where it was replaced."""

    def __call__(self, x_BSD: Tensor, where_BS: Tensor, read_BSD: Tensor | None = None) -> Tensor:
        """Compute x' at some positions and x at the others. [B, S, D], in the dtype of x.

        Args:
            x_BSD: the activation whose place is taken.
            where_BS: bool, the positions.
            read_BSD: the activation that a transcoder encodes; None of an SAE, which encodes x.

        Raises:
            ConfigError: an edit returned what cannot be decoded.
        """
        read_BSD = x_BSD if read_BSD is None else read_BSD
        codes = self.sae.encode(read_BSD)
        # What is watched lies between the codes and the edits: its gradient is of the edits' path alone.
        watched = Encoded(codes.top_acts.clone(), codes.top_indices)
        if torch.is_grad_enabled() and not watched.top_acts.requires_grad:
            watched.top_acts.requires_grad_()  # neither the model's weights nor the SAE's ask for a gradient
        self.fired = watched, where_BS
        edited: tuple[Tensor, Tensor] = Encoded(watched.top_acts.clone(), watched.top_indices.clone())
        for edit in self.edits:
            edited = decodable(edit(Encoded(*edited)), x_BSD)
        changed_BSD = self.sae.decode(*edited, read_BSD)
        if self.keep_error:
            changed_BSD = x_BSD + (changed_BSD - self.sae.decode(*codes, read_BSD))
        return substitute(x_BSD, changed_BSD, where_BS)


def substitute(x_BSD: Tensor, other_BSD: Tensor, where_BS: Tensor) -> Tensor:
    """Replace the activation's vectors at some positions by another's, in its own dtype. where_BS: bool."""
    return torch.where(where_BS[..., None], other_BSD.to(x_BSD.dtype), x_BSD)


def decodable(edited: Any, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
    """Return what an edit returned, if it can be decoded."""
    match edited:
        case (Tensor() as acts, Tensor() as indices) if (
            acts.shape == indices.shape and acts.shape[:-1] == x_BSD.shape[:-1]
        ):
            return acts, indices
    got = [tuple(one.shape) if isinstance(one, Tensor) else one for one in edited or ()] or edited
    raise ConfigError(
        f"an edit must return top_acts and top_indices, both {(*x_BSD.shape[:-1], 'k')}, got {got!r:.200}"
    )

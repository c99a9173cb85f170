"""A cross-layer transcoder in the place of all the sites that it predicts, in one forward pass.

When the model comes to the site that layer l reads, its latents are encoded from what is there, after what
earlier layers wrote has taken effect, and what they write to this layer and to all later ones is kept. When
it comes to the site that is predicted, the sum of what layers 0 to l wrote takes the activation's place.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from saemill.common.errors import ConfigError
from saemill.common.sae.sae import Sae
from saemill.common.steer.substitute import substitute


class AcrossLayers:
    """The codes and predictions of one forward pass.

    Args:
        sae: a cross-layer transcoder, on the activations' device.
        where_BS: bool, the positions at which activations are replaced.
    """

    def __init__(self, sae: Sae, where_BS: Tensor) -> None:
        self.sae, self.layers, self.where_BS = sae, sae.layers, where_BS
        self.written: list[list[Tensor]] = [[] for _ in self.layers]
        """What has been written to each layer's target so far, [B, S, E] of each layer that did."""

    @property
    def edits(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """Return what is done to the activations at each site, read or predicted, by its name."""
        config = self.sae.config
        reads = {part.site: partial(self._read, layer) for layer, part in enumerate(config.joined)}
        writes = {part.site: partial(self._write, layer) for layer, part in enumerate(config.predicted)}
        return reads | writes

    def _read(self, layer: int, x_BSD: Tensor) -> Tensor:
        """Encode what a layer reads, and keep what its latents write; the activation stays."""
        own = self.layers[layer]
        rows_TE = own.decode(*own.encode(x_BSD.flatten(0, 1)))
        parts = rows_TE.chunk(len(self.layers) - layer, 1)
        for target, part_TE in enumerate(parts, layer):
            self.written[target].append(part_TE.view(*x_BSD.shape[:2], -1))
        return x_BSD

    def _write(self, layer: int, x_BSE: Tensor) -> Tensor:
        """Return what all layers up to this one have written, where activations are replaced.

        Raises:
            ConfigError: a layer's latents are encoded later than they are to write.
        """
        if len(self.written[layer]) != layer + 1:
            site, read = self.sae.config.predicted[layer].site, self.sae.config.joined[layer].site
            raise ConfigError(
                f"{site} runs before {read}, which a cross-layer transcoder reads to predict it; name the "
                "sites of each layer in the order in which the model runs them"
            )
        return substitute(x_BSE, torch.stack(self.written[layer]).sum(0), self.where_BS)

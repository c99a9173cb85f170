"""A cross-layer transcoder in the place of all the sites that it predicts, in one forward pass.

When the model comes to the site that layer l reads, its latents are encoded from what is there, after what
earlier layers wrote has taken effect, and what they write to this layer and to all later ones is kept. When
it comes to the site that is predicted, the sum of what layers 0 to l wrote takes the activation's place; with
the error kept the sum of what edits changed of it is added there.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from saemill.common.errors import ConfigError
from saemill.common.sae.sae import Encoded, Sae
from saemill.common.steer.edits import LatentEdit
from saemill.common.steer.substitute import Edit, Substitute, decodable, substitute


class AcrossLayers:
    """The codes and predictions of a forward pass.

    Args:
        sae: a cross-layer transcoder, on the activations' device.
        edits: of the latents, in order, by their numbers among those of all layers.
        keep_error: add what is not predicted.
    """

    def __init__(self, sae: Sae, edits: Sequence[Edit] = (), *, keep_error: bool = False) -> None:
        self.sae, self.keep_error = sae, keep_error
        self.n_each = sae.config.num_latents // sae.config.n_layers
        self.layers = [
            Substitute(own, self._edits_of(layer, edits), keep_error=keep_error)
            for layer, own in enumerate(sae.layers)
        ]
        self.forget()

    def forget(self) -> None:
        """Begin a forward pass."""
        self.written: list[list[Tensor]] = [[] for _ in self.layers]
        """What was written to each layer's target so far, [B, S, E] of each layer that did."""
        for own in self.layers:
            own.fired = None

    def _edits_of(self, layer: int, edits: Sequence[Edit]) -> list[Edit]:
        """Choose the edits that concern a layer's latents, by the numbers that these have there."""
        own = range(layer * self.n_each, (layer + 1) * self.n_each)
        return [
            partial(_renumbered, edit, own)
            for edit in edits
            if not isinstance(edit, LatentEdit) or any(latent in own for latent in edit.latents)
        ]

    def in_place(self, where_BS: Tensor) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """Return what is done to the activations at each site, read or predicted, by its name.

        Args:
            where_BS: bool, the positions at which activations are replaced.
        """
        config = self.sae.config
        reads = {part.site: partial(self.read, layer, where_BS) for layer, part in enumerate(config.joined)}
        return reads | {part.site: partial(self.write, layer) for layer, part in enumerate(config.predicted)}

    def read(self, layer: int, where_BS: Tensor, x_BSD: Tensor) -> Tensor:
        """Encode what a layer reads, and keep what its latents write; the activation stays."""
        own = self.layers[layer]
        nothing = own.sae.b_dec.new_zeros(*x_BSD.shape[:2], len(own.sae.b_dec))
        parts = own(nothing, where_BS, x_BSD).chunk(len(self.layers) - layer, -1)
        for target, part_BSE in enumerate(parts, layer):
            self.written[target].append(part_BSE)
        return x_BSD

    def written_to(self, layer: int) -> Tensor:
        """Add up what was written to a layer's target: of all layers that have run. [B, S, E]"""
        return torch.stack(self.written[layer]).sum(0)

    def write(self, layer: int, x_BSE: Tensor) -> Tensor:
        """Return what takes the place of the activation that a layer predicts.

        Raises:
            ConfigError: a layer's latents are encoded later than they are to write.
        """
        fired = self.layers[layer].fired
        if fired is None:
            site, read = self.sae.config.predicted[layer].site, self.sae.config.joined[layer].site
            raise ConfigError(
                f"{site} runs before {read}, which a cross-layer transcoder reads to predict it; name the "
                "sites of each layer in the order in which the model runs them"
            )
        written_BSE = self.written_to(layer)
        if self.keep_error:
            return x_BSE + written_BSE.to(x_BSE.dtype)
        return substitute(x_BSE, written_BSE, fired[1])

    @property
    def fired(self) -> list[Encoded] | None:
        """Codes of each layer, before the edits; None before all are there. Their numbers are those among all
        layers' latents."""
        found = [own.fired for own in self.layers]
        codes = [each[0] for each in found if each is not None]
        if len(codes) < len(found):
            return None
        return [
            Encoded(top_acts, top_indices + layer * self.n_each)
            for layer, (top_acts, top_indices) in enumerate(codes)
        ]


def _renumbered(edit: Edit, own: range, codes: Encoded) -> tuple[Tensor, Tensor]:
    """Edit a layer's codes, whose numbers are those among all layers' latents meanwhile.

    Raises:
        ConfigError: the edit returns latents of another layer.
    """
    numbered = Encoded(codes.top_acts, codes.top_indices + own.start)
    acts, indices = decodable(edit(numbered), codes.top_acts)
    if bool(((indices < own.start) | (indices >= own.stop)).any()):
        raise ConfigError(
            f"an edit must return latents of the layer whose codes it is given, {own.start} to "
            f"{own.stop - 1} here, got {int(indices.min())} to {int(indices.max())}"
        )
    return acts, indices - own.start

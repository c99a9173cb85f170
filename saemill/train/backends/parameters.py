"""One SAE's parameters: their names, their shapes, and what is a row per latent.

Those of a cross-layer transcoder are shaped as `common.sae.layers` tells.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from saemill.common.sae import layers

NONE: Mapping[str, Tensor] = MappingProxyType({})
"""No tensors."""


class Parameters(NamedTuple):
    """One SAE's parameters in training units, float32. Where a team splits the latents, this process's."""

    w_enc_FD: Tensor
    b_enc_F: Tensor
    w_dec_FD: Tensor
    """Rows of unit length, unless the architecture leaves them free."""
    b_D: Tensor
    """b_dec − centre."""
    further_F: Mapping[str, Tensor] = NONE
    """Parameters that the architecture has beside these, one number per latent, by name."""
    w_skip_ED: Tensor | None = None
    """The linear map from x that is added to the prediction; None without."""
    is_centred: bool = True
    """Whether the encoder takes x − b, and not x."""
    n_layers: int = 1
    """Layers of a cross-layer transcoder; 1 of others."""
    widths: tuple[int, ...] = ()
    """Widths of the sites that a decoder row writes to side by side; empty of one site."""

    @classmethod
    def zeros(cls, shape: "Shape", device: torch.device) -> "Parameters":
        """Make their memory in torch's own allocator."""
        return cls.of({name: torch.zeros(s, device=device) for name, s in shape.of_each.items()}, shape)

    @classmethod
    def of(cls, named: Mapping[str, Tensor], like: "Parameters | Shape") -> "Parameters":
        """Make them of tensors by name, as `named` gives them."""
        further = {name: tensor for name, tensor in named.items() if name not in (*NAMES, SKIP)}
        w_enc, b_enc, w_dec, b = (named[name] for name in NAMES)
        return cls(
            w_enc, b_enc, w_dec, b, further, named.get(SKIP), like.is_centred, like.n_layers, like.widths
        )

    @property
    def named(self) -> dict[str, Tensor]:
        """Return all by name."""
        skip = {} if self.w_skip_ED is None else {SKIP: self.w_skip_ED}
        return {**dict(zip(NAMES, self[:4], strict=True)), **self.further_F, **skip}

    @property
    def norms_FL(self) -> Tensor:
        """Compute the lengths of a decoder row's parts at each of its sites; of one site L is 1."""
        parts = torch.split(self.w_dec_FD, list(self.widths) or self.w_dec_FD.shape[1], 1)
        return torch.stack([part.norm(dim=1) for part in parts], 1)

    @property
    def whole(self) -> tuple[str, ...]:
        """Return the names of the parameters that have no row per latent."""
        ragged = ("w_dec",) if self.n_layers > 1 else ()
        return (*ragged, "b", *([] if self.w_skip_ED is None else [SKIP]))

    @property
    def layers(self) -> list["Parameters"]:
        """Return those of each layer of a cross-layer transcoder, as those of a transcoder from its site to
        all that it writes to, side by side: views. The bias is left to the whole. Of others themselves."""
        if self.n_layers == 1:
            return [self]
        blocks = layers.blocks(self.w_dec_FD, self.n_layers)
        encoders = (rows.chunk(self.n_layers) for rows in (self.w_enc_FD, self.b_enc_F))
        return [
            self._replace(w_enc_FD=w_enc, b_enc_F=b_enc, w_dec_FD=w_dec, further_F=NONE, n_layers=1)
            for w_enc, b_enc, w_dec in zip(*encoders, blocks, strict=True)
        ]

    @property
    def offset_D(self) -> Tensor:
        """Return what the encoder subtracts from x: b, or zeros."""
        return self.b_D if self.is_centred else self.w_enc_FD.new_zeros(self.w_enc_FD.shape[1])


NAMES = ("w_enc", "b_enc", "w_dec", "b")
"""Names of the parameters that every SAE has."""


SKIP = "w_skip"
"""Name of W_skip."""


class Shape(NamedTuple):
    """What an SAE's parameters are."""

    n_latents: int
    """Where a team splits the latents, this process's."""
    d: int
    """Width of the inputs."""
    d_out: int
    """Width of what is predicted."""
    further: tuple[str, ...] = ()
    """Names of parameters as `Parameters.further_F` has them."""
    has_skip: bool = False
    is_centred: bool = True
    """As `Parameters.is_centred`."""
    n_layers: int = 1
    """As `Parameters.n_layers`."""
    widths: tuple[int, ...] = ()
    """As `Parameters.widths`."""

    @property
    def of_each(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter by name."""
        f, d, e, n = self.n_latents, self.d, self.d_out, self.n_layers
        w_dec = (layers.n_rows(f, n), e // n)
        own = {"w_enc": (f, d // n), "b_enc": (f,), "w_dec": w_dec, "b": (e,)}
        return own | dict.fromkeys(self.further, (f,)) | ({SKIP: (e, d // n)} if self.has_skip else {})

"""One SAE's parameters: their names, their shapes, and what is a row per latent."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

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

    @classmethod
    def zeros(cls, shape: "Shape", device: torch.device) -> "Parameters":
        """Make their memory in torch's own allocator."""
        return cls.of({name: torch.zeros(s, device=device) for name, s in shape.of_each.items()}, shape)

    @classmethod
    def of(cls, named: Mapping[str, Tensor], like: "Parameters | Shape") -> "Parameters":
        """Make them of tensors by name, as `named` gives them."""
        further = {name: tensor for name, tensor in named.items() if name not in (*NAMES, SKIP)}
        w_enc, b_enc, w_dec, b = (named[name] for name in NAMES)
        return cls(w_enc, b_enc, w_dec, b, further, named.get(SKIP), like.is_centred)

    @property
    def named(self) -> dict[str, Tensor]:
        """Return all by name."""
        skip = {} if self.w_skip_ED is None else {SKIP: self.w_skip_ED}
        return {**dict(zip(NAMES, self[:4], strict=True)), **self.further_F, **skip}

    @property
    def offset_D(self) -> Tensor:
        """Return what the encoder subtracts from x: b, or zeros."""
        return self.b_D if self.is_centred else self.w_enc_FD.new_zeros(self.w_enc_FD.shape[1])


NAMES = ("w_enc", "b_enc", "w_dec", "b")
"""Names of the parameters that every SAE has."""


SKIP = "w_skip"
"""Name of W_skip."""


WHOLE = ("b", SKIP)
"""Names of the parameters that have no row per latent."""


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

    @property
    def of_each(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter by name."""
        f, d, e = self.n_latents, self.d, self.d_out
        own = {"w_enc": (f, d), "b_enc": (f,), "w_dec": (f, e), "b": (e,)}
        return own | dict.fromkeys(self.further, (f,)) | ({SKIP: (e, d)} if self.has_skip else {})

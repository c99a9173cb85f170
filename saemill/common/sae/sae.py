"""The meaning of a sparse autoencoder: TopK after Gao et al. 2024, and its files on disk.

    f = ReLU(TopK_k(W_enc (x − b_dec) + b_enc)),    x̂ = W_decᵀ f + b_dec

A saved SAE takes activations as the model produces them: the scale and the centre that training
used are folded into the biases. The folder holds `cfg.json` and `sae.safetensors`, in the layout
that sparsify reads; `common.sae.formats` has that and the layouts of other tools.
"""

from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from saemill.common.errors import DataError
from saemill.common.sae import formats
from saemill.common.sae.parts import Parts, SaeConfig
from saemill.common.sae.topk import topk


class Encoded(NamedTuple):
    """The active latents of some tokens."""

    top_acts: Tensor
    """Activations [..., k], 0 or more, in no particular order; a 0 is an unused slot."""
    top_indices: Tensor
    """Numbers of the latents, int64 [..., k]."""


class SaeOutput(NamedTuple):
    """A reconstruction and the latents it is made of."""

    reconstruction: Tensor
    """Reconstruction x̂ [..., D]."""
    top_acts: Tensor
    """Activations of the latents [..., k]."""
    top_indices: Tensor
    """Numbers of the latents, int64 [..., k]."""


class Sae(nn.Module):
    """A TopK sparse autoencoder. Its weights need no gradient unless asked for: `sae.requires_grad_()`.

    Args:
        config: its shape.
        W_enc: [F, D]; b_enc: [F]; W_dec: [F, D], its rows of unit length if saemill trained it; b_dec: [D].
    """

    def __init__(self, config: SaeConfig, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> None:
        super().__init__()
        self.config = config
        self.W_enc = nn.Parameter(W_enc, requires_grad=False)
        self.b_enc = nn.Parameter(b_enc, requires_grad=False)
        self.W_dec = nn.Parameter(W_dec, requires_grad=False)
        self.b_dec = nn.Parameter(b_dec, requires_grad=False)

    @classmethod
    def of(cls, parts: Parts) -> "Sae":
        """Make the SAE of a config and tensors."""
        return cls(parts.config, parts.W_enc, parts.b_enc, parts.W_dec, parts.b_dec)

    @property
    def parts(self) -> Parts:
        """Config and tensors, as a file holds them."""
        return Parts(self.config, self.W_enc, self.b_enc, self.W_dec, self.b_dec)

    def pre_acts(self, x: Tensor | ArrayLike) -> Tensor:
        """Compute W_enc (x − b_dec) + b_enc. x: [..., D] → [..., F], in the weights' dtype.

        Anything but a tensor (a numpy array, lists of numbers) is copied to the weights' device.

        Raises:
            DataError: x is no array of numbers, or its last axis is not D long.
        """
        x = x if isinstance(x, Tensor) else self._tensor(x)
        if x.dim() == 0 or x.shape[-1] != self.config.d_in:
            raise DataError(
                f"activations must have {self.config.d_in:,} values each, the last axis; got the shape "
                f"{tuple(x.shape)}"
            )
        return nn.functional.linear(x.to(self.W_enc.dtype) - self.b_dec, self.W_enc, self.b_enc)

    def _tensor(self, x: ArrayLike) -> Tensor:
        try:
            return torch.tensor(np.asarray(x, np.float64), dtype=self.W_enc.dtype, device=self.W_enc.device)
        except (TypeError, ValueError) as error:
            raise DataError(f"activations must be a tensor or an array of numbers: {error}") from error

    def encode(self, x: Tensor | ArrayLike) -> Encoded:
        """Select the k largest pre-activations of each token, negative ones set to 0.

        Args:
            x: [..., D], a tensor or what numpy takes for an array.

        Raises:
            DataError: as `pre_acts`, or weights are not finite.
        """
        pre = self.pre_acts(x)
        values, indices = topk(pre.flatten(0, -2) if pre.dim() > 1 else pre[None], self.config.k)
        self._check_if_not_finite(values)
        shape = (*pre.shape[:-1], self.config.k)
        return Encoded(values.view(shape), indices.view(shape))

    def decode(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
        """Decode active latents to x̂. [..., k] and int64 [..., k] → [..., D].

        Raises:
            DataError: weights are not finite.
        """
        shape = (*top_acts.shape[:-1], self.config.d_in)
        if top_acts.numel() == 0:
            return self.b_dec.expand(shape).clone()
        k = top_acts.shape[-1]
        bags = nn.functional.embedding_bag(
            top_indices.reshape(-1, k),
            self.W_dec,
            per_sample_weights=top_acts.reshape(-1, k).to(self.W_dec.dtype),
            mode="sum",
        )
        decoded = bags.view(shape) + self.b_dec
        self._check_if_not_finite(decoded)
        return decoded

    def _check_if_not_finite(self, result: Tensor) -> None:
        """Refuse weights that are not finite, where a result is not. A result may also fail to be finite
        through x: that is the caller's."""
        if not result.isfinite().all():
            self.parts.check_finite("the SAE", DataError)

    def forward(self, x: Tensor) -> SaeOutput:
        """Encode and decode. x: [..., D]."""
        encoded = self.encode(x)
        return SaeOutput(self.decode(*encoded), *encoded)

    def save(self, folder: Path | str) -> None:
        """Write `cfg.json` and `sae.safetensors`, in sparsify's layout.

        Raises:
            DataError: weights are not finite.
            DiskError: the disk is full, or the folder may not be written to.
        """
        formats.save(self.parts, "sparsify", Path(folder))

    @classmethod
    def load(cls, folder: Path | str, device: str | torch.device = "cpu") -> "Sae":
        """Read an SAE that saemill, sparsify, SAELens or dictionary_learning saved.

        Args:
            folder: on this machine, or on the hub: `hf://user/repo[@revision][/folder]`, where the folder
                may be left out if the repository holds one SAE alone.
            device: where its weights go.

        Raises:
            StoreError: the folder holds no SAE, a file of it is missing or damaged, weights do not fit the
                config, or they are not finite.
            ConfigError: it holds an SAE that is no TopK SAE of raw activations; the hub has no such
                repository, or cannot be asked.
        """
        return cls.of(formats.load(folder)).to(device)

    @classmethod
    def from_pretrained(
        cls,
        repo: str,
        folder: str = "",
        revision: str | None = None,
        device: str | torch.device = "cpu",
    ) -> "Sae":
        """Read an SAE from the hub: `Sae.load` of `hf://repo@revision/folder`."""
        at = f"@{quote(revision, safe='')}" if revision else ""
        return cls.load(f"hf://{repo}{at}/{folder}".rstrip("/"), device)

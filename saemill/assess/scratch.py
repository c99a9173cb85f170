"""Memory for the pre-activations of some rows."""

import math

import torch
from torch import Tensor

from saemill.common.sae.sae import Sae


class Scratch:
    """Memory that pre-activations are written to again and again, of any SAE: fresh pages cost as much as
    filling them."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def pre_acts(self, sae: Sae, x_TD: Tensor) -> Tensor:
        """Compute `Sae.pre_acts` of rows on the SAE's device. They are there until the next call. [T, F]"""
        shape, dtype = (len(x_TD), sae.config.num_latents), sae.W_enc.dtype
        n_bytes = math.prod(shape) * dtype.itemsize
        if len(self._bytes) < n_bytes or self._bytes.device != x_TD.device:
            self._bytes = torch.empty(n_bytes, dtype=torch.uint8, device=x_TD.device)
        return sae.pre_acts(x_TD, out=self._bytes[:n_bytes].view(dtype).view(shape))

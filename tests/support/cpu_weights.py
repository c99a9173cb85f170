"""Numbers and weights that the tests of loops for CPUs begin with."""

import torch

from saemill.train.backends.base import Weights
from saemill.train.backends.cpu.loops.quantise import empty
from saemill.train.backends.parameters import Parameters

DTYPES = [torch.float32, torch.bfloat16]


def made(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights_of(f: int, d: int, dtype: torch.dtype, seed: int) -> Weights:
    generator = made(seed)
    w_dec_FD = torch.nn.functional.normalize(torch.randn(f, d, generator=generator), dim=1)
    w_enc_FD = torch.randn(f, d, generator=generator) / d**0.5
    b_enc_F, b_D = 0.1 * torch.randn(f, generator=generator), 0.3 * torch.randn(d, generator=generator)
    parameters = Parameters(w_enc_FD, b_enc_F, w_dec_FD, b_D)
    weights = Weights(parameters, w_enc_FD.to(dtype), w_dec_FD, empty(f, d))
    weights.refresh()
    return weights

"""What the tests of the GPU's kernels begin with, on the GPU if there is one."""

from typing import Any

import torch
from torch import Tensor

from saemill.train.backends.gpu.kernels.hyper import hyper_values

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def randn(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape).to(dtype).to(DEVICE)


def unit_rows(f: int, d: int) -> Tensor:
    return torch.nn.functional.normalize(randn(f, d), dim=1)


def distinct(n_tokens: int, f: int, k: int, hot: int = -1) -> Tensor:
    """k ascending latents per token; `hot` is among them wherever given. int32."""
    weight = torch.rand(n_tokens, f)
    if hot >= 0:
        weight[:, hot] = 2
    return weight.topk(k).indices.sort(1).values.int().to(DEVICE)


def largest(pre: Tensor, k: int, is_signed: bool = False) -> tuple[Tensor, Tensor]:
    """Oracle: a stable descending sort, which puts NaN first and the lower index of a tie first."""
    ranked = pre.float().abs() if is_signed else pre.float()
    index = torch.sort(ranked, dim=1, descending=True, stable=True).indices[:, :k].sort(1).values
    values = pre.float().gather(1, index)
    return values if is_signed else values.relu(), index.int()


def hyper(step: int = 1, **changes: Any) -> Tensor:
    settings = {"lr": 0.01, "gradient_scale": 0.37, "weight_decay": 0.02} | changes
    return torch.tensor(hyper_values(step=step, **settings), device=DEVICE)


def random_pairs(n_tokens: int, f: int, k: int, hot: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices among the first two thirds of the latents, values with zeros, dots."""
    idx = distinct(n_tokens, 2 * f // 3, k, hot)
    val = torch.rand(n_tokens, k, device=DEVICE)
    val[torch.rand(n_tokens, k, device=DEVICE) < 0.2] = 0
    return idx, val, randn(n_tokens, k)


def dense_codes(idx: Tensor, values: Tensor, f: int) -> Tensor:
    empty = torch.zeros(len(idx), f, dtype=torch.float64, device=DEVICE)
    return empty.scatter_(1, idx.long(), values.double())

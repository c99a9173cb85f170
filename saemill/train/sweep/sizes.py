"""The bytes of an SAE while it is trained: exact for what it keeps, from step to step, per backend.

What a step makes and lets go of, its scratch, is an estimate: it depends on how many codes there are.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from saemill.train.backends.parameters import Shape
from saemill.train.sweep.variant import Variant

FURTHER = {"jumprelu": 1, "gated": 2}
"""Parameters with a number per latent that an architecture has beside the encoder's bias."""
MOMENT_BYTES = {"fp32": 4, "bf16": 2, "8bit": 1}
"""Bytes of one of Adam's moments per weight."""
BLOCK = 256
"""Columns that share a float32 scale in 8 bits (`optim.moments`)."""
QUANTISED_COLUMNS = 64
"""Rows in 8 bits are padded to a multiple of it (`backends.cpu.loops.quantise`)."""
CHUNK_TOKENS, CHUNK_BYTES = 1024, 1 << 26
"""Most tokens and bytes of the scores that a thread of the loops keeps (`backends.cpu.backend`)."""
PLAIN_BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Bytes of a chunk of pre-activations that autograd sees (`backends.plain`)."""
PLAIN_COPIES = 8
"""Times that such a chunk is in memory, with codes and gradients."""
GPU_CHUNK_BYTES = 1 << 29
"""Bytes of a chunk of pre-activations in the kernels (`backends.gpu.backend`)."""
PAIR_BYTES = 48
"""Bytes of an active pair of token and latent: value and number, sorted, and its gradients."""


class Sizes(NamedTuple):
    """Bytes of one SAE in training."""

    weights: int
    gradients: int
    """Of all parameters at once, by torch's own operations; loops and kernels make a block at a time."""
    moments: int
    copies: int
    """What products read in place of float32 weights."""
    averages: int
    counters: int
    """Tokens since each latent fired, and whether it is dead."""

    def describe(self) -> dict[str, int]:
        """Return those that are not 0, by name."""
        return {name: n_bytes for name, n_bytes in self._asdict().items() if n_bytes}


def sizes(
    variant: Variant, widths: Sequence[int], kernels: str, dtype: torch.dtype, by_8_bits: bool = False
) -> Sizes:
    """Compute the bytes of one SAE.

    Args:
        variant: its settings.
        widths: D of each of its sites.
        kernels: torch, numba or triton.
        dtype: of the encoder's product.
        by_8_bits: whether 8-bit products choose its codes, with the loops.
    """
    kernels = _kernels(variant, kernels)
    shapes = _shapes(variant, widths)
    n = sum(math.prod(shape) for shape in shapes.values())
    f, d = variant.num_latents, widths[0] // variant.n_layers
    copies = 0
    if kernels != "torch" and dtype != torch.float32:
        copies += f * d * dtype.itemsize
        copies += f * widths[-1] * dtype.itemsize if kernels == "triton" else 0
    if by_8_bits:
        copies += f * (-(-d // QUANTISED_COLUMNS) * QUANTISED_COLUMNS + 8)
    return Sizes(
        weights=4 * n,
        gradients=4 * n if kernels == "torch" else 0,
        moments=sum(_moment_bytes(variant, shape) for shape in _stepped(variant, shapes)),
        copies=copies,
        averages=4 * n if variant.weight_average is not None else 0,
        counters=9 * f,
    )


def _kernels(variant: Variant, kernels: str) -> str:
    """Return what computes its steps: on a GPU torch those of a cross-layer transcoder."""
    return "torch" if variant.n_layers > 1 and kernels == "triton" else kernels


def _shapes(variant: Variant, widths: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of its parameters by name."""
    further = tuple(map(str, range(FURTHER.get(variant.architecture, 0))))
    shape = Shape(
        variant.num_latents,
        widths[0],
        widths[-1],
        further,
        has_skip=variant.skip_connection,
        n_layers=variant.n_layers,
    )
    return shape.of_each


def _stepped(variant: Variant, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
    """List those that an optimizer steps: without the decoder's where it is frozen."""
    return [shape for name, shape in shapes.items() if not (variant.is_frozen and name == "w_dec")]


def _moment_bytes(variant: Variant, shape: tuple[int, ...]) -> int:
    """Compute the bytes that an optimizer keeps for one parameter."""
    n, is_vector = math.prod(shape), len(shape) == 1
    if variant.optimizer in ("sgd", "signum"):
        return 4 * n
    if variant.optimizer == "muon" or is_vector:
        return 8 * n
    scales = 2 * 4 * shape[0] * -(-shape[1] // BLOCK) if variant.optimizer_state == "8bit" else 0
    return 2 * MOMENT_BYTES[variant.optimizer_state] * n + scales


def scratch_bytes(
    variants: Sequence[Variant],
    widths: Mapping[str, int],
    n_tokens: int,
    kernels: str,
    device: str,
    n_threads: int,
) -> int:
    """Estimate the bytes that a step takes beside what SAEs keep: those of the SAE that takes most, for they
    take their steps one by one.

    Args:
        variants: of one process.
        widths: D of each site.
        n_tokens: T, of a step.
        kernels: torch, numba or triton.
        device: its type.
        n_threads: of the loops.
    """
    return max((_scratch(v, widths, n_tokens, kernels, device, n_threads) for v in variants), default=0)


def _scratch(
    variant: Variant, widths: Mapping[str, int], n_tokens: int, kernels: str, device: str, n_threads: int
) -> int:
    d, e, f = widths[variant.sites[0]], widths[variant.sites[-1]], variant.num_latents
    kernels = _kernels(variant, kernels)
    errors, pairs = n_tokens * e * 4, round(n_tokens * variant.l0) * PAIR_BYTES
    if kernels == "torch":
        return errors + PLAIN_COPIES * min(PLAIN_BYTES.get(device, PLAIN_BYTES["cuda"]), n_tokens * f * 4)
    if kernels == "triton":
        return errors + pairs + min(GPU_CHUNK_BYTES, n_tokens * f * 2) + 2 * f * (d + e) * 4
    f //= variant.n_layers
    scores = n_threads * min(CHUNK_BYTES, CHUNK_TOKENS * f * 4, -(-n_tokens // n_threads) * f * 4)
    return errors + pairs + scores

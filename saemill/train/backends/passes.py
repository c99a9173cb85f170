"""Which code makes the passes of a step: torch's operations, loops compiled by numba, or Triton's kernels."""

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saemill.common.errors import ConfigError
from saemill.train.backends import auxk, codes, rows
from saemill.train.backends.codes import Batch, Forward


class Passes(NamedTuple):
    """The passes of a step, and what they need beside the parameters."""

    prepare: Callable[[Tensor, torch.dtype], Batch]
    forward: Callable[..., Forward]
    backward: Callable[..., Tensor]
    room: Callable[[int, torch.dtype, torch.device], Tensor]
    quantised_weights: Callable[[int, int], Any]
    auxk: auxk.Ways
    place: Callable[..., Any] = lambda rates_V, *_: rates_V
    """Puts a step's numbers where the backward pass looks for them."""


def passes_of(kernels: str) -> Passes:
    """In torch, in loops compiled by numba, or in Triton's kernels; these two are imported only if used."""
    if kernels == "numba":
        from saemill.train.backends.cpu import compiled

        return Passes(
            compiled.prepare,
            compiled.forward,
            compiled.backward,
            compiled.room,
            compiled.quantised_weights,
            compiled.AUXK,
        )
    in_torch = Passes(
        codes.prepare, codes.forward, rows.backward, codes.room, codes.not_quantised, auxk.IN_TORCH
    )
    if kernels == "triton":
        from saemill.train.backends.gpu import fused

        return in_torch._replace(forward=fused.forward, backward=fused.backward, place=fused.place)
    return in_torch


def choose_kernels(name: str, device: torch.device) -> str:
    """`auto` is triton on a GPU, on a CPU numba if it is installed, else torch.

    Raises:
        ConfigError: they do not run there.
    """
    installed = {name: find_spec(name) is not None for name in ("numba", "triton")}
    on_gpu = device.type == "cuda"
    if name == "auto":
        name = "triton" if on_gpu else "numba" if installed["numba"] else "torch"
    if name != "torch" and on_gpu != (name == "triton"):
        where = {"triton": "a GPU", "numba": "a CPU"}[name]
        raise ConfigError(
            f"kernels {name} run on {where}, not on {device}; leave them out for the best there"
        )
    if not installed.get(name, True):
        how = "pip install 'saemill[cpu]'" if name == "numba" else "it comes with CUDA builds of torch"
        raise ConfigError(f"kernels {name} need {name}, which is not installed: {how}")
    if name == "numba":
        try:
            importlib.import_module("saemill.train.backends.cpu.compiled")
        except Exception as error:
            raise ConfigError(
                f"numba is installed but does not work here: {error}\n"
                "Repair it, or train with --kernels torch"
            ) from error
    return name

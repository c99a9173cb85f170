"""Which backend computes the steps: loops on a CPU, kernels on a GPU, else torch's own operations."""

import importlib
from importlib.util import find_spec

import torch

from saemill.common.device import is_fast_at_bf16
from saemill.common.errors import ConfigError
from saemill.train.backends.base import Backend
from saemill.train.backends.plain import Plain
from saemill.train.backends.team import ALONE, Team

MODULES = {"numba": "saemill.train.backends.cpu.backend", "triton": "saemill.train.backends.gpu.backend"}
"""Imported only where they are used."""
INSTALL = {"numba": "pip install numba", "triton": "it comes with CUDA builds of torch"}


def make_backend(kernels: str, dtype: torch.dtype, team: Team = ALONE) -> Backend:
    """Make the backend of a name that `choose_kernels` gave.

    Args:
        kernels: torch, numba or triton.
        dtype: of the encoder's product.
        team: the processes that share the work.
    """
    if kernels == "numba":
        from saemill.train.backends.cpu.backend import Cpu

        return Cpu(dtype, team)
    if kernels == "triton":
        from saemill.train.backends.gpu.backend import Gpu

        return Gpu(dtype, team)
    return Plain(dtype, team)


def kernels_of(name: str, device: torch.device) -> str:
    """Resolve `auto`: numba on a CPU, triton on a GPU where it is installed, torch on any other device."""
    if name != "auto":
        return name
    by_device = {"cpu": "numba", "cuda": "triton" if find_spec("triton") else "torch"}
    return by_device.get(device.type, "torch")


def choose_kernels(name: str, device: torch.device) -> str:
    """Resolve a name as `kernels_of`, and refuse what does not run.

    Raises:
        ConfigError: they are not for the device, are not installed, or do not work.
    """
    name = kernels_of(name, device)
    if name == "torch":
        return name
    if device.type != {"triton": "cuda", "numba": "cpu"}[name]:
        where = {"triton": "a GPU", "numba": "a CPU"}[name]
        raise ConfigError(
            f"kernels {name} run on {where}, not on {device}; leave them out for the best there"
        )
    if find_spec(name) is None:
        raise ConfigError(
            f"kernels {name} need {name}, which is not installed: {INSTALL[name]}; or train with "
            "--kernels torch"
        )
    if name == "numba":
        try:
            importlib.import_module(MODULES[name])
        except Exception as error:
            raise ConfigError(
                f"numba is installed but does not work here: {error}\n"
                "Repair it, or train with --kernels torch"
            ) from error
    return name


def choose_product_dtype(name: str, device: torch.device) -> torch.dtype:
    """Choose the dtype of the encoder's product: bf16 wherever `auto` finds hardware that is fast at it."""
    if name == "auto":
        return torch.bfloat16 if is_fast_at_bf16(device) else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]

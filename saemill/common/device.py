"""The device that a name means."""

import torch

from saemill.common.errors import ConfigError
from saemill.common.log import counted


def choose_device(name: str) -> torch.device:
    """Choose the device: `auto` is the GPU if there is one; any other name is taken as it is.

    Raises:
        ConfigError: a CUDA device was asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device must be auto, cpu, cuda, cuda:1, …, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {name!r} asked for, but torch {torch.__version__} sees "
            f"{counted(torch.cuda.device_count(), 'GPU')}"
        )
    return device


def is_fast_at_bf16(device: torch.device) -> bool:
    """Tell whether a device multiplies faster in bf16 than in fp32: GPUs, and CPUs that have it."""
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()

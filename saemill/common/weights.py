"""How a model's weights lie in memory: in fewer bits, and over several devices where one is too small.

8 bits (Dettmers et al. 2022) and 4 bits (NF4, Dettmers et al. 2023) are bitsandbytes'; the device map is
accelerate's: it fills the GPUs first, then the CPU's memory, and leaves the rest on the disk.
"""

import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from saemill.common.errors import ConfigError
from saemill.common.setting import setting

Bits = Literal[4, 8]
DeviceMap = Literal["auto"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """How a model's weights are held.

    Raises:
        ConfigError: settings that say nothing together, or need a package that is not installed.
    """

    n_bits: Bits | None = None
    """Bits per weight of the linear layers; None for the type that the model computes in."""
    device_map: DeviceMap | None = setting(
        None,
        "How to deal out a model that one device cannot hold: auto, over GPUs, memory and disk",
        by_default="on one device",
        metavar="auto",
        decides=False,
    )
    max_memory: tuple[str, ...] = setting(
        (),
        "Most memory that it takes of a device: 0=20GB,cpu=60GB",
        by_default="what is free",
        metavar="DEVICE=SIZE,…",
        decides=False,
    )

    def __post_init__(self) -> None:
        if self.max_memory and self.device_map is None:
            raise ConfigError("max_memory has no effect without a device map; add --device-map auto")
        _ = self.limits
        for what, package in (
            (f"load_in_{self.n_bits}bit" if self.n_bits else "", "bitsandbytes"),
            ("device_map" if self.device_map else "", "accelerate"),
        ):
            if what and find_spec(package) is None:
                raise ConfigError(f"{what} needs {package}: pip install 'saemill[large]'")

    @property
    def limits(self) -> dict[int | str, str]:
        """Return the most memory of each device, by a GPU's number or `cpu`, as accelerate takes it.

        Raises:
            ConfigError: text that says no such thing.
        """
        limits: dict[int | str, str] = {}
        for text in self.max_memory:
            match = re.fullmatch(r"(cpu|\d+)=(\d+)([KMGT]i?B)", text)
            if match is None:
                raise ConfigError(
                    f"max_memory is written 0=20GB,cpu=60GB, in whole KB, MB, GB or TB, got {text!r}"
                )
            device, number, unit = match.groups()
            limits[device if device == "cpu" else int(device)] = number + unit
        return limits

    @property
    def stay(self) -> bool:
        """Tell whether the model stays where it is loaded, as such weights cannot be moved."""
        return self.n_bits is not None or self.device_map is not None


AS_GIVEN = Weights()
"""Weights in the type that the model computes in, on one device."""


def bits_of(in_8bit: bool | None, in_4bit: bool | None) -> Bits | None:
    """Return the bits per weight that two settings ask for.

    Raises:
        ConfigError: both do.
    """
    if in_8bit and in_4bit:
        raise ConfigError("load_in_8bit and load_in_4bit exclude each other; leave one out")
    return 8 if in_8bit else 4 if in_4bit else None


def check_devices(weights: Weights, n_processes: int, n_gpus: int) -> None:
    """Refuse a device map that this machine, or so many processes, cannot follow.

    Raises:
        ConfigError: each of several processes would fill all devices, or a GPU is named that is not there.
    """
    if weights.device_map and n_processes > 1:
        raise ConfigError(
            f"device_map deals one model out over all devices, and {n_processes} processes were started; "
            "start one, or leave out --device-map"
        )
    for device in weights.limits:
        if device != "cpu" and int(device) >= n_gpus:
            raise ConfigError(f"max_memory names GPU {device}, but there are {n_gpus} GPUs, counted from 0")

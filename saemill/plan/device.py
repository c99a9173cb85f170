"""The device that a stage will run on: one of this machine's, or a GPU of another."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from saemill.common.device import choose_device
from saemill.common.outlook import Outlook


@dataclass(frozen=True, slots=True)
class Device:
    """A device that is planned for."""

    planned: torch.device
    is_elsewhere: bool
    """Whether it is a GPU, and this machine has none."""

    @classmethod
    def of(cls, name: str) -> "Device":
        """Find the device that a setting names.

        Raises:
            ConfigError: it names none, or one more than this machine's GPUs.
        """
        if name.partition(":")[0] == "cuda" and not torch.cuda.is_available():
            return cls(torch.device("cuda"), is_elsewhere=True)
        return cls(choose_device(name), is_elsewhere=False)

    @property
    def memory_bytes(self) -> int | None:
        """Memory of the GPU; None of a CPU, and of one that is elsewhere."""
        if self.planned.type != "cuda" or self.is_elsewhere:
            return None
        return torch.cuda.get_device_properties(self.planned).total_memory

    def here(self, config: Any) -> Any:
        """Change a stage's settings so that they can be checked on this machine."""
        if not self.is_elsewhere:
            return config
        changed = {"device": "cpu"}
        if getattr(config, "kernels", None) == "triton":
            changed["kernels"] = "auto"
        if getattr(config, "model_dtype", None) == "auto":
            changed["model_dtype"] = "bf16"  # as it is on a GPU
        return replace(config, **changed)

    def told(self, checked: Outlook, ahead: Outlook) -> Outlook:
        """Choose between the outlook that a stage told here and the one that was looked ahead to."""
        if not self.is_elsewhere:
            return checked
        return replace(ahead, is_done=checked.is_done)
